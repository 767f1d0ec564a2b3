"""Does a written folder compute what its source holds? Asked of transformers alone, when the model is small enough."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint_reader import CheckpointReader
from engine.errors import StorageError

_LOG = logging.getLogger(__name__)
#: Two passes, one model at a time; larger ones would break the promise of bounded memory.
MAX_CHECKED_BYTES = 250_000_000
_TOKENS = 16


def check_forward(folder: Path, reader: CheckpointReader, model: Any, dtype: torch.dtype) -> None:
    """StorageError unless the folder's model gives the logits of the checkpoint's masters rounded to `dtype`.

    `model` is the empty one. Left out, with a line that says so, for models of more than 250 MB.
    """
    size_bytes = sum(math.prod(entry.shape) for entry in reader.weights.values()) * dtype.itemsize
    if size_bytes > MAX_CHECKED_BYTES:
        _LOG.info("%s: forward pass not compared: %d MB of weights", folder.name, size_bytes // 10**6)
        return
    kind = type(model)
    theirs = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, trust_remote_code=False)
    written = _logits(theirs)
    del theirs
    ours = kind(model.config)
    for name, value in (*ours.named_parameters(), *ours.named_buffers()):
        if name in reader.weights:
            is_parameter = isinstance(value, torch.nn.Parameter)
            values = reader.read_weight(name, 0, value.numel()).view(value.shape)
            value.data = values.to(dtype) if is_parameter else values
    ours.tie_weights()
    if not torch.equal(_logits(ours), written):
        raise StorageError(f"{folder}: the written model computes something else than the checkpoint; not published")


def _logits(model: Any) -> Tensor:
    """What the model says to a few tokens, without dropout."""
    config = model.config.get_text_config()
    tokens = torch.arange(_TOKENS) % config.vocab_size
    end = getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    if end is not None and 0 <= end < config.vocab_size:
        tokens[-1] = end  # where some classifiers read
    with torch.no_grad():
        output: Tensor = model.eval()(input_ids=tokens[None]).logits
    return output
