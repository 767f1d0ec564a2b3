"""Parameters that are not trained: the run file's patterns, and the patterns that are proposed."""

import pytest
import torch
import transformers
from equivalence_cases import make_model

from engine.errors import ConfigError
from engine.model.frozen import freeze, freeze_patterns, frozen_names, untrained_lines


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (["model.embed_tokens.weight"], ["model.embed_tokens.weight"]),
        (["embed_tokens.weight"], ["model.embed_tokens.weight"]),
        (["embed_tokens"], ["model.embed_tokens.weight"]),
        (["lm_head"], ["lm_head.weight"]),
        (["model.norm.*", "lm_head.*"], ["model.norm.weight", "lm_head.weight"]),
        (["layers.[01].mlp.up_proj"], ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]),
        (["*.1.*norm*"], ["model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"]),
        (["layers.?.self_attn.q_proj.weight"], [f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)]),
        ([], []),
    ],
)
def test_patterns_name_parameters_and_modules(patterns: list[str], frozen: list[str]) -> None:
    model = make_model("llama", packed=False)
    freeze(model, patterns)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == set(frozen)


@pytest.mark.parametrize("pattern", ["lm_head.*", "model.embed_tokens.*", "lm_head", "embed_tokens.weight"])
def test_tied_weights_are_one_under_any_name(pattern: str) -> None:
    assert frozen_names(make_model("qwen2", packed=False), [pattern]) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("embed_token.*", "near: model.embed_tokens"),
        ("model.layer.*", "near: model.layers"),
        ("lm_heads.*", "near: lm_head"),
        ("layers.7.*", "near: "),
        ("vision_tower.*", "the model has model, model.embed_tokens, model.layers, model.norm, lm_head"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_that_lists_what_is_near(pattern: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        freeze(make_model("llama", packed=False), [pattern, "model.norm", "nothing_like_it"])
    assert f"model.freeze: '{pattern}' matches no parameter (" in str(caught.value)
    assert near in str(caught.value)
    assert "; 'nothing_like_it' matches no parameter (" in str(caught.value), "all at once"


@pytest.mark.parametrize("patterns", [["*"], ["model", "lm_head"], ["model.*", "lm_head.weight"]])
def test_something_must_be_left_to_train(patterns: list[str]) -> None:
    with pytest.raises(ConfigError, match="freeze every parameter"):
        freeze(make_model("llama", packed=False), patterns)


@pytest.mark.parametrize(
    ("names", "others", "patterns"),
    [
        (["a.x.w", "a.y.w"], ["b.w"], ("a.*",)),
        (["a.x.w", "a.x.b"], ["a.y.w"], ("a.x.*",)),
        (["a.x.w"], ["a.x.b"], ("a.x.w",)),
        (["w"], ["a.w"], ("w",)),
        (["l.0.k.w", "l.1.k.w"], ["l.0.q.w", "l.1.q.w"], ("l.*.k.*",)),
        (["l.0.k.w", "l.1.k.w"], ["l.0.q.w", "l.1.q.w", "l.2.k.w"], ("l.0.k.*", "l.1.k.*")),
        (["v.l.0.w", "v.l.1.w", "p.w"], ["t.l.0.w"], ("p.*", "v.*")),
    ],
)
def test_proposed_patterns_are_the_shortest_that_match_nothing_else(
    names: list[str], others: list[str], patterns: tuple[str, ...]
) -> None:
    assert freeze_patterns(names, [*names, *others]) == patterns


def test_proposed_patterns_freeze_what_was_meant() -> None:
    model = transformers.XLNetForSequenceClassification(
        transformers.XLNetConfig(vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=48)
    )
    names = [name for name, _ in model.named_parameters()]
    meant = {name for name in names if "seg_embed" in name or "mask_emb" in name}
    with torch.device("meta"):
        assert frozen_names(model, freeze_patterns(meant, names)) == meant


def test_frozen_weights_that_nothing_has_trained_are_named() -> None:
    model = make_model("llama", packed=False)
    freeze(model, ["lm_head", "embed_tokens"])
    fresh, grown = ["lm_head.weight", "model.norm.weight"], ["model.embed_tokens.weight"]
    head, rows = untrained_lines(model, fresh, grown)
    assert head.startswith("warning: model.freeze keeps new, untrained weights as they are: lm_head.weight; leave")
    assert rows.startswith(
        "warning: model.freeze keeps the rows of new tokens as they start: model.embed_tokens.weight;"
    )
    assert untrained_lines(model, ["model.norm.weight"], []) == []
