"""Where a model may come from, and what it must agree on with its data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from equivalence_cases import make_model
from huggingface_hub.errors import LocalEntryNotFoundError
from pydantic import ValidationError
from whole_model import whole_model

from engine.errors import ConfigError, DataError, FulltuneError, MissingInputError, RefusedForSecurityError
from engine.model.build import StoreFacts
from engine.model.model_folder import CARRIED_PATTERNS
from engine.model.vocabulary import grow_vocabulary, read_extension
from engine.sections import ModelSection

FACTS = StoreFacts(vocab_size=61, pad_id=0, bos_id=1, eos_id=2, label_names=())
LABELS = StoreFacts(vocab_size=61, pad_id=0, bos_id=1, eos_id=2, label_names=("bad", "good", "great"))
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def section(**values: Any) -> ModelSection:
    return ModelSection.model_validate({"activation_checkpointing": False} | values)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_model("llama", packed=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_fresh_weights_follow_from_the_seed_alone() -> None:
    made = [whole_model(section(init="random", config=LLAMA), "causal_lm", FACTS, seed) for seed in (1, 1, 2)]
    first, again, other = (model.lm_head.weight for model in made)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (61, 32)
    assert made[0].config.eos_token_id == 2


def test_pretrained_weights_are_the_files(saved: Path) -> None:
    model = whole_model(section(path=str(saved)), "causal_lm", FACTS, 1)
    expected = make_model("llama", packed=False).state_dict()
    assert model.training, "dropout is on, as in a model that was made here"
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_language_model_becomes_a_classifier_with_a_fresh_head(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = []
    for _ in range(2):
        model = whole_model(section(path=str(saved)), "sequence_classification", LABELS, 5)
        heads.append(model.score.weight)
    assert heads[0].shape == (3, 32)
    assert torch.equal(*heads)
    assert model.config.id2label == {0: "bad", 1: "good", 2: "great"}
    assert torch.equal(model.model.norm.weight, make_model("llama", packed=False).model.norm.weight)
    assert "new, untrained weights: score.weight" in capsys.readouterr().out


def without_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.rename(folder / "pytorch_model.bin")


def with_own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("import pathlib\npathlib.Path('ran').write_text('')\n")


def with_generation(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "generation_config.json").write_text(text) and None


def with_weights_instead(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").write_text(text) and None


def with_config(**values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def with_missing_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_other_shape(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (without_weights, RefusedForSecurityError, "has no *.safetensors; other weight files can run code"),
        (with_own_code, RefusedForSecurityError, "brings its own code, which is never run"),
        (with_cut_weights, DataError, "model"),
        (with_other_shape, DataError, "model.safetensors: model.norm.weight has the shape [31], the model needs [32]"),
        (with_missing_weight, DataError, "lacks 1 weights, for example model.norm.weight"),
        (with_generation("{,"), DataError, "generation_config.json: not valid JSON: "),
        (with_generation('{"max_new_tokens": 0}'), DataError, "generation_config.json: `max_new_tokens` must be greater than 0, but is 0.; correct it, or remove"),
        (with_weights_instead("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), DataError, "model.safetensors: not a safetensors file: a pointer of Git LFS; run `git lfs pull`"),
        (with_weights_instead("<!DOCTYPE html><html></html>"), DataError, "model.safetensors: not a safetensors file: a web page; download"),
        (with_config(num_attention_heads=5), DataError, "The hidden size (32) is not a multiple of the number of attention"),
        (with_config(vocab_size="many"), DataError, "Field 'vocab_size' expected int, got str"),
        (with_config(num_attention_heads=4, num_key_value_heads=3), DataError, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        (lambda folder: (folder / "config.json").unlink(), MissingInputError, "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), DataError, "config.json"),
    ],
)  # fmt: skip
def test_bad_folders_are_refused(
    saved: Path, spoil: Any, error: type[FulltuneError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved)
    spoil(saved)
    with pytest.raises(error) as caught:
        whole_model(section(path=str(saved)), "causal_lm", FACTS, 1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (saved / "ran").exists()


def test_a_smaller_vocabulary_than_the_stores_is_refused(saved: Path) -> None:
    facts = StoreFacts(vocab_size=62, pad_id=0, bos_id=1, eos_id=2, label_names=())
    with pytest.raises(
        DataError, match=r"model\.path: .*: the store's tokenizer has 62 tokens, the model 61 embeddings"
    ):
        whole_model(section(path=str(saved)), "causal_lm", facts, 1)


@pytest.mark.parametrize(
    "config", [{"model_type": "t5"}, {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2}]
)
def test_models_that_are_not_causal_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"t5|not a causal model"):
        whole_model(section(init="random", config=config), "causal_lm", FACTS, 1)


@pytest.mark.parametrize(
    ("init", "patterns"),
    [("pretrained", ["*.json", *CARRIED_PATTERNS, "*.safetensors"]), ("random", ["*.json", *CARRIED_PATTERNS])],
)
def test_a_hub_name_is_fetched_as_safetensors_and_nothing_else(
    saved: Path, monkeypatch: pytest.MonkeyPatch, init: str, patterns: list[str]
) -> None:
    asked: list[Any] = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    model = whole_model(section(path="owner/name", revision="v1", init=init), "causal_lm", FACTS, 1)
    assert asked == [("owner/name", "v1", patterns)]
    same = torch.equal(model.lm_head.weight, make_model("llama", packed=False).lm_head.weight)
    assert same == (init == "pretrained")


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_options: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(MissingInputError) as caught:
        whole_model(section(path="owner/name"), "causal_lm", FACTS, 1)
    assert str(caught.value) == (
        "model.path: owner/name is no local folder, and the Hub did not give it: no connection"
    )


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(MissingInputError, match=r"model.path: \./nowhere: no such folder"):
        whole_model(section(path="./nowhere"), "causal_lm", FACTS, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "hiden_size": 32}, r"unknown key `model.config.hiden_size` for llama; did you mean "),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": "llama", "hidden_size": "wide"}, "model.config"),
    ],
)
def test_bad_inline_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        whole_model(section(init="random", config=config), "causal_lm", FACTS, 1)


@pytest.mark.parametrize(
    ("kind", "asked"), [("qwen3_moe", "num_experts_per_tok"), ("gpt_oss", "num_experts_per_tok"), ("mixtral", "num_experts_per_tok")]
)  # fmt: skip
def test_more_experts_for_a_token_than_there_are_is_refused(kind: str, asked: str) -> None:
    config = {"model_type": kind, "hidden_size": 32, "num_hidden_layers": 1, "num_local_experts": 4, asked: 5}
    with pytest.raises(DataError, match=rf"{asked} 5 is more than num_(local_)?experts 4"):
        whole_model(section(init="random", config=config), "causal_lm", FACTS, 1)


@pytest.mark.parametrize(
    "values",
    [{}, {"path": "m", "config": LLAMA}, {"config": LLAMA}, {"config": {"hidden_size": 3}, "init": "random"}],
)
def test_a_model_has_exactly_one_source(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"model\."):
        section(**values)


def test_activation_checkpointing_is_on_when_asked() -> None:
    model = whole_model(section(init="random", config=LLAMA, activation_checkpointing=True), "causal_lm", FACTS, 1)
    assert model.is_activation_checkpointing
    assert isinstance(model, transformers.PreTrainedModel)


# New tokens: rows made of old ones.

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2_SIZES = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 24}
T5_SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PIECES = [[5, 6], [7], [3, 4, 60, 9], [61, 8]]  # the last one is spelled with the first new token


def tiny(family: str, vocab_size: int) -> Any:
    """A model with random weights and biases, as a folder would give it."""
    torch.manual_seed(11)
    common = ENDS | {"vocab_size": vocab_size}
    made = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **SIZES)),
        "llama_tied": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**common, **SIZES, tie_word_embeddings=True)
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**common, **GPT2_SIZES)),
        "bert_mlm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**common, **SIZES)),
        "bert_labels": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**common, **SIZES)),
        "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**common, **T5_SIZES)),
        "t5_untied": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(**common, **T5_SIZES, tie_word_embeddings=False)
        ),
        "t5_labels": lambda: transformers.T5ForSequenceClassification(transformers.T5Config(**common, **T5_SIZES)),
    }[family]()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def extension_folder(folder: Path, first: int, pieces: list[list[int]]) -> Path:
    folder.mkdir(exist_ok=True)
    values = {str(first + place): ids for place, ids in enumerate(pieces)}
    (folder / "extension.json").write_text(json.dumps({"format": 1, "base_vocab_size": first, "pieces": values}))
    return folder


@pytest.mark.parametrize(
    "family", ["llama", "llama_tied", "gpt2", "bert_mlm", "bert_labels", "t5", "t5_untied", "t5_labels"]
)
@pytest.mark.parametrize(("num_rows", "expected_rows"), [(61, 65), (62, 65), (64, 128), (72, 72)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_the_means_of_their_pieces(
    tmp_path: Path, family: str, num_rows: int, expected_rows: int, dtype: torch.dtype
) -> None:
    """However many rows the model had to spare, and wherever it keeps numbers for tokens."""
    model = tiny(family, num_rows).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    was_tied = {name for name, _ in model.named_parameters()}
    extension = read_extension(extension_folder(tmp_path, 61, PIECES))
    assert extension is not None
    rows = grow_vocabulary(model, extension)
    assert rows is not None
    with torch.no_grad():
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        for name in rows.names:
            tensors[name].copy_(rows.extend(before[name]))
    after = model.state_dict()
    over_tokens = {name for name, value in before.items() if value.shape[0] == num_rows}
    assert len(over_tokens) >= 1
    for name, value in before.items():
        if name not in over_tokens:
            assert torch.equal(after[name], value), name
            continue
        wanted = [row.float().numpy() for row in value[:61]]
        for ids in PIECES:
            mean = np.mean([wanted[index] for index in ids], axis=0, dtype=np.float64)
            wanted.append(torch.from_numpy(np.asarray(mean, dtype=np.float32)).to(dtype).float().numpy())
        assert after[name].dtype == dtype
        assert torch.equal(after[name][:61], value[:61])
        assert np.allclose(
            after[name][61:65].float().numpy(), wanted[61:], rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-6
        )
        assert len(after[name]) == expected_rows
        spare = after[name][65:].float()
        if num_rows > 65:
            assert torch.equal(spare, value[65:].float()), "rows of no token stay as they were"
        elif len(spare):
            assert np.allclose(spare.numpy(), np.mean(wanted[:61], axis=0), rtol=1e-2, atol=1e-2)
    assert {name for name, _ in model.named_parameters()} == was_tied
    assert model.config.vocab_size == expected_rows
    assert grow_vocabulary(model, extension) is None, "rows are made once"
    assert after.keys() == model.state_dict().keys()


def facts_with(folder: Path, vocab_size: int) -> StoreFacts:
    return StoreFacts(vocab_size, pad_id=0, bos_id=1, eos_id=2, label_names=(), tokenizer_dir=folder)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_new_tokens_is_the_same_on_every_rank_and_knows_them_later(tmp_path: Path, tied: bool) -> None:
    tiny("llama_tied" if tied else "llama", 61).save_pretrained(tmp_path / "model")
    tokenizer = extension_folder(tmp_path / "tokenizer", 61, PIECES)
    one, two = (
        whole_model(section(path=str(tmp_path / "model")), "causal_lm", facts_with(tokenizer, 65), seed)
        for seed in (1, 2)
    )
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert (one.lm_head.weight is one.model.embed_tokens.weight) == tied
    with torch.no_grad():
        one.model.embed_tokens.weight[62] = 3.0
    one.save_pretrained(tmp_path / "trained")
    stored = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert stored["vocab_size"] == 65
    later = whole_model(section(path=str(tmp_path / "trained")), "causal_lm", facts_with(tokenizer, 65), 1)
    assert torch.equal(later.model.embed_tokens.weight, one.model.embed_tokens.weight), "what was trained is kept"
    # a second extension on top: only its own rows are made
    longer = extension_folder(tmp_path / "longer", 61, [*PIECES, [62, 1]])
    most = whole_model(section(path=str(tmp_path / "trained")), "causal_lm", facts_with(longer, 66), 1)
    rows = most.model.embed_tokens.weight
    assert torch.equal(rows[:65], one.model.embed_tokens.weight)
    assert torch.allclose(rows[65], (rows[62] + rows[1]) / 2)


def test_fresh_models_have_rows_for_new_tokens_and_never_get_them_again(tmp_path: Path) -> None:
    tokenizer = extension_folder(tmp_path / "tokenizer", 61, PIECES)
    tiny("llama", 61).save_pretrained(tmp_path / "model")
    for values in ({"config": LLAMA}, {"path": str(tmp_path / "model")}):
        model = whole_model(section(init="random", **values), "causal_lm", facts_with(tokenizer, 65), 1)
        assert model.config.vocab_size == 65
        model.save_pretrained(tmp_path / "fresh")
        again = whole_model(section(path=str(tmp_path / "fresh")), "causal_lm", facts_with(tokenizer, 65), 1)
        assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_extensions_that_do_not_fit_are_refused(saved: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    make = section(path=str(saved))
    extension_folder(tokenizer, 70, [[1]])
    with pytest.raises(DataError, match="tokenizer has 70 tokens, the model 61 embeddings"):
        whole_model(make, "causal_lm", facts_with(tokenizer, 71), 1)
    extension_folder(tokenizer, 61, [[1]])
    with pytest.raises(DataError, match="spells tokens up to 61, the tokenizer has 63"):
        whole_model(make, "causal_lm", facts_with(tokenizer, 63), 1)
    for ids in ([], [-1], [62], [61]):
        extension_folder(tokenizer, 61, [ids])
        with pytest.raises(DataError, match="token 61 is not spelled in smaller ids"):
            whole_model(make, "causal_lm", facts_with(tokenizer, 62), 1)
    for text in ("{", "[]", '{"format": 2}', '{"format": 1, "base_vocab_size": 61, "pieces": {"62": [1]}}'):
        (tokenizer / "extension.json").write_text(text)
        with pytest.raises(DataError, match="not the extension of a tokenizer"):
            whole_model(make, "causal_lm", facts_with(tokenizer, 62), 1)
    model = tiny("bert_mlm", 61)
    model.per_token = torch.nn.Embedding(61, 3)
    good = read_extension(extension_folder(tokenizer, 61, [[1]]))
    assert good is not None
    with pytest.raises(DataError, match="per_token has rows for tokens, too"):
        grow_vocabulary(model, good)
