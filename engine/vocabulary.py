"""Rows for tokens that a tokenizer gained: each starts as the mean of the rows of the old tokens that spell it.

``extension.json`` in the store's tokenizer folder says which (``fulltune tokenizer extend`` writes it). This
happens before ZeRO cuts the weights, on every rank alike: it draws no random number.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import DataError

EXTENSION_NAME = "extension.json"
#: In a model's configuration: ids below this number have rows that were made or trained for them.
MADE_ROWS = "vocab_rows_made"
_FORMAT = 1
_ROUND_TO = 64


@dataclass(frozen=True)
class Extension:
    """Ids from `base_vocab_size` on are new; `pieces[i]` are the smaller ids that spell the i-th of them."""

    base_vocab_size: int
    pieces: tuple[tuple[int, ...], ...]

    @property
    def vocab_size(self) -> int:
        return self.base_vocab_size + len(self.pieces)


def read_extension(tokenizer_dir: Path | None) -> Extension | None:
    """The extension of a tokenizer folder, None if it has none. Raises DataError for a file that makes no sense."""
    path = tokenizer_dir / EXTENSION_NAME if tokenizer_dir is not None else None
    if path is None or not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != _FORMAT:
            raise ValueError(f"format {values['format']}, not {_FORMAT}")
        first = int(values["base_vocab_size"])
        pieces = [tuple(map(int, values["pieces"][str(first + place)])) for place in range(len(values["pieces"]))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the extension of a tokenizer: {error}; prepare the data again") from error
    for place, ids in enumerate(pieces):
        if not ids or min(ids) < 0 or max(ids) >= first + place:
            raise DataError(f"{path}: token {first + place} is not spelled in smaller ids: {list(ids)}")
    return Extension(first, tuple(pieces))


def extend_vocabulary(model: Any, extension: Extension) -> None:
    """Give `model` (whole, on the CPU) rows for all of `extension`'s ids; those that were made before stay.

    Rows: of the input embedding, and of the output embedding and its bias where they are not the same. Rows
    that the model had to spare are overwritten. A number of rows that was a multiple of 64 remains one; what
    that leaves over starts as the mean of all old rows. The configuration records size and `MADE_ROWS`.
    """
    first = max(getattr(model.config, MADE_ROWS, 0), extension.base_vocab_size)
    if first >= extension.vocab_size:
        return
    num_rows: int = model.get_input_embeddings().weight.shape[0]
    if num_rows < extension.vocab_size:
        _require_only_known_matrices(model, num_rows)
        granule = _ROUND_TO if num_rows % _ROUND_TO == 0 else 1
        model.resize_token_embeddings(-(-extension.vocab_size // granule) * granule, mean_resizing=False)
    with torch.no_grad():
        for tensor in _vocabulary_tensors(model).values():
            for index in range(first, extension.vocab_size):
                ids = torch.tensor(extension.pieces[index - extension.base_vocab_size])
                tensor[index] = tensor[ids].float().mean(0)
            if (left_over := tensor[max(num_rows, extension.vocab_size) :]).numel():
                left_over.copy_(tensor[:first].float().mean(0).expand_as(left_over))
    setattr(model.config, MADE_ROWS, extension.vocab_size)
    if os.environ.get("RANK", "0") == "0":
        last = extension.vocab_size - 1
        print(f"new tokens: rows {first} to {last} start as the mean of the old tokens that spell them", flush=True)


def _vocabulary_tensors(model: Any) -> dict[int, Tensor]:
    """Parameters and buffers with a row, or a number, for every token; tied ones once."""
    output = model.get_output_embeddings()
    tensors = [model.get_input_embeddings().weight]
    if output is not None:
        tensors += [output.weight, getattr(output, "bias", None)]
    return {tensor.data_ptr(): tensor for tensor in tensors if tensor is not None}


def _require_only_known_matrices(model: Any, num_rows: int) -> None:
    """DataError for a model with another embedding of tokens, such as one for each layer."""
    if num_rows == getattr(model.config.get_text_config(), "max_position_embeddings", None):
        return  # sizes do not tell tokens from positions
    known = _vocabulary_tensors(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == num_rows:
            if module.weight.data_ptr() in known:
                continue
            raise DataError(
                f"model type {model.config.model_type} cannot take new tokens: {name} has rows for tokens, too; "
                "prepare the data with the model's own tokenizer"
            )
