"""DeepSpeed's own checkpoints of two ranks become weights and Hugging Face folders, bit by bit what DeepSpeed holds."""

import json
import re
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_worker import export_tokens
from data_fixtures import byte_level_folder
from import_worker import FAMILIES, SETTINGS
from ranks import run_ranks
from repository import WORKERS
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from engine.deepspeed_import.convert import DeepSpeedCheckpoint, import_checkpoint, open_deepspeed
from engine.deepspeed_import.files import _MODEL_KEYS, _OPTIMIZER_KEYS
from engine.deepspeed_import.torch_archive import Opaque, TorchFile, read_torch_file
from engine.errors import CannotWriteError, DataError, MissingInputError, RefusedForSecurityError
from engine.tensor_files.writer import TensorSource
from launcher.cli import main

WORKER = WORKERS / "import_worker.py"
pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that two ranks saved, each with its gathered weights beside it."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, WORKER, str(folder), "save_small_models", "save_families")
    return folder


def whole(source: TensorSource) -> torch.Tensor:
    return torch.cat([torch.empty(0, dtype=source.dtype), *source.chunks()]).view(source.shape)


def all_weights(checkpoint: DeepSpeedCheckpoint) -> dict[str, torch.Tensor]:
    weights = {name: whole(source) for name, source in (checkpoint.parameters | checkpoint.buffers).items()}
    return weights | {name: weights[kept] for name, kept in checkpoint.aliases.items()}


@pytest.mark.parametrize("name", [*SETTINGS, *FAMILIES])
def test_weights_equal_those_gathered_by_deepspeed(saved: Path, name: str) -> None:
    checkpoint = open_deepspeed(saved / name)
    setting = SETTINGS[FAMILIES.get(name, name)]
    assert (checkpoint.stage, checkpoint.world_size, checkpoint.version) == (setting.stage, 2, "0.19.8")
    assert checkpoint.path.name == f"global_step{checkpoint.step}"
    gathered = load_file(saved / f"{name}.safetensors")
    weights = all_weights(checkpoint)
    assert weights.keys() - checkpoint.aliases.keys() == gathered.keys()
    for weight, expected in gathered.items():
        assert weights[weight].dtype == expected.dtype
        assert torch.equal(weights[weight], expected), weight
    if name in SETTINGS:
        assert checkpoint.aliases == {"model.output.weight": "model.embedding.weight"}
        assert checkpoint.buffers.keys() == {"model.calibration", "model.seen"}


@pytest.mark.parametrize("name", [*SETTINGS, *FAMILIES])
def test_weights_equal_those_of_deepspeeds_own_script(saved: Path, name: str) -> None:
    """It leaves out what is frozen under ZeRO-1, and does not take DeepSpeed's optimizer for fp32 accumulation."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if name == "zero1-fp32-accumulation":
        with pytest.raises(ValueError, match="not a zero checkpoint"):
            get_fp32_state_dict_from_zero_checkpoint(str(saved / name))
        return
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(saved / name))
    ours = all_weights(open_deepspeed(saved / name))
    left_out = {weight for weight in ours if "frozen" in weight} if name in ("zero1", "zero1-offload") else set()
    assert theirs.keys() == ours.keys() - left_out
    for weight, expected in theirs.items():
        assert torch.equal(ours[weight].to(expected.dtype), expected), weight


def model_class(family: str) -> type:
    return AutoModelForSequenceClassification if family.endswith("classification") else AutoModelForCausalLM


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=export_tokens()).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_imported_folder_computes_what_the_gathered_weights_compute(
    saved: Path, tmp_path: Path, family: str, dtype: str
) -> None:
    folder, out = saved / f"{family}-model", tmp_path / "out"
    assert main(["import", str(saved / family), str(out), "--model", str(folder), "--dtype", dtype]) == 0
    kind = getattr(torch, dtype)
    model, info = model_class(family).from_pretrained(out, dtype=kind, output_loading_info=True, local_files_only=True)
    assert {key: value for key, value in info.items() if value} == {}

    expected = model_class(family).from_config(AutoConfig.from_pretrained(folder))
    gathered = load_file(saved / f"{family}.safetensors")
    for name, parameter in expected.named_parameters():
        parameter.data = gathered[f"model.{name}"].to(kind)
    expected.tie_weights()
    assert torch.equal(logits(model), logits(expected.to(kind)))
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    if dtype == "bfloat16" and family in ("llama", "gpt2", "mixtral"):  # no biases, which ZeRO-3 rounds apart
        assert torch.equal(logits(model), load_file(saved / f"{family}-engine.safetensors")["logits"])


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_transformers_trainer_gives_the_weights_that_it_saved_itself(
    tmp_path: Path, stage: int
) -> None:
    pytest.importorskip("accelerate")
    run_ranks(2, WORKER.with_name("trainer_worker.py"), str(stage), str(tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoint-2"
    assert main(["import", str(folder), str(tmp_path / "out"), "--model", str(folder)]) == 0
    theirs, ours = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert theirs.keys() == ours.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight.bfloat16()), name


def test_tag_shards_and_tokenizer(saved: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(saved / "llama", tmp_path / "checkpoint"))
    (checkpoint / "latest").unlink()
    model = Path(shutil.copytree(saved / "llama-model", tmp_path / "model"))
    byte_level_folder(model)
    for name in ("modeling_llama.py", "pytorch_model.bin"):
        (model / name).write_text(name)
    with pytest.raises(MissingInputError, match="latest"):
        import_checkpoint(checkpoint, tmp_path / "out", model)
    with pytest.raises(MissingInputError, match="global_step7: no such checkpoint; there is global_step2"):
        import_checkpoint(checkpoint, tmp_path / "out", model, tag="global_step7")
    import_checkpoint(checkpoint, tmp_path / "out", model, tag="global_step2", max_shard_bytes=4000)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    shards = {name for name in names if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name)}
    assert len(shards) > 2
    assert names - shards == {
        "config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["architectures"], values["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)


def test_what_is_not_of_the_model_is_named(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "exports" / "out"
    model = Path(shutil.copytree(saved / "llama-model", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    for changes, message in (
        ({"vocab_size": 38}, r"embed_tokens.weight has shape \(37, 16\) in the checkpoint and \(38, 16\) in the model"),
        ({"num_hidden_layers": 3}, r"model.layers.2.\S+ is not in the checkpoint; .* and 5 more"),
        ({"num_hidden_layers": 1}, r"model.layers.1.\S+ is not in the model; .* and 5 more"),
        ({"tie_word_embeddings": True}, "are one weight in the model, but were trained as two"),
        ({"architectures": None}, "needs the class of the trained model"),
        ({"architectures": ["GPT2LMHeadModel"]}, "describes a llama model"),
    ):
        (model / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(DataError, match=message):
            import_checkpoint(saved / "llama", out, model)
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "a.B"}, "model_type": "mine"}))
    with pytest.raises(RefusedForSecurityError, match="its own code"):
        import_checkpoint(saved / "llama", out, model)
    assert not out.parent.exists()
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(CannotWriteError, match="not an empty folder"):
        import_checkpoint(saved / "llama", out, saved / "llama-model")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_checkpoints_with_missing_or_foreign_files_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    def copied() -> Path:
        shutil.rmtree(tmp_path / "it", ignore_errors=True)
        return Path(shutil.copytree(saved / name, tmp_path / "it")) / "global_step3"

    def refused(folder: Path, message: str) -> None:
        with pytest.raises(DataError, match=message):
            open_deepspeed(folder.parent)

    for file in [path.name for path in copied().glob("*.pt")]:
        folder = copied()
        (folder / file).unlink()
        refused(folder, "missing|holds no")
        folder = copied()
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: len(data) // 2])
        refused(folder, f"{file}: truncated")
        (folder / file).write_bytes(b"")
        refused(folder, f"{file}: not written by torch.save")

    first, second = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    folder = copied()
    (folder / first).rename(folder / "other")
    (folder / second).rename(folder / first)
    (folder / "other").rename(folder / second)
    refused(folder, f"{first}: was written as '{second[:-3]}'")

    folder = copied()
    shutil.copy(folder / first, folder / first.replace("rank_0_", "rank_2_"))
    refused(folder, "was written as|written by 2 ranks, but files of 3 ranks")
    (folder / first.replace("rank_0_", "rank_2_")).rename(folder / first.removeprefix("bf16_"))
    refused(folder, "which one is of rank 0")
    folder = copied()
    (folder / "expp_rank_0_mp_rank_00_optim_states.pt").touch()
    refused(folder, "expert parallelism")
    (folder / "expp_rank_0_mp_rank_00_optim_states.pt").rename(folder / "mp_rank_01_model_states.pt")
    refused(folder, "tensor, pipeline or expert parallelism")


@pytest.mark.parametrize("name", ["llama", "qwen2", "bert-classification"])
def test_a_flipped_bit_in_any_weight_is_seen(saved: Path, tmp_path: Path, name: str) -> None:
    """torch.load takes such files without a word."""
    folder = Path(shutil.copytree(saved / name, tmp_path / "it"))
    tensors = {tensor.storage: tensor for tensor in open_deepspeed(folder).stored if tensor.count}
    assert len(tensors) > 3
    for storage, tensor in list(tensors.items())[:: 1 + len(tensors) // 6]:
        data = storage.path.read_bytes()
        place = tensor.offset_bytes + tensor.count * tensor.dtype.itemsize // 2
        changed = bytearray(data)
        changed[place] ^= 16
        storage.path.write_bytes(changed)
        torch.load(storage.path, weights_only=False)
        with pytest.raises(DataError, match=f"{storage.path.name}: damaged: bytes {storage.begin} to {storage.end}"):
            import_checkpoint(folder, tmp_path / "out", saved / f"{name}-model")
        assert not (tmp_path / "out").exists()
        storage.path.write_bytes(data)
    open_deepspeed(folder).verify()


def test_ranks_of_different_steps_and_numbers_are_refused(saved: Path, tmp_path: Path) -> None:
    """llama has two steps and mixtral none, so their files take the place of one in other checkpoints."""
    optimizer = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    for name, other, file, message in (
        ("zero3-offload", "llama/global_step2", optimizer, "of step 2, but bf16_zero_pp_rank_0.* is of step 3"),
        ("zero3", "qwen2/global_step2", optimizer, "of step 2, but"),
        ("zero2", "gpt2/global_step2", optimizer, "of step 2, but"),
        ("zero2", "zero1/global_step3", optimizer, "of ZeRO stage 1, but"),
        ("zero3", "llama/global_step2", "zero_pp_rank_1_mp_rank_00_model_states.pt", "of step 2, but zero_pp_rank_0"),
        ("zero2", "gpt2/global_step2", "mp_rank_00_model_states.pt", "has other groups of parameters"),
        ("zero3", "zero3-offload/global_step3", None, None),
    ):  # fmt: skip
        folder = tmp_path / "it"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved / name, folder)
        if file is None:
            open_deepspeed(folder)
            continue
        shutil.copy(saved / other / file, folder / "global_step3" / file)
        with pytest.raises(DataError, match=message):
            open_deepspeed(folder)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every dictionary or list in a value, with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


@pytest.mark.parametrize("name", ["zero2-aligned", "zero3"])
def test_nonsense_anywhere_is_an_error_for_a_person(saved: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Every value of every file in turn becomes something else; only our own errors or the same weights may come of it."""
    files = {
        path: read_torch_file(path, (*_MODEL_KEYS, *_OPTIMIZER_KEYS))
        for path in (saved / name / "global_step3").glob("*.pt")
    }
    expected = load_file(saved / f"{name}.safetensors")
    outcomes = {"taken": 0, "refused": 0}
    for path, file in files.items():
        for number, _ in enumerate(places(file.values)):
            for nonsense in (None, -3, 10**9, "x", [[]], {"x": {}}, Opaque()):
                changed: TorchFile = replace(file, values=deepcopy(file.values))
                where, key = list(places(changed.values))[number]
                where[key] = nonsense
                given = files | {path: changed}
                monkeypatch.setattr("engine.deepspeed_import.files.read_torch_file", lambda path, keys: given[path])  # noqa: B023
                try:
                    weights = all_weights(open_deepspeed(saved / name))
                    assert all(torch.equal(weights[key], expected[key]) for key in weights.keys() & expected.keys())
                    outcomes["taken"] += 1
                except DataError as error:
                    assert "global_step3" in str(error)
                    outcomes["refused"] += 1
    assert min(outcomes.values()) > 100
