"""Checkpoint in, Hugging Face folder out: one process, no GPU, no DeepSpeed, a few chunks of memory.

The weights are the fp32 masters rounded once to the wanted type, which are the weights that the
engine computes with.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from engine.arithmetic import DEFAULT_SHARD_BYTES, list_checkpoints, step_of
from engine.checkpoint.format import best_checkpoint
from engine.checkpoint.reader import CheckpointReader
from engine.errors import DataError, MissingInputError, StorageError
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
    taught: Taught | None = None,
) -> None:
    """Write the checkpoint as a folder that `from_pretrained` loads alone.

    `model_dir` holds the run's model folder (see `write_model_folder`); the tokenizer's files are
    copied. `dtype` is bfloat16, float16 or float32, `card` the text of README.md, `taught` what the data
    taught beyond weights. The folder appears when it is complete and has been read back.
    Raises CannotWriteError for an `out_dir` that holds something, DataError for a damaged
    checkpoint or one that is not of this model, StorageError when writing fails.
    """
    weight_dtype(dtype)
    check_free(out_dir)
    reader = CheckpointReader(checkpoint_dir)
    reader.verify_rest()
    values, config = read_config(model_dir)
    architecture = reader.manifest.architecture
    model = empty_model(config, architecture, reader.path)
    _check_names(reader, model)
    weights = {name: _source(reader, name) for name in reader.weights}
    write_export(out_dir, model, weights, values, model_dir, tokenizer_dir, dtype, max_shard_bytes, card, taught)


def write_export(
    out_dir: Path, model: Any, weights: Mapping[str, TensorSource], values: Mapping[str, Any], model_dir: Path,
    tokenizer_dir: Path | None, dtype: str, max_shard_bytes: int, card: str | None, taught: Taught | None,
) -> None:  # fmt: skip
    """Write the folder of an empty `model` with `weights`; `values` are those of its config.json."""
    target = weight_dtype(dtype)
    with new_folder(out_dir) as folder:
        write_weights(model, weights, folder, target, max_shard_bytes)
        write_config(values, folder, model, dtype)
        copy_files(model_dir, tokenizer_dir, folder, model, taught or Taught())
        if card is not None:
            write_file(folder / "README.md", card.encode())
        check_forward(folder, weights, model, target)


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


_LOG = logging.getLogger(__name__)
#: Two models at a time; larger ones would break the promise of bounded memory.
MAX_CHECKED_BYTES = 150_000_000
_TOKENS = 16
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def check_forward(folder: Path, weights: Mapping[str, TensorSource], model: Any, dtype: torch.dtype) -> None:
    """StorageError unless the folder opens as `weights` rounded to `dtype`, and computes what they do.

    `model` is the empty one. Weights must be equal bit by bit; logits up to rounding, which depends
    on where in memory a weight lies. Left out, with a line that says so, for models of more than 150 MB.
    """
    size_bytes = sum(math.prod(source.shape) for source in weights.values()) * dtype.itemsize
    if size_bytes > MAX_CHECKED_BYTES:
        _LOG.info("%s: forward pass not compared: %d MB of weights", folder.name, size_bytes // 10**6)
        return
    kind = type(model)
    transformers.utils.logging.disable_progress_bar()
    theirs = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, trust_remote_code=False)
    written, opened = _logits(theirs), dict((*theirs.named_parameters(), *theirs.named_buffers()))
    ours = kind._from_config(model.config)  # as from_pretrained makes it, with the same attention
    for name, value in (*ours.named_parameters(), *ours.named_buffers()):
        if name in weights:
            values = torch.cat([chunk.reshape(-1) for chunk in weights[name].chunks()]).view(value.shape)
            stored = values.to(dtype) if isinstance(value, torch.nn.Parameter) else values
            # What is opened in a type of its own (buffers, some modules in fp32) computes in that.
            value.data = stored.to(opened[name].dtype)
            if not torch.equal(opened[name], value):
                raise StorageError(f"{folder}: {name} opens as something else than the weights of the run")
    ours.tie_weights()
    if not torch.allclose(_logits(ours), written, rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype]):
        raise StorageError(f"{folder}: computes something else than the weights of the run; not published")


def _logits(model: Any) -> Tensor:
    """All logits for a few tokens, whatever the head calls them, flattened; without dropout."""
    config = model.config.get_text_config()
    tokens = torch.arange(_TOKENS) % config.vocab_size
    end = getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    if end is not None and 0 <= end < config.vocab_size:
        tokens[-1] = end  # where some classifiers read
    with torch.no_grad():
        output = model.eval()(input_ids=tokens[None], attention_mask=torch.ones(1, _TOKENS, dtype=torch.long))
    found = [value for name, value in output.items() if name.endswith("logits")]
    parts = [part for value in found for part in (value if isinstance(value, tuple) else (value,))]  # of routers
    return torch.cat([part.flatten() for part in parts])
