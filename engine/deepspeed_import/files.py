"""The two kinds of file that DeepSpeed's `save_checkpoint` writes, each read and checked by itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.deepspeed_import.stored_tensors import StoredTensor, whole_source
from engine.deepspeed_import.torch_archive import TorchFile, read_torch_file
from engine.errors import DataError

Shapes = dict[str, tuple[int, ...]]

_OPTIMIZER_KEYS = ("optimizer_state_dict",)
_MODEL_KEYS = (
    "module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params",
    "global_steps", "dp_world_size", "mp_world_size", "ds_version",
)  # fmt: skip


@dataclass(frozen=True)
class OptimizerFile:
    """One rank's optimizer state: the stage of ZeRO, and the rank's stretch of each group of fp32 masters.

    partition_counts: how many ranks share a group. paddings: under ZeRO-1 and 2, the elements between
    a group's parameters, one number after each; None where there are none. step: what the optimizer counts, if it does.
    """

    path: Path
    stage: int
    partition_counts: tuple[int, ...]
    groups: tuple[StoredTensor, ...]
    paddings: tuple[tuple[int, ...], ...] | None
    step: int | None


@dataclass(frozen=True)
class ModelFile:
    """One rank's model state. `shapes`: of the trained parameters of each group, in the order of the masters.

    module: all weights (ZeRO-1 and 2), or the buffers and empty tensors (ZeRO-3). frozen: the rank's part
    of each frozen parameter. shared: further names of tied weights, each with the first.
    """

    path: Path
    step: int
    world_size: int | None
    model_parallel_size: int
    version: str
    module: dict[str, StoredTensor]
    buffer_names: tuple[str, ...]
    shapes: tuple[Shapes, ...]
    frozen_shapes: Shapes
    frozen: dict[str, StoredTensor]
    shared: dict[str, str]


def read_optimizer_file(path: Path) -> OptimizerFile:
    """Raises DataError and RefusedForSecurityError as `read_torch_file` does; DataError when it is not such a file."""
    file = read_torch_file(path, _OPTIMIZER_KEYS)
    _check_own_name(file)
    state = _dictionary(file, file.values.get("optimizer_state_dict"), "optimizer_state_dict")
    key = "fp32_flat_groups" if "fp32_flat_groups" in state else "single_partition_of_fp32_groups"
    if key not in state:
        raise DataError(f"{path}: not of ZeRO 1, 2 or 3: it holds no fp32 partitions")
    # DeepSpeed's optimizer for bf16 with fp32 accumulation under ZeRO-1 does not say which stage it is.
    stage = _number(file, state.get("zero_stage", 1), "zero_stage")
    if stage not in (1, 2, 3) or (stage == 3) != (key == "fp32_flat_groups"):
        raise DataError(f"{path}: of ZeRO stage {stage}, which does not save {key}")
    counts = state.get("partition_count")
    paddings = state.get("param_alignment_paddings")
    steps = _steps(state.get("base_optimizer_state", state.get("optimizer_state_dict")))
    return OptimizerFile(
        path,
        stage,
        tuple(_number(file, count, "partition_count") for count in (counts if isinstance(counts, list) else [counts])),
        tuple(_tensor(file, tensor, key) for tensor in _list(file, state[key], key)),
        None if paddings is None else tuple(_sizes(file, row) for row in _list(file, paddings, "paddings")),
        max(steps, default=None),
    )


def read_model_file(path: Path) -> ModelFile:
    """Raises DataError and RefusedForSecurityError as `read_torch_file` does; DataError when it is not such a file."""
    file = read_torch_file(path, _MODEL_KEYS)
    _check_own_name(file)
    values = file.values
    world_size = values.get("dp_world_size")
    return ModelFile(
        path,
        _number(file, values.get("global_steps"), "global_steps"),
        None if world_size is None else _number(file, world_size, "dp_world_size"),
        _number(file, values.get("mp_world_size", 1), "mp_world_size"),
        str(values.get("ds_version"))[:100],
        _tensors(file, "module"),
        tuple(_text(file, name, "buffer_names") for name in _list(file, values.get("buffer_names"), "buffer_names")),
        tuple(_shapes(file, group) for group in _list(file, values.get("param_shapes"), "param_shapes")),
        _shapes(file, values.get("frozen_param_shapes") or {}),
        _tensors(file, "frozen_param_fragments", may_lack=True),
        {
            name: _text(file, kept, "shared_params")
            for name, kept in _dictionary(file, values.get("shared_params"), "shared_params").items()
        },
    )


def _check_own_name(file: TorchFile) -> None:
    """torch.save puts the file's name into it, so one that stands in for another is noticed."""
    if file.root not in ("archive", file.path.stem):
        raise DataError(f"{file.path}: was written as {file.root[:100]!a}: it is not where it belongs")


def _wrong(file: TorchFile, what: str) -> DataError:
    return DataError(f"{file.path}: not as DeepSpeed saves it: {what[:200]} is missing or of another kind")


def _dictionary(file: TorchFile, value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(file, what)
    return value


def _list(file: TorchFile, value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(file, what)
    return value


def _number(file: TorchFile, value: Any, what: str) -> int:
    if type(value) is not int or value < 0:
        raise _wrong(file, what)
    return value


def _text(file: TorchFile, value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _wrong(file, what)
    return value


def _sizes(file: TorchFile, value: Any) -> tuple[int, ...]:
    return tuple(_number(file, size, "a size") for size in _list(file, value, "a shape"))


def _shapes(file: TorchFile, value: Any) -> Shapes:
    return {name: _sizes(file, shape) for name, shape in _dictionary(file, value, "shapes").items()}


def _tensor(file: TorchFile, value: Any, what: str) -> StoredTensor:
    if not isinstance(value, StoredTensor):
        raise _wrong(file, what)
    return value


def _tensors(file: TorchFile, key: str, may_lack: bool = False) -> dict[str, StoredTensor]:
    value = file.values.get(key)
    if value is None and may_lack:
        return {}
    return {name: _tensor(file, tensor, name) for name, tensor in _dictionary(file, value, key).items()}


def _steps(state: Any) -> Iterator[int]:
    """The optimizer's counts of steps, wherever they are: numbers, or tensors of one element."""
    if isinstance(state, list):
        for item in state:
            yield from _steps(item)
    elif isinstance(state, dict):
        for key, item in state.items():
            if key == "step" and isinstance(item, StoredTensor) and item.count == 1:
                yield int(next(whole_source("step", item).chunks()))
            elif key == "step" and isinstance(item, int):
                yield item
            else:
                yield from _steps(item)
