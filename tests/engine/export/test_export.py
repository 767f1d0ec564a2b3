"""Export: the folder loads with transformers alone and computes what the gathered weights compute."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoint_worker import LIVE_SHARD_BYTES, export_tokens
from data_fixtures import byte_level_folder
from ranks import ROOT, run_ranks
from repository import WORKERS
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from engine.checkpoint.format import FORMAT, MANIFEST, STATE, describe, seal
from engine.errors import CannotWriteError, ConfigError, DataError, MissingInputError, StorageError
from engine.export.from_checkpoint import export_checkpoint, resolve_checkpoint
from engine.tensor_files.reader import BLOCK_BYTES
from engine.tensor_files.slices import KINDS
from engine.tensor_files.writer import TensorSource, tensor_chunks, write_file, write_safetensors

WORKER = WORKERS / "checkpoint_worker.py"
FAMILIES = ("llama", "gpt2", "qwen2", "t5-classification", "bert-classification", "mixtral")
pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each family a run folder written by two ranks, and its masters gathered by DeepSpeed."""
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(2, WORKER, str(folder), "export")
    run_ranks(3, WORKER, str(folder), "live")
    return folder


def auto_class(family: str) -> type:
    return AutoModelForSequenceClassification if family.endswith("classification") else AutoModelForCausalLM


def load_alone(folder: Path, family: str, dtype: torch.dtype) -> torch.nn.Module:
    model, info = auto_class(family).from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=export_tokens()).logits


def reference(trained: Path, family: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model built from its configuration, with the gathered masters put in by name."""
    config = AutoConfig.from_pretrained(trained / family / "model")
    model = auto_class(family).from_config(config)
    weights = load_file(trained / f"{family}.safetensors")
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        assert parameter.shape == weights[name].shape
        parameter.data = weights[name].to(dtype)
    model.tie_weights()
    return model.to(dtype).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exported_model_computes_what_the_gathered_weights_compute(
    trained: Path, tmp_path: Path, family: str, dtype: str
) -> None:
    run_dir = trained / family
    export_checkpoint(resolve_checkpoint(run_dir), run_dir / "model", None, tmp_path / "out", dtype)
    model = load_alone(tmp_path / "out", family, getattr(torch, dtype))
    expected = reference(trained, family, getattr(torch, dtype))
    assert torch.equal(logits(model), logits(expected))
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["architectures"] == [type(model).__name__]
    assert values["dtype"] == dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_engine(trained: Path, tmp_path: Path, family: str) -> None:
    """The engine itself was asked, on two ranks with partitioned bf16 weights, when it saved.

    Under ZeRO-3 DeepSpeed's own linear layer rounds once more, to bf16, before it adds a bias.
    """
    run_dir = trained / family
    export_checkpoint(resolve_checkpoint(run_dir), run_dir / "model", None, tmp_path / "out", "bfloat16")
    theirs = load_file(trained / f"{family}-engine.safetensors")["logits"]
    ours = logits(load_alone(tmp_path / "out", family, torch.bfloat16))
    if family in ("llama", "gpt2", "mixtral"):  # no biases in linear layers
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-8)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
def test_what_all_ranks_write_together_is_what_one_process_exports(trained: Path, tmp_path: Path, family: str) -> None:
    """Byte for byte, in the same shards: tied and frozen weights, buffers, labels, configuration, card."""
    run_dir = trained / family
    checkpoint = resolve_checkpoint(run_dir)
    for live, dtype in (("live", "bfloat16"), ("live-3-bfloat16", "bfloat16"), ("live-3-float32", "float32")):
        if not (run_dir / live).exists():
            assert live != "live"
            continue
        export_checkpoint(checkpoint, run_dir / "model", None, tmp_path / live, dtype, LIVE_SHARD_BYTES, "card")
        ours = folder_bytes(tmp_path / live)
        assert len([name for name in ours if name.endswith(".safetensors")]) > 2
        assert folder_bytes(run_dir / live) == ours


def test_a_family_of_another_layout_is_left_to_the_checkpoints_export(trained: Path) -> None:
    assert not (trained / "mixtral" / "live").exists()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_the_disk_did_not_keep_is_not_published(trained: Path, rank: int) -> None:
    run_dir = trained / "llama"
    failed, taken = json.loads((run_dir / f"live-{rank}.json").read_text())
    assert (failed[0], failed[2]) == ("StorageError", 74)
    assert "model.safetensors: bytes " in failed[1]
    assert "are not what was written" in failed[1]
    assert (taken[0], taken[2]) == ("CannotWriteError", 73)
    assert not (run_dir / "damaged").exists()
    assert not list(run_dir.glob(".tmp-*"))


@pytest.mark.parametrize("family", ["llama", "t5-classification"])
def test_half_precision_is_the_masters_rounded_once(trained: Path, tmp_path: Path, family: str) -> None:
    """Of T5, transformers opens some modules in fp32 all the same: the forward check must not mistake that."""
    run_dir = trained / family
    export_checkpoint(resolve_checkpoint(run_dir), run_dir / "model", None, tmp_path / "out", "float16")
    stored, masters = load_file(tmp_path / "out" / "model.safetensors"), load_file(trained / f"{family}.safetensors")
    assert stored
    for name, value in stored.items():
        assert value.dtype == torch.float16
        assert torch.equal(value, masters[name].half()), name


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "t5-classification"])
def test_tied_weights_are_written_once_under_the_name_transformers_writes(
    trained: Path, tmp_path: Path, family: str
) -> None:
    run_dir = trained / family
    export_checkpoint(resolve_checkpoint(run_dir), run_dir / "model", None, tmp_path / "out", "float32")
    reference(trained, family, torch.float32).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_shards_hold_at_most_their_limit_and_load(trained: Path, tmp_path: Path) -> None:
    run_dir = trained / "llama"
    export_checkpoint(resolve_checkpoint(run_dir), run_dir / "model", None, tmp_path / "out", "float32", 4000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {name: file.name for file in shards for name in load_file(file)}
    assert index["weight_map"] == stored
    sizes = {file: sum(tensor.nbytes for tensor in load_file(file).values()) for file in shards}
    assert max(sizes.values()) <= 4000
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert torch.equal(
        logits(load_alone(tmp_path / "out", "llama", torch.float32)),
        logits(reference(trained, "llama", torch.float32)),
    )


def test_labels_generation_config_and_tokenizer_travel_and_code_does_not(trained: Path, tmp_path: Path) -> None:
    tokenizer = byte_level_folder(tmp_path / "tokenizer")
    for name in ("spiece.model", "chat_template.jinja"):
        (tokenizer / name).write_text(name)
    for name in ("modeling.py", "model.safetensors", "config.json"):
        (tokenizer / name).write_text("must stay")
    for family in ("llama", "bert-classification"):
        run_dir = trained / family
        export_checkpoint(resolve_checkpoint(run_dir), run_dir / "model", tokenizer, tmp_path / family)
    assert sorted(path.name for path in (tmp_path / "llama").iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "spiece.model",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    config = AutoConfig.from_pretrained(tmp_path / "bert-classification")
    assert config.id2label == {0: "bad", 1: "good"}
    assert config.dtype == torch.bfloat16
    values = json.loads((tmp_path / "llama" / "tokenizer_config.json").read_text())
    assert values["chat_template"] == "chat_template.jinja"  # where transformers 4.45 looks for it


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained / "llama", run_dir)
    checkpoint, model_dir, out = resolve_checkpoint(run_dir), run_dir / "model", tmp_path / "exports" / "out"

    with pytest.raises(DataError, match="describes a gpt2 model"):
        export_checkpoint(checkpoint, trained / "gpt2" / "model", None, out)
    larger = shutil.copytree(model_dir, tmp_path / "larger") / "config.json"
    larger.write_text(larger.read_text().replace('"vocab_size": 37', '"vocab_size": 38'))
    with pytest.raises(DataError, match=r"lm_head.weight has shape \(37, 16\) in the checkpoint and \(38, 16\)"):
        export_checkpoint(checkpoint, larger.parent, None, out)
    with pytest.raises(ConfigError, match="bfloat16"):
        export_checkpoint(checkpoint, model_dir, None, out, "int8")
    with pytest.raises(MissingInputError, match=r"config\.json"):
        export_checkpoint(checkpoint, tmp_path, None, out)
    victim = next(checkpoint.glob("slices-*"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 4] ^= 1
    victim.write_bytes(data)
    with pytest.raises(DataError, match=victim.name):
        export_checkpoint(checkpoint, model_dir, None, out)
    assert not out.parent.exists() or not any(out.parent.iterdir())

    out.mkdir(parents=True)
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(CannotWriteError, match="not an empty folder"):
        export_checkpoint(checkpoint, model_dir, None, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def large_checkpoint(run_dir: Path, layers: int) -> Path:
    """A checkpoint as one rank writes it, of a Llama whose layers hold 25 MB each in fp32; its moments are zero."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=3328, num_hidden_layers=layers, num_attention_heads=8
    )
    config.save_pretrained(run_dir / "model")
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    folder = run_dir / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    file = "slices-00000-of-00001.safetensors"
    flat = {name: value.detach().view(-1) for name, value in model.named_parameters()}
    sources = [
        TensorSource(f"{kind}/{name}", torch.float32, (len(value),), partial(tensor_chunks, given))
        for kind in KINDS
        for name, value in flat.items()
        for given in [value if kind == "master" else torch.zeros(1).expand(len(value))]
    ]
    records = [write_safetensors(folder / file, sources), write_file(folder / STATE, b"{}")]
    fields = {
        "format": FORMAT, "step": 1, "optimizer_steps": 1, "run_id": "", "architecture": "LlamaForCausalLM",
        "block_bytes": BLOCK_BYTES, "frozen": {}, "buffers": {},
        "trained": {name: describe(torch.float32, tuple(value.shape)) for name, value in model.named_parameters()},
        "slices": {file: [(name, 0, len(value)) for name, value in flat.items()]},
        "files": {record.name: [record.size_bytes, record.blocks] for record in records},
    }  # fmt: skip
    write_file(folder / MANIFEST, seal(fields).encode())
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.long)])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, dtype: str) -> None:
    """Models of 200 and 400 MB in fp32, exported by processes of their own: the same few chunks at a time."""
    peaks = []
    for layers in (8, 16):
        checkpoint = large_checkpoint(tmp_path / str(layers), layers)
        script, out = WORKERS / "export_memory.py", tmp_path / f"{layers}-out"
        command = [sys.executable, script, checkpoint, tmp_path / str(layers) / "model", out, dtype]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout.split()[-1]))
        size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        assert size > layers * 12_000_000
    assert max(peaks) < 400
    assert peaks[1] < peaks[0] + 60


def test_an_export_killed_before_it_is_published_is_not_there_and_a_later_one_is(trained: Path, tmp_path: Path) -> None:
    run_dir, out = trained / "llama", tmp_path / "out"
    program = (
        "import os, sys, engine.export.from_checkpoint as export\n"
        "from pathlib import Path\n"
        "checkpoint, model, out = map(Path, sys.argv[1:])\n"
        "export.copy_files = lambda *_: os.kill(os.getpid(), 9)\n"
        "export.export_checkpoint(checkpoint, model, None, out)\n"
    )
    arguments = (resolve_checkpoint(run_dir), run_dir / "model", out)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program, *arguments], env=environment, check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".tmp-out-")
    assert (left / "model.safetensors").is_file()
    export_checkpoint(*arguments[:2], None, out)
    load_alone(out, "llama", torch.bfloat16)


def test_a_bit_that_the_disk_does_not_keep_is_found_before_anything_is_published(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-3] ^= 16
        path.write_bytes(data)

    monkeypatch.setattr("engine.export.folder.drop_cache", spoil)
    run_dir = trained / "gpt2"
    with pytest.raises(StorageError, match=r"model\.safetensors: damaged.*nothing was published"):
        export_checkpoint(resolve_checkpoint(run_dir), run_dir / "model", None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_resolve_names_what_there_is(trained: Path) -> None:
    assert resolve_checkpoint(trained / "llama", step=1).name == "step-00000001"
    with pytest.raises(MissingInputError, match="of step 5; there are those of steps 1"):
        resolve_checkpoint(trained / "llama", step=5)
    with pytest.raises(MissingInputError, match="marked as best"):
        resolve_checkpoint(trained / "llama", best=True)
    with pytest.raises(MissingInputError, match="none at all"):
        resolve_checkpoint(trained / "nothing")
