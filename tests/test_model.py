"""Where a model may come from, and what it must agree on with its data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from equivalence_cases import make_model
from huggingface_hub.errors import LocalEntryNotFoundError
from pydantic import ValidationError

from engine.config import ModelSection
from engine.errors import ConfigError, DataError, FulltuneError, MissingInputError, RefusedForSecurityError
from engine.model import StoreFacts, build_model

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
    made = [build_model(section(init="random", config=LLAMA), "causal_lm", FACTS, seed) for seed in (1, 1, 2)]
    first, again, other = (model.lm_head.weight for model in made)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (61, 32)
    assert made[0].config.eos_token_id == 2


def test_pretrained_weights_are_the_files(saved: Path) -> None:
    model = build_model(section(path=str(saved)), "causal_lm", FACTS, 1)
    expected = make_model("llama", packed=False).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_language_model_becomes_a_classifier_with_a_fresh_head(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = []
    for _ in range(2):
        model = build_model(section(path=str(saved)), "sequence_classification", LABELS, 5)
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
        (with_other_shape, DataError, "lacks or mis-shapes 1 weights"),
        (with_missing_weight, DataError, "lacks or mis-shapes 1 weights, for example model.norm.weight"),
        (lambda folder: (folder / "config.json").unlink(), MissingInputError, "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), DataError, "config.json"),
    ],
)
def test_bad_folders_are_refused(
    saved: Path, spoil: Any, error: type[FulltuneError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved)
    spoil(saved)
    with pytest.raises(error) as caught:
        build_model(section(path=str(saved)), "causal_lm", FACTS, 1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (saved / "ran").exists()


def test_a_smaller_vocabulary_than_the_stores_is_refused(saved: Path) -> None:
    facts = StoreFacts(vocab_size=62, pad_id=0, bos_id=1, eos_id=2, label_names=())
    with pytest.raises(
        DataError, match=r"model\.path: .*: the store's tokenizer has 62 tokens, the model 61 embeddings"
    ):
        build_model(section(path=str(saved)), "causal_lm", facts, 1)


@pytest.mark.parametrize(
    "config", [{"model_type": "t5"}, {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2}]
)
def test_models_that_are_not_causal_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"t5|not a causal model"):
        build_model(section(init="random", config=config), "causal_lm", FACTS, 1)


@pytest.mark.parametrize(("init", "patterns"), [("pretrained", ["*.json", "*.safetensors"]), ("random", ["*.json"])])
def test_a_hub_name_is_fetched_as_safetensors_and_nothing_else(
    saved: Path, monkeypatch: pytest.MonkeyPatch, init: str, patterns: list[str]
) -> None:
    asked: list[Any] = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    model = build_model(section(path="owner/name", revision="v1", init=init), "causal_lm", FACTS, 1)
    assert asked == [("owner/name", "v1", patterns)]
    same = torch.equal(model.lm_head.weight, make_model("llama", packed=False).lm_head.weight)
    assert same == (init == "pretrained")


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_options: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(MissingInputError) as caught:
        build_model(section(path="owner/name"), "causal_lm", FACTS, 1)
    assert str(caught.value) == (
        "model.path: owner/name is no local folder, and the Hub did not give it: no connection"
    )


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(MissingInputError, match=r"model.path: \./nowhere: no such folder"):
        build_model(section(path="./nowhere"), "causal_lm", FACTS, 1)


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
        build_model(section(init="random", config=config), "causal_lm", FACTS, 1)


@pytest.mark.parametrize(
    "values",
    [{}, {"path": "m", "config": LLAMA}, {"config": LLAMA}, {"config": {"hidden_size": 3}, "init": "random"}],
)
def test_a_model_has_exactly_one_source(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"model\."):
        section(**values)


def test_activation_checkpointing_is_on_when_asked() -> None:
    model = build_model(section(init="random", config=LLAMA, activation_checkpointing=True), "causal_lm", FACTS, 1)
    assert model.is_activation_checkpointing
    assert isinstance(model, transformers.PreTrainedModel)
