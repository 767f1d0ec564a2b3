"""Layer-wise learning rates, the parts that `model.train: head` freezes, and dropout in place of the configuration's."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.errors import ConfigError
from engine.model.build import StoreFacts, build_model, decay_groups
from engine.model.dropout import keep_saved_dropout, set_dropout
from engine.model.frozen import body_patterns, freeze
from engine.model.layer_scales import layer_scales
from engine.sections import ModelSection
from engine.tasks import TASKS

SIZE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3,
}  # fmt: skip
BERT = transformers.BertConfig(**SIZE)
FACTS = StoreFacts(vocab_size=40, pad_id=0, bos_id=1, eos_id=2, label_names=("a", "b", "c"))


def classifier(config: Any) -> Any:
    return transformers.AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            BERT,
            {
                "bert.embeddings.word_embeddings.weight": 0.125,
                "bert.embeddings.LayerNorm.bias": 0.125,
                "bert.encoder.layer.0.output.dense.weight": 0.25,
                "bert.encoder.layer.1.attention.self.query.bias": 0.5,
                "bert.pooler.dense.weight": 1.0,
                "classifier.weight": 1.0,
            },
        ),
        (
            transformers.LlamaConfig(**SIZE),
            {
                "model.embed_tokens.weight": 0.125,
                "model.layers.0.mlp.up_proj.weight": 0.25,
                "model.layers.1.input_layernorm.weight": 0.5,
                "model.norm.weight": 1.0,
                "score.weight": 1.0,
            },
        ),
        (
            transformers.BartConfig(
                vocab_size=40,
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
                num_labels=3,
            ),
            {
                "model.shared.weight": 0.125,
                "model.encoder.layers.0.fc1.weight": 0.25,
                "model.encoder.layernorm_embedding.weight": 0.25,
                "model.decoder.layers.0.fc1.weight": 0.5,
                "classification_head.dense.weight": 1.0,
            },
        ),
    ],
    ids=["bert", "llama", "bart"],
)
def test_each_layer_has_its_share_and_the_head_all(config: Any, expected: dict[str, float]) -> None:
    model = classifier(config)
    scales = layer_scales(model, 0.5)
    assert {name: scales[name] for name in expected} == expected
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert set(layer_scales(model, 1.0).values()) == {1.0}


def test_groups_by_layer_hold_every_trained_parameter_once() -> None:
    model = classifier(BERT)
    freeze(model, ["embeddings.word_embeddings"])
    groups = decay_groups(model, 0.1, 0.5)
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [
        (scale, decay) for scale in (1.0, 0.5, 0.25, 0.125) for decay in (0.1, 0.0)
    ]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    scales = layer_scales(model, 0.5)
    for group in groups:
        assert {scales[names[id(parameter)]] for parameter in group["params"]} == {group["lr_scale"]}
    assert [group["lr_scale"] for group in decay_groups(model, 0.1)] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (BERT, {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}),
        (transformers.LlamaConfig(**SIZE), {"score.weight"}),
    ],
    ids=["bert", "llama"],
)
def test_only_the_head_is_left_to_train(config: Any, kept: set[str]) -> None:
    model = classifier(config)
    freeze(model, body_patterns(model))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == kept


def test_a_model_is_built_with_only_its_head_to_train_and_other_dropout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier(BERT).save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path), train="head", freeze=["classifier.bias"], dropout=0.4)
    model, _ = build_model(section, TASKS["sequence_classification"].padded or TASKS["causal_lm"], FACTS, 1)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight",
    }  # fmt: skip
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert set(rates.values()) == {0.4} and "dropout" in rates and "bert.embeddings.dropout" in rates
    assert (model.config.hidden_dropout_prob, model.config.attention_probs_dropout_prob) == (0.1, 0.1)
    said = capsys.readouterr().out
    assert "model.dropout: 0.4 in place of " in said and "hidden_dropout_prob 0.1" in said


def test_a_model_with_nothing_but_its_body_has_no_head_to_train(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(vocab_size=40, n_embd=16, n_head=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="freeze every parameter, so there is nothing to train"):
        build_model(ModelSection(path=str(tmp_path), train="head"), TASKS["causal_lm"], FACTS, 1)


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (transformers.GPT2Config(), {"resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"}),
        (transformers.T5Config(), {"dropout_rate", "classifier_dropout"}),
        (transformers.BartConfig(), {"dropout", "attention_dropout", "activation_dropout", "classifier_dropout"}),
        (
            transformers.ModernBertConfig(),
            {"attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout"},
        ),
    ],
    ids=["gpt2", "t5", "bart", "modernbert"],
)
def test_every_dropout_of_a_family_is_set_and_layerdrop_is_not(config: Any, keys: set[str]) -> None:
    before = set_dropout(config, 0.25)
    assert before.keys() == keys
    assert {getattr(config, key) for key in keys} == {0.25}
    assert not config.to_dict().get("encoder_layerdrop")


def test_a_saved_configuration_has_the_values_of_the_base_and_the_parts_keep_theirs() -> None:
    config = transformers.BertConfig(**SIZE)
    before = set_dropout(config, 0.25)
    assert before == {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    model = classifier(config)
    keep_saved_dropout(model, before)
    assert model.config.to_dict()["hidden_dropout_prob"] == 0.1
    assert model.bert.config.hidden_dropout_prob == 0.25 and model.dropout.p == 0.25


@pytest.mark.parametrize("config", [transformers.LlamaConfig(**SIZE), transformers.GPT2Config(vocab_size=40, n_embd=16,
    n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)], ids=["llama", "gpt2"])  # fmt: skip
def test_a_head_with_a_dropout_of_its_own_gets_the_runs(tmp_path: Path, config: Any) -> None:
    """Heads for tags of such families have 0.1 where the configuration says nothing."""
    transformers.AutoModelForTokenClassification.from_config(config).save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path), activation_checkpointing=False, dropout=0.0)
    model, _ = build_model(section, TASKS["token_classification"], FACTS, 1)
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates and set(rates) == {0.0}


def test_a_family_without_dropout_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"model.dropout: model type mamba has no dropout"):
        set_dropout(transformers.MambaConfig(), 0.1)
