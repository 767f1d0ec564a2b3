"""A checkpoint that DeepSpeed's own `save_checkpoint` wrote under ZeRO 1, 2 or 3, as one tensor source a weight.

ZeRO-3 saves every rank's part of each parameter, one after the other in the order of `param_shapes`; each
part has ceil(n / ranks) elements, the last ones padded. ZeRO-1 and 2 put a group's parameters end to end and
save each rank's stretch of that. Frozen parameters and buffers are saved beside the model.
"""

import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.errors import DataError, MissingInputError, RefusedForSecurityError
from engine.safetensors_file import TensorSource, read_file
from engine.stored_tensors import Flat, StoredTensor, joined_source, whole_source
from engine.torch_archive import TorchFile, read_torch_file

_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_00_model_states\.pt")
_MODEL_KEYS = (
    "module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params",
    "global_steps", "dp_world_size", "mp_world_size", "ds_version",
)  # fmt: skip
_FILES_AT_ONCE = 4


@dataclass(frozen=True)
class DeepSpeedCheckpoint:
    """What a checkpoint holds, by the names it was saved with. Tensors are read when a source is asked for chunks.

    `parameters`: fp32 masters of what was trained; frozen ones as they were kept. `aliases`: names of
    tied weights, each with the name that its values are stored under.
    """

    path: Path
    stage: int
    world_size: int
    step: int
    version: str
    parameters: dict[str, TensorSource]
    buffers: dict[str, TensorSource]
    aliases: dict[str, str]


def open_deepspeed(folder: Path, tag: str | None = None) -> DeepSpeedCheckpoint:
    """Open the checkpoint `tag` (default: the one that `latest` names) of `folder`.

    Raises MissingInputError when there is none, DataError when files are missing, damaged, of different
    steps or numbers of ranks, or of a kind that is not read, RefusedForSecurityError as `read_torch_file` does.
    """
    path = folder / (tag or _latest(folder))
    if not path.is_dir():
        there = ", ".join(sorted(entry.name for entry in folder.iterdir() if entry.is_dir())) or "no folder"
        raise MissingInputError(f"{path}: no such checkpoint; there is {there}")
    optimizer_paths, model_paths = _files(path)
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        optimizers = list(pool.map(partial(read_torch_file, keys=("optimizer_state_dict",)), optimizer_paths))
        models = list(pool.map(partial(read_torch_file, keys=_MODEL_KEYS), model_paths))
    stage, flats, paddings = _check_optimizers(optimizers)
    step = _check_models(models, stage, len(optimizers))
    first = models[0]
    shapes = [_shapes(first, group) for group in _field(first, "param_shapes", list)]
    if stage == 3:
        parameters = _partitioned(first.path, shapes, flats) | _frozen_partitions(models)
    else:
        parameters = _flat_groups(first.path, shapes, flats, paddings)
        parameters |= _kept_whole(first, parameters)
    module, names = _field(first, "module", dict), _field(first, "buffer_names", list)
    buffers = {name: whole_source(name, _stored(first, module.get(name), name)) for name in names}
    shared = _field(first, "shared_params", dict)
    aliases = {name: kept for name, kept in shared.items() if kept in parameters}
    version = str(first.values.get("ds_version"))
    return DeepSpeedCheckpoint(path, stage, len(optimizers), step, version, parameters, buffers, aliases)


def _latest(folder: Path) -> str:
    path = folder / "latest"
    if not path.exists():
        raise MissingInputError(
            f"{folder}: not a DeepSpeed checkpoint: it holds no file `latest`; name the folder that does, or --tag"
        )
    tag = read_file(path, 4096).decode("utf-8", "replace").strip()
    if not tag or tag in (".", "..") or "/" in tag or "\0" in tag:
        raise RefusedForSecurityError(f"{path}: names {tag[:100]!a}, which is not a folder beside it")
    return tag


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """The files of all ranks' optimizer states and model states, in the order of the ranks."""
    found: tuple[dict[int, Path], dict[int, Path]] = {}, {}
    for entry in sorted(path.glob("*_states.pt")):
        for pattern, files in zip((_OPTIMIZER_FILE, _MODEL_FILE), found, strict=True):
            if match := pattern.fullmatch(entry.name):
                rank = int(match[1] or 0)
                if rank in files:
                    raise DataError(f"{path}: both {files[rank].name} and {entry.name}: which one is of rank {rank}?")
                files[rank] = entry
                break
        else:
            raise DataError(f"{entry}: of tensor, pipeline or expert parallelism, which import does not put together")
    for files, kind in zip(found, ("*_optim_states.pt", "*_model_states.pt"), strict=True):
        if not files:
            raise DataError(f"{path}: holds no {kind}: not a ZeRO checkpoint, or saved without that part")
        if missing := sorted(set(range(max(files) + 1)) - files.keys()):
            raise DataError(f"{path}: rank {missing[0]}'s {kind} is missing ({len(missing)} in all)")
    optimizers, models = ([files[rank] for rank in sorted(files)] for files in found)
    return optimizers, models


def _check_optimizers(files: Sequence[TorchFile]) -> tuple[int, list[list[StoredTensor]], list[list[int]] | None]:
    """The ZeRO stage, every rank's flat groups, and what lies between parameters (ZeRO-1 and 2)."""
    stages, steps, flats, paddings = [], [], [], []
    for file in files:
        _check_own_name(file)
        state = _field(file, "optimizer_state_dict", dict)
        key = "fp32_flat_groups" if "fp32_flat_groups" in state else "single_partition_of_fp32_groups"
        if not isinstance(groups := state.get(key), list):
            raise DataError(f"{file.path}: not of ZeRO 1, 2 or 3: it holds no fp32 partitions")
        # DeepSpeed's optimizer for bf16 under ZeRO-1 does not say which stage it is.
        stages.append(state.get("zero_stage", 1))
        counts = state.get("partition_count")
        for count in counts if isinstance(counts, list) else [counts]:
            if count != len(files):
                raise DataError(f"{file.path}: written by {count} ranks, but {len(files)} files of ranks are here")
        flats.append([_stored(file, tensor, key) for tensor in groups])
        paddings.append(state.get("param_alignment_paddings"))
        steps.append(max(_steps(state.get("base_optimizer_state", state.get("optimizer_state_dict"))), default=None))
    for values, what in ((stages, "ZeRO stage"), (steps, "step"), (paddings, "alignment")):
        for file, value in zip(files, values, strict=True):
            if value != values[0]:
                raise DataError(f"{file.path}: of {what} {value}, but {files[0].path.name} is of {what} {values[0]}")
    if stages[0] not in (1, 2, 3):
        raise DataError(f"{files[0].path}: of an unknown ZeRO stage")
    if len({len(groups) for groups in flats}) != 1:
        raise DataError(f"{files[0].path.parent}: the ranks have different numbers of parameter groups")
    return stages[0], flats, paddings[0]


def _steps(state: Any) -> Iterator[int]:
    """The optimizer's counts of steps, wherever they are: numbers, or tensors of one element."""
    if isinstance(state, list):
        for item in state:
            yield from _steps(item)
    elif isinstance(state, dict):
        for key, item in state.items():
            if key == "step" and isinstance(item, int | float):
                yield int(item)
            elif key == "step" and isinstance(item, StoredTensor) and item.count == 1:
                yield int(next(whole_source("step", item).chunks()))
            else:
                yield from _steps(item)


def _check_models(files: Sequence[TorchFile], stage: int, world_size: int) -> int:
    """The step of the checkpoint; DataError unless the model files are those of these ranks, of one step."""
    if len(files) != (world_size if stage == 3 else 1):
        raise DataError(
            f"{files[0].path.parent}: ZeRO-{stage} with {world_size} ranks, but {len(files)} *_model_states.pt"
        )
    steps: list[int] = [_field(file, "global_steps", int) for file in files]
    for file, step in zip(files, steps, strict=True):
        _check_own_name(file)
        if step != steps[0]:
            raise DataError(f"{file.path}: of step {step}, but {files[0].path.name} is of step {steps[0]}")
        if file.values.get("mp_world_size", 1) != 1:
            raise DataError(f"{file.path}: of tensor parallelism, which import does not put together")
        if file.values.get("dp_world_size", world_size) != world_size:
            count = file.values["dp_world_size"]
            raise DataError(f"{file.path}: written by {count} ranks, but {world_size} files of ranks are here")
        for key in ("param_shapes", "frozen_param_shapes", "buffer_names"):
            if file.values.get(key) != files[0].values.get(key):
                raise DataError(f"{file.path}: of another model than {files[0].path.name} ({key})")
    return steps[0]


def _check_own_name(file: TorchFile) -> None:
    """torch.save puts the file's name into it, so one that stands in for another is noticed."""
    if file.root not in ("archive", file.path.stem):
        raise DataError(f"{file.path}: was written as {file.root[:100]!a}: it is not where it belongs")


def _field(file: TorchFile, key: str, kind: type) -> Any:
    value = file.values.get(key)
    if type(value) is not kind:
        raise DataError(f"{file.path}: not a file of a ZeRO checkpoint: it has no {key}")
    return value


def _stored(file: TorchFile, value: Any, name: str) -> StoredTensor:
    if not isinstance(value, StoredTensor):
        raise DataError(f"{file.path}: {name[:200]!a} should be a tensor")
    return value


def _shapes(file: TorchFile, values: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(values, dict) or not all(
        isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape) for shape in values.values()
    ):
        raise DataError(f"{file.path}: shapes of parameters should be lists of sizes")
    return {name: tuple(shape) for name, shape in values.items()}


def _partitioned(
    path: Path, groups: Sequence[dict[str, tuple[int, ...]]], flats: Sequence[Sequence[StoredTensor]]
) -> dict[str, TensorSource]:
    """ZeRO-3: each rank's parts of all parameters stand one after the other in its flat groups."""
    ranks = [Flat(pieces) for pieces in flats]
    sources, start = {}, 0
    for name, shape in [item for group in groups for item in group.items()]:
        stop = start + -(-math.prod(shape) // len(ranks))
        if stop > min(rank.count for rank in ranks):
            raise DataError(f"{path}: {name[:200]!a} lies beyond the end of the ranks' partitions")
        sources[name] = joined_source(name, shape, [piece for rank in ranks for piece in rank.cut(start, stop)], path)
        start = stop
    for rank, pieces in zip(ranks, flats, strict=True):
        if rank.count != start:
            raise DataError(f"{pieces[0].path}: holds {rank.count} elements, the model's parameters need {start}")
    return sources


def _frozen_partitions(files: Sequence[TorchFile]) -> dict[str, TensorSource]:
    """ZeRO-3: each rank's file has its part of every frozen parameter."""
    first = files[0]
    shapes = _shapes(first, first.values.get("frozen_param_shapes") or {})
    sources = {}
    for name, shape in shapes.items():
        parts = [_stored(file, (file.values.get("frozen_param_fragments") or {}).get(name), name) for file in files]
        if len({part.count for part in parts}) != 1 or parts[0].count != -(-math.prod(shape) // len(files)):
            raise DataError(f"{first.path}: the ranks' parts of {name[:200]!a} do not make its shape {shape}")
        sources[name] = joined_source(name, shape, parts, first.path)
    return sources


def _flat_groups(
    path: Path,
    groups: Sequence[dict[str, tuple[int, ...]]],
    flats: Sequence[Sequence[StoredTensor]],
    paddings: Any,
) -> dict[str, TensorSource]:
    """ZeRO-1 and 2: a group's parameters stand end to end, each rank has a stretch of that."""
    if len(groups) != len(flats[0]):
        raise DataError(f"{path}: {len(groups)} groups of parameters, but {len(flats[0])} of masters")
    sources = {}
    for index, shapes in enumerate(groups):
        flat = Flat([pieces[index] for pieces in flats])
        between = paddings[index] if paddings is not None else [0] * len(shapes)
        start = 0
        for (name, shape), padding in zip(shapes.items(), between, strict=True):
            stop = start + math.prod(shape)
            sources[name] = joined_source(name, shape, list(flat.cut(start, min(stop, flat.count))), path)
            start = stop + padding
        # Groups are padded to a multiple of twice the ranks; whether that is saved depends on the version.
        align = 2 * len(flats)
        if -(-start // align) != -(-flat.count // align):
            raise DataError(f"{path}: group {index} has {flat.count} elements, its parameters need {start}")
    return sources


def _kept_whole(file: TorchFile, trained: dict[str, TensorSource]) -> dict[str, TensorSource]:
    """ZeRO-1 and 2: what is neither trained nor a buffer nor another name of it, from the model itself."""
    known = {*trained, *_field(file, "buffer_names", list), *_field(file, "shared_params", dict)}
    module = _field(file, "module", dict)
    return {name: whole_source(name, _stored(file, value, name)) for name, value in module.items() if name not in known}
