"""Files of weights that lie, leave their folder, or belong to another model: refused before anything is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from load_cases import SEED, LoadCase, facts_of, make_folders, section_of
from safetensors.torch import load_file, save_file
from whole_model import whole_model

from engine.errors import DataError, FulltuneError, RefusedForSecurityError
from engine.model.build import build_model
from engine.model.weight_names import Conversion
from engine.tasks import TASKS

Change = Callable[[Path], None]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_folders(folder)
    return folder


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    """Copies that a test may spoil."""
    for path in originals.iterdir():
        (tmp_path / path.name).mkdir()
        for file in path.iterdir():
            (tmp_path / path.name / file.name).write_bytes(file.read_bytes())
    return tmp_path


def load(folder: Path, source: str, task: Any = "causal_lm") -> Any:
    case = LoadCase(source, source, task=task)
    return whole_model(section_of(case, folder), task, facts_of(case, folder), SEED)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        values = load_file(path)
        change(values)
        save_file(values, path, metadata={"format": "pt"})

    return spoil


def index(change: Callable[[dict[str, Any]], Any]) -> Change:
    def spoil(folder: Path) -> None:
        values = json.loads((folder / INDEX).read_text())
        change(values["weight_map"])
        (folder / INDEX).write_text(json.dumps(values))

    return spoil


def config(**values: Any) -> Change:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def first_shard(weights: dict[str, str]) -> str:
    return sorted(weights.values())[0]


def to(name: str, dtype: torch.dtype) -> Change:
    return tensors(lambda values: values.update({name: values[name].to(dtype)}))


NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
REFUSALS: list[tuple[str, Change, type[FulltuneError], str]] = [
    # what the weights must be
    ("llama", tensors(lambda v: v.pop(QUERY)), DataError, f"lacks 1 weights, for example {QUERY}"),
    ("llama", tensors(lambda v: v.pop("lm_head.weight")), DataError, "lacks 1 weights, for example lm_head.weight"),
    ("llama", tensors(lambda v: v.update(more=torch.ones(1))), DataError, "model.safetensors: more has no place in Llama"),
    ("llama", config(num_hidden_layers=1), DataError, "model.layers.1.input_layernorm.weight has no place in Llama"),
    ("llama", config(num_hidden_layers=3), DataError, "lacks 9 weights, for example model.layers.2."),
    ("llama", config(intermediate_size=18), DataError, "mlp.down_proj.weight has the shape [12, 17], the model needs [12, 18]"),
    ("llama", tensors(lambda v: v.update({QUERY: v[QUERY].reshape(6, 24)})), DataError, "has the shape [6, 24]"),
    ("llama", to(QUERY, torch.int8), DataError, f"{QUERY} is stored as int8: a quantised checkpoint cannot be trained"),
    ("llama", to(QUERY, torch.float8_e4m3fn), DataError, "F8_E4M3"),
    ("llama", config(quantization_config={"quant_method": "fp8"}), DataError, "is quantised (quantization_config in"),
    ("qwen2-both-copies", tensors(lambda v: v["lm_head.weight"].add_(1)), DataError, "lm_head.weight and model.embed_tokens"),
    ("qwen2-both-copies", tensors(lambda v: v.update({"lm_head.weight": torch.ones(2, 2)})), DataError, "shape [2, 2]"),
    ("mixtral", tensors(lambda v: v.pop("model.layers.0.block_sparse_moe.experts.1.w2.weight")), DataError, "w2.weight"),
    ("mixtral", config(intermediate_size=18), DataError, "has the shape [3, 34, 12], the model needs [3, 36, 12]"),
    ("gpt2", tensors(lambda v: v.update({"h.0.attn.extra": torch.ones(1)})), DataError, "has no place in GPT2"),
    # what the index must be
    ("llama-sharded", index(lambda v: v.update({QUERY: "../llama/model.safetensors"})), RefusedForSecurityError, "'../llama/"),
    ("llama-sharded", index(lambda v: v.update({QUERY: "/etc/passwd"})), RefusedForSecurityError, "'/etc/passwd' as weights"),
    ("llama-sharded", index(lambda v: v.update({QUERY: "pytorch_model.bin"})), RefusedForSecurityError, "pytorch_model.bin"),
    ("llama-sharded", index(lambda v: v.update({QUERY: "none.safetensors"})), DataError, "none.safetensors: named by"),
    ("llama-sharded", index(lambda v: v.update(more=first_shard(v))), DataError, "more is said to be in model-00001"),
    ("llama-sharded", index(lambda v: v.pop(NORM)), DataError, f"holds {NORM}, but {INDEX} puts it into None"),
    ("llama-sharded", index(lambda v: v.update({NORM: first_shard(v)})), DataError, "model.norm.weight"),
    ("llama-sharded", index(lambda v: v.clear()), DataError, "not an index of weights"),
    ("llama-sharded", index(lambda v: v.update({NORM: 3})), DataError, "not an index of weights"),
    ("llama-sharded", lambda folder: (folder / INDEX).write_text("[" * 10_000), DataError, "not an index of weights"),
    ("llama-sharded", lambda folder: (folder / INDEX).unlink(), DataError, "has neither model.safetensors nor"),
    ("llama", config(transformers_weights="../gpt2/model.safetensors"), RefusedForSecurityError, "names '../gpt2/"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "spoil", "error", "message"), REFUSALS)
def test_refusals(folder: Path, source: str, spoil: Change, error: type[FulltuneError], message: str) -> None:
    load(folder, source)
    spoil(folder / source)
    with pytest.raises(error) as caught:
        load(folder, source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_body_must_be_whole_for_a_new_head_too(folder: Path) -> None:
    load(folder, "bert-masked", "sequence_classification")
    tensors(lambda values: values.pop("bert.encoder.layer.1.output.dense.bias"))(folder / "bert-masked")
    with pytest.raises(DataError, match=r"lacks 1 weights, for example bert.encoder.layer.1.output.dense.bias"):
        load(folder, "bert-masked", "sequence_classification")


def test_what_is_new_and_what_is_left_out_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(folder, "bert-masked", "sequence_classification")
    said = capsys.readouterr().out
    assert "new, untrained weights: bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias" in said
    assert "left out, of another task's head: cls.predictions.bias, cls.predictions.transform" in said
    load(folder, "llama")
    load(folder, "mixtral")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("source", ["bert-base", "bert-masked", "bert-labels", "llama", "gpt2", "qwen2", "t5-base"])
def test_a_tagger_of_any_family_starts_as_transformers_makes_it(folder: Path, source: str) -> None:
    """Its body is the file's bit by bit; the head is the file's or new, from the seed."""
    ours = load(folder, source, "token_classification")
    torch.manual_seed(SEED)
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(folder / source, num_labels=3)
    assert type(ours) is type(theirs)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_pooler_is_left_out_where_the_head_reads_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 12, "intermediate_size": 17, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(vocab_size=37, pad_token_id=0, num_labels=3, **sizes)
    )
    assert not any("pooler" in name for name, _ in model.named_parameters())
    model.save_pretrained(folder / "roberta")
    pooler = {"roberta.pooler.dense.weight": torch.ones(12, 12), "roberta.pooler.dense.bias": torch.ones(12)}
    tensors(lambda values: values.update(pooler))(folder / "roberta")
    load(folder, "roberta", "sequence_classification")
    labels, *others = capsys.readouterr().out.splitlines()
    assert labels.startswith("warning: label names: the model's labels have no names")
    assert others == [f"left out, of another task's head: {', '.join(sorted(pooler))}"]
    tensors(lambda values: values.update({"roberta.extra": torch.ones(2)}))(folder / "roberta")
    with pytest.raises(DataError, match=r"roberta.extra.* has no place in RobertaForSequenceClassification"):
        load(folder, "roberta", "sequence_classification")


@pytest.mark.parametrize("source", ["mixtral", "qwen2-moe"])
def test_layouts_that_are_converted_whole_give_the_same(
    folder: Path, source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way for families whose pieces do not lie one after the other, taken by ones whose pieces do."""
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder / source).state_dict()
    by_ranges = load(folder, source).state_dict()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(Conversion, "pieces", lambda self: None)
    converted = load(folder, source).state_dict()
    assert "weights are stored in another layout" in capsys.readouterr().out
    assert by_ranges.keys() == converted.keys() == expected.keys()
    assert all(torch.equal(expected[name], value) for name, value in by_ranges.items())
    assert all(torch.equal(expected[name], value) for name, value in converted.items())


def test_a_head_of_another_size_is_refused_as_ever(folder: Path) -> None:
    names = {"bad": 0, "good": 1, "great": 2}
    config(id2label={str(number): name for name, number in names.items()}, label2id=names)(folder / "bert-labels")
    tensors(lambda values: values.update({"classifier.weight": torch.ones(2, 12)}))(folder / "bert-labels")
    with pytest.raises(DataError, match=r"classifier.weight has the shape \[2, 12\], the model needs \[3, 12\]"):
        load(folder, "bert-labels", "sequence_classification")


def test_names_of_old_files_are_understood(folder: Path) -> None:
    """LayerNorm.gamma and beta, and no prefix of the body."""
    expected = load(folder, "bert-base", "sequence_classification").state_dict()

    def rename(values: dict[str, torch.Tensor]) -> None:
        for name in list(values):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            values[f"bert.{old}"] = values.pop(name)

    tensors(rename)(folder / "bert-base")
    again = load(folder, "bert-base", "sequence_classification").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in expected.items())


def test_links_of_a_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    (folder / "llama" / "model.safetensors").rename(blob)
    (folder / "llama" / "model.safetensors").symlink_to(blob)
    model = load(folder, "llama")
    assert torch.equal(model.lm_head.weight, load_file(blob)["lm_head.weight"])


def test_generation_settings_come_along(folder: Path) -> None:
    (folder / "llama" / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    assert load(folder, "llama").generation_config.temperature == 0.25
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama").generation_config
    assert load(folder, "llama").generation_config.to_dict() == expected.to_dict()


def test_without_need_of_weights_their_files_are_not_touched(folder: Path) -> None:
    """A checkpoint brings them: the folder needs its configuration only."""
    case = LoadCase("bert-masked", "bert-masked", task="sequence_classification")
    arguments = (section_of(case, folder), TASKS[case.task], facts_of(case, folder), SEED)
    expected, _ = build_model(*arguments)
    (folder / case.source / "model.safetensors").unlink()
    model, weights = build_model(*arguments, needs_weights=False)
    assert (weights.stored, weights.whole, weights.made) == ({}, {}, [])
    assert all(parameter.is_meta for parameter in model.parameters())
    buffers = dict(expected.named_buffers())
    assert buffers
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    with pytest.raises(RefusedForSecurityError, match=r"no \*.safetensors"):
        build_model(*arguments)


def test_a_pooler_of_other_names_is_no_pooler_of_another_task(folder: Path) -> None:
    """BERT's head reads its pooler: values that do not fit it must not be left out for fresh ones."""

    def rename(values: dict[str, torch.Tensor]) -> None:
        values["bert.pooler.linear.weight"] = values.pop("bert.pooler.dense.weight")

    tensors(rename)(folder / "bert-labels")
    with pytest.raises(DataError, match=r"bert.pooler.linear.weight has no place in BertForSequenceClassification"):
        load(folder, "bert-labels", "sequence_classification")
