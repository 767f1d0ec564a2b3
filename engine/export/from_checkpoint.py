"""Checkpoint in, Hugging Face folder out: one process, no GPU, no DeepSpeed, a few chunks of memory.

The weights are the fp32 masters rounded once to the wanted type, which are the weights that the
engine computes with.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.arithmetic import DEFAULT_SHARD_BYTES, list_checkpoints, step_of
from engine.checkpoint.format import best_checkpoint
from engine.checkpoint.reader import CheckpointReader
from engine.errors import DataError, MissingInputError
from engine.export.folder import (
    check_free,
    copy_files,
    empty_model,
    model_shapes,
    new_folder,
    read_config,
    weight_dtype,
    write_config,
    write_weights,
)
from engine.export.forward_check import check_forward
from engine.tensor_files.writer import TensorSource, write_file

_CHUNK_ELEMENTS = 8 * 2**20


def resolve_checkpoint(run_dir: Path, step: int | None = None, best: bool = False) -> Path:
    """The checkpoint to export: that of `step`, the best one, or the newest.

    MissingInputError names what there is instead.
    """
    present = list_checkpoints(run_dir)
    if step is not None:
        found = next((path for path in present if step_of(path.name) == step), None)
        wanted = f"of step {step}"
    elif best:
        found, wanted = best_checkpoint(run_dir), "marked as best"
    else:
        found, wanted = (present[-1] if present else None), ""
    if found is None:
        steps = ", ".join(str(step_of(path.name)) for path in present)
        there = f"there are those of steps {steps}" if steps else "there is none at all"
        raise MissingInputError(f"{run_dir}: no checkpoint {wanted}".rstrip() + f"; {there}")
    return found


def export_checkpoint(
    checkpoint_dir: Path,
    model_dir: Path,
    tokenizer_dir: Path | None,
    out_dir: Path,
    dtype: str = "bfloat16",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    card: str | None = None,
) -> None:
    """Write the checkpoint as a folder that `from_pretrained` loads alone.

    `model_dir` holds config.json and perhaps generation_config.json; the tokenizer's files are
    copied. `dtype` is bfloat16, float16 or float32, `card` the text of README.md. The folder appears
    when it is complete and has been read back.
    Raises CannotWriteError for an `out_dir` that holds something, DataError for a damaged
    checkpoint or one that is not of this model, StorageError when writing fails.
    """
    target = weight_dtype(dtype)
    check_free(out_dir)
    reader = CheckpointReader(checkpoint_dir)
    reader.verify_rest()
    values, config = read_config(model_dir)
    architecture = reader.manifest.architecture
    model = empty_model(config, architecture, reader.path)
    _check_names(reader, model)
    weights = {name: _source(reader, name) for name in reader.weights}
    with new_folder(out_dir) as folder:
        write_weights(model, weights, folder, target, max_shard_bytes)
        write_config(values, folder, architecture, dtype)
        copy_files(model_dir, tokenizer_dir, folder)
        if card is not None:
            write_file(folder / "README.md", card.encode())
        check_forward(folder, reader, model, target)


def _check_names(reader: CheckpointReader, model: Any) -> None:
    here = model_shapes(model)
    there = {name: entry.shape for name, entry in reader.weights.items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise DataError(
                f"{reader.path}: not of the model in config.json: {name} has shape {there.get(name)} in the "
                f"checkpoint and {here.get(name)} in the model"
            )


def _source(reader: CheckpointReader, name: str) -> TensorSource:
    """The tensor `name` of the checkpoint in the type it was saved in, read a chunk at a time, hashes compared."""
    entry = reader.weights[name]
    tensor = reader.manifest.tensors_of(name)[0]

    def chunks() -> Iterator[Tensor]:
        count = math.prod(entry.shape)
        for start in range(0, count, _CHUNK_ELEMENTS):
            values = torch.empty(min(count - start, _CHUNK_ELEMENTS), dtype=entry.dtype)
            reader.read_into(reader.requests(tensor, start, values))
            yield values

    return TensorSource(name, entry.dtype, entry.shape, chunks)
