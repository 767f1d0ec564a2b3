"""Compares what a written folder computes with what its source holds, by transformers alone, for small models."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from engine.checkpoint.reader import CheckpointReader
from engine.errors import StorageError

_LOG = logging.getLogger(__name__)
#: Two models at a time; larger ones would break the promise of bounded memory.
MAX_CHECKED_BYTES = 150_000_000
_TOKENS = 16
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def check_forward(folder: Path, reader: CheckpointReader, model: Any, dtype: torch.dtype) -> None:
    """StorageError unless the folder opens as the checkpoint's masters rounded to `dtype`, and computes what they do.

    `model` is the empty one. Weights must be equal bit by bit; logits up to rounding, which depends
    on where in memory a weight lies. Left out, with a line that says so, for models of more than 150 MB.
    """
    size_bytes = sum(math.prod(entry.shape) for entry in reader.weights.values()) * dtype.itemsize
    if size_bytes > MAX_CHECKED_BYTES:
        _LOG.info("%s: forward pass not compared: %d MB of weights", folder.name, size_bytes // 10**6)
        return
    kind = type(model)
    transformers.utils.logging.disable_progress_bar()
    theirs = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, trust_remote_code=False)
    written, opened = _logits(theirs), dict((*theirs.named_parameters(), *theirs.named_buffers()))
    ours = kind._from_config(model.config)  # as from_pretrained makes it, with the same attention
    for name, value in (*ours.named_parameters(), *ours.named_buffers()):
        if name in reader.weights:
            values = reader.read_weight(name, 0, value.numel()).view(value.shape)
            stored = values.to(dtype) if isinstance(value, torch.nn.Parameter) else values
            # What is opened in a type of its own (buffers, some modules in fp32) computes in that.
            value.data = stored.to(opened[name].dtype)
            if not torch.equal(opened[name], value):
                raise StorageError(f"{folder}: {name} opens as something else than what the checkpoint holds")
    ours.tie_weights()
    if not torch.allclose(_logits(ours), written, rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype]):
        raise StorageError(f"{folder}: the written model computes something else than the checkpoint; not published")


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
    return torch.cat([value.flatten() for name, value in output.items() if name.endswith("logits")])
