"""A checkpoint that DeepSpeed's own `save_checkpoint` wrote under ZeRO 1, 2 or 3, as one tensor source a weight.

ZeRO-3 saves every rank's part of each parameter, one after the other in the order of the parameters; each
part has ceil(n / ranks) elements, the last ones padded. ZeRO-1 and 2 put a group's parameters end to end and
save each rank's stretch of that. Frozen parameters and buffers are saved beside the model.
"""

import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engine.deepspeed_import.files import ModelFile, OptimizerFile, read_model_file, read_optimizer_file
from engine.deepspeed_import.stored_tensors import Flat, StoredTensor, joined_source, verify_storages, whole_source
from engine.errors import DataError, MissingInputError, RefusedForSecurityError
from engine.tensor_files.reader import read_file
from engine.tensor_files.writer import TensorSource

_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_00_model_states\.pt")
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
    stored: tuple[StoredTensor, ...]

    @property
    def has_checksums(self) -> bool:
        """Whether damage would be seen: torch records checksums unless it is told not to."""
        return all(tensor.storage.crc32 is not None for tensor in self.stored if tensor.count)

    def verify(self) -> None:
        """Read all that the weights lie in, once. DataError names what is not as it was written."""
        verify_storages(self.stored)


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
        optimizers = list(pool.map(read_optimizer_file, optimizer_paths))
        models = list(pool.map(read_model_file, model_paths))
    stage, world_size, model = optimizers[0].stage, len(optimizers), models[0]
    _check_optimizers(optimizers)
    _check_models(models, stage, world_size)
    if stage == 3:
        parameters = _partitioned(model, optimizers) | _frozen_partitions(models)
    else:
        parameters = _flat_groups(model, optimizers)
        known = {*parameters, *model.buffer_names, *model.shared}
        parameters |= {name: whole_source(name, value) for name, value in model.module.items() if name not in known}
    if lost := sorted(set(model.buffer_names) - model.module.keys()):
        raise DataError(f"{model.path}: {lost[0][:200]!a} should be a buffer, but it is not there")
    buffers = {name: whole_source(name, model.module[name]) for name in model.buffer_names}
    aliases = {name: kept for name, kept in model.shared.items() if kept in parameters}
    stored = [tensor for file in optimizers for tensor in file.groups]
    stored += [tensor for file in models for tensor in (*file.module.values(), *file.frozen.values())]
    return DeepSpeedCheckpoint(
        path, stage, world_size, model.step, model.version, parameters, buffers, aliases, tuple(stored)
    )


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
        if len(files) != max(files) + 1:
            missing = next(rank for rank in range(len(files)) if rank not in files)
            raise DataError(f"{path}: rank {missing}'s {kind} is missing")
    optimizers, models = ([files[rank] for rank in sorted(files)] for files in found)
    return optimizers, models


def _check_optimizers(files: Sequence[OptimizerFile]) -> None:
    first = files[0]
    for file in files:
        for count in file.partition_counts:
            if count != len(files):
                raise DataError(f"{file.path}: written by {count} ranks, but files of {len(files)} ranks are here")
        for what, here, there in (
            ("ZeRO stage", file.stage, first.stage),
            ("step", file.step, first.step),
            ("number of groups", len(file.groups), len(first.groups)),
            ("alignment", file.paddings, first.paddings),
        ):
            if here != there:
                raise DataError(f"{file.path}: of {what} {here}, but {first.path.name} is of {what} {there}")


def _check_models(files: Sequence[ModelFile], stage: int, world_size: int) -> None:
    first = files[0]
    if len(files) != (world_size if stage == 3 else 1):
        raise DataError(f"{first.path.parent}: ZeRO-{stage} of {world_size} ranks, but {len(files)} *_model_states.pt")
    for file in files:
        if file.step != first.step:
            raise DataError(f"{file.path}: of step {file.step}, but {first.path.name} is of step {first.step}")
        if file.model_parallel_size != 1:
            raise DataError(f"{file.path}: of tensor parallelism, which import does not put together")
        if file.world_size not in (None, world_size):
            raise DataError(
                f"{file.path}: written by {file.world_size} ranks, but files of {world_size} ranks are here"
            )
        for here, there in ((file.shapes, first.shapes), (file.frozen_shapes, first.frozen_shapes)):
            if here != there:
                raise DataError(f"{file.path}: of another model than {first.path.name}: its parameters differ")


def _partitioned(model: ModelFile, optimizers: Sequence[OptimizerFile]) -> dict[str, TensorSource]:
    """ZeRO-3: each rank's parts of all parameters stand one after the other in its groups."""
    ranks = [Flat(file.groups) for file in optimizers]
    sources, start = {}, 0
    for name, shape in [item for shapes in model.shapes for item in shapes.items()]:
        stop = start + -(-math.prod(shape) // len(ranks))
        pieces = [piece for rank in ranks for piece in rank.cut(start, min(stop, rank.count))]
        sources[name] = joined_source(name, shape, pieces, model.path)
        start = stop
    for rank, file in zip(ranks, optimizers, strict=True):
        if rank.count != start:
            raise DataError(f"{file.path}: holds {rank.count} masters, the rank's part of the model has {start}")
    return sources


def _frozen_partitions(files: Sequence[ModelFile]) -> dict[str, TensorSource]:
    """ZeRO-3: each rank's file has its part of every frozen parameter."""
    sources = {}
    for name, shape in files[0].frozen_shapes.items():
        count = -(-math.prod(shape) // len(files))
        for file in files:
            if name not in file.frozen or file.frozen[name].count != count:
                raise DataError(f"{file.path}: its part of {name[:200]!a} should have {count} elements")
        sources[name] = joined_source(name, shape, [file.frozen[name] for file in files], files[0].path)
    return sources


def _flat_groups(model: ModelFile, optimizers: Sequence[OptimizerFile]) -> dict[str, TensorSource]:
    """ZeRO-1 and 2: a group's parameters stand end to end, each rank has a stretch of that."""
    paddings = optimizers[0].paddings or tuple((0,) * len(shapes) for shapes in model.shapes)
    expected = [len(shapes) for shapes in model.shapes]
    if len(optimizers[0].groups) != len(expected) or [len(padding) for padding in paddings] != expected:
        raise DataError(f"{model.path}: has other groups of parameters than {optimizers[0].path.name}")
    sources = {}
    for index, shapes in enumerate(model.shapes):
        flat, start = Flat([file.groups[index] for file in optimizers]), 0
        for (name, shape), padding in zip(shapes.items(), paddings[index], strict=True):
            stop = start + math.prod(shape)
            sources[name] = joined_source(name, shape, list(flat.cut(start, min(stop, flat.count))), model.path)
            start = stop + padding
        # Groups are padded to a multiple of twice the ranks; whether that is saved depends on the optimizer.
        align = 2 * len(optimizers)
        if -(-start // align) != -(-flat.count // align):
            raise DataError(f"{model.path}: group {index} needs {start} masters, but {flat.count} are stored")
    return sources
