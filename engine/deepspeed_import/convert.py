"""DeepSpeed's own checkpoint in, Hugging Face folder out: one process, no GPU, no DeepSpeed, a few chunks of memory.

A checkpoint is one that `save_checkpoint` of DeepSpeed wrote under ZeRO 1, 2 or 3. ZeRO-3 saves every
rank's part of each parameter, one after the other in the order of the parameters; each part has
ceil(n / ranks) elements, the last ones padded. ZeRO-1 and 2 put a group's parameters end to end and
save each rank's stretch of that. Frozen parameters and buffers are saved beside the model.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.arithmetic import DEFAULT_SHARD_BYTES
from engine.deepspeed_import.files import ModelFile, OptimizerFile, read_model_file, read_optimizer_file
from engine.deepspeed_import.stored_tensors import Flat, StoredTensor, joined_source, verify_storages, whole_source
from engine.errors import DataError, MissingInputError, RefusedForSecurityError
from engine.export.folder import (
    check_free,
    empty_model,
    model_shapes,
    new_folder,
    read_config,
    weight_dtype,
    write_weights,
)
from engine.export.settings import copy_files, write_config
from engine.export.taught import Taught
from engine.tensor_files.reader import read_file
from engine.tensor_files.writer import TensorSource

_LOG = logging.getLogger(__name__)
_NAMES_TOLD = 4
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
        """True if damage would be seen: torch records checksums unless it is told not to."""
        return all(tensor.storage.crc32 is not None for tensor in self.stored if tensor.count)

    def verify(self) -> None:
        """Read all that the weights lie in, once. DataError names what is not as it was written."""
        verify_storages(self.stored)


def import_checkpoint(
    checkpoint_dir: Path,
    out_dir: Path,
    model_dir: Path,
    tag: str | None = None,
    dtype: str = "bfloat16",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> DeepSpeedCheckpoint:
    """Write the fp32 masters of a DeepSpeed checkpoint as a folder that `from_pretrained` loads alone.

    `checkpoint_dir` holds `latest` and the folder it names (`tag`: another one); `model_dir` holds the
    model's config.json and, to be copied, its tokenizer. `dtype` is bfloat16, float16 or float32. The
    folder appears when it is complete. Raises CannotWriteError for an `out_dir` that holds something,
    DataError when the checkpoint is damaged or not of this model, StorageError when writing fails,
    RefusedForSecurityError when a file would run code.
    """
    target = weight_dtype(dtype)
    check_free(out_dir)
    values, config = read_config(model_dir)
    path = model_dir / "config.json"
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise DataError(f'{path}: needs the class of the trained model, such as "architectures": ["LlamaForCausalLM"]')
    model = empty_model(config, str(architectures[0]), path)
    checkpoint = open_deepspeed(checkpoint_dir, tag)
    weights = _fit(checkpoint, model)
    if not checkpoint.has_checksums:
        _LOG.warning("%s was saved without checksums: damage to its weights would not be seen", checkpoint.path)
    checkpoint.verify()
    with new_folder(out_dir) as folder:
        write_weights(model, weights, folder, target, max_shard_bytes)
        write_config(values, folder, model, dtype)
        copy_files(model_dir, model_dir, folder, model, Taught())
    return checkpoint


def _fit(checkpoint: DeepSpeedCheckpoint, model: Any) -> dict[str, TensorSource]:
    """The model's weights by its own names. Wrappers around a model put something before every name."""
    stored = checkpoint.parameters | checkpoint.buffers
    stored |= {name: stored[kept] for name, kept in checkpoint.aliases.items()}
    parts = next(iter(checkpoint.parameters), "").split(".")
    prefixes = ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts))]
    best: list[str] | None = None
    for prefix in prefixes:
        here = {name.removeprefix(prefix): source for name, source in stored.items() if name.startswith(prefix)}
        outside = [f"{name} is not in the model" for name in stored if not name.startswith(prefix)]
        weights, faults = _match(here, model)
        faults += outside
        if not faults:
            if prefix:
                _LOG.info("names in %s begin with %s, which the model's do not", checkpoint.path, prefix)
            return weights
        if best is None or len(faults) < len(best):
            best = faults
    assert best is not None
    more = f" and {len(best) - _NAMES_TOLD} more" if len(best) > _NAMES_TOLD else ""
    raise DataError(f"{checkpoint.path}: not of the model in config.json: {'; '.join(best[:_NAMES_TOLD])}{more}")


def _match(stored: Mapping[str, TensorSource], model: Any) -> tuple[dict[str, TensorSource], list[str]]:
    """Sources by the first name of each weight of the model, and what does not fit."""
    weights: dict[str, TensorSource] = {}
    faults, used = [], set()
    tied: dict[int, list[str]] = {}
    for name in model.state_dict():
        tied.setdefault(id(model.get_parameter_or_buffer(name)), []).append(name)
    for name, shape in model_shapes(model).items():
        names = [other for other in tied[id(model.get_parameter_or_buffer(name))] if other in stored]
        used.update(names)
        sources = {id(stored[other]): stored[other] for other in names}
        if not names:
            faults.append(f"{name} is not in the checkpoint")
        elif len(sources) > 1:
            faults.append(f"{' and '.join(names)} are one weight in the model, but were trained as two")
        elif stored[names[0]].shape != shape:
            faults.append(f"{name} has shape {stored[names[0]].shape} in the checkpoint and {shape} in the model")
        else:
            weights[name] = stored[names[0]]
    computed = {name for name, _ in model.named_buffers()}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    faults += [
        f"{name[:200]} is not in the model"
        for name in stored
        if name not in used and name not in computed and not any(pattern.search(name) for pattern in ignored)
    ]
    return weights, faults


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
