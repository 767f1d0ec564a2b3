"""Rows for tokens that a tokenizer gained: each starts as the mean of the rows of the old tokens that spell it.

``extension.json`` in the store's tokenizer folder says which (``fulltune tokenizer extend`` writes it). The
model only grows here, without values; its rows are made when the weights are read, one tensor at a time, on every
rank alike: that draws no random number.
"""

import json
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


@dataclass(frozen=True)
class NewRows:
    """Rows that the weights `names` still have to get: ids from `first` on, of `num_rows`; `old_rows` are stored."""

    extension: Extension
    names: tuple[str, ...]
    first: int
    old_rows: int
    num_rows: int

    def extend(self, stored: Tensor) -> Tensor:
        """The weight (`num_rows`, ...) made of the stored one (`old_rows`, ...), on the CPU and in its type.

        Rows that the model had to spare are overwritten; what rounding up the number of rows leaves
        over starts as the mean of all old ones.
        """
        tensor = torch.empty(self.num_rows, *stored.shape[1:], dtype=stored.dtype)
        tensor[: self.old_rows] = stored
        if self.first > self.old_rows:  # ids of the old tokenizer that the model has no rows for
            tensor[self.old_rows : self.first] = stored.float().mean(0)
        for index in range(self.first, self.extension.vocab_size):
            ids = torch.tensor(self.extension.pieces[index - self.extension.base_vocab_size])
            tensor[index] = tensor[ids].float().mean(0)
        if (left_over := tensor[max(self.old_rows, self.extension.vocab_size) :]).numel():
            left_over.copy_(tensor[: self.first].float().mean(0).expand_as(left_over))
        return tensor

    def __str__(self) -> str:
        last = self.extension.vocab_size - 1
        return f"new tokens: rows {self.first} to {last} start as the mean of the old tokens that spell them"


def grow_vocabulary(model: Any, extension: Extension) -> NewRows | None:
    """Make room in `model` for all of `extension`'s ids; returns what is to be filled, None if all rows were made.

    The model may be on the meta device. Rows: of the input embedding, and of the output embedding and its bias
    where they are not the same. A number of rows that was a multiple of 64 remains one. The configuration
    records size and `MADE_ROWS`.
    """
    first = max(getattr(model.config, MADE_ROWS, 0), extension.base_vocab_size)
    if first >= extension.vocab_size:
        return None
    old_rows: int = model.get_input_embeddings().weight.shape[0]
    num_rows = old_rows
    if old_rows < extension.vocab_size:
        _require_only_known_matrices(model, old_rows)
        granule = _ROUND_TO if old_rows % _ROUND_TO == 0 else 1
        num_rows = -(-extension.vocab_size // granule) * granule
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    setattr(model.config, MADE_ROWS, extension.vocab_size)
    known = _vocabulary_tensors(model)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    names = tuple(name for name, tensor in tensors if id(tensor) in known)
    return NewRows(extension, names, first, old_rows, num_rows)


def _vocabulary_tensors(model: Any) -> dict[int, Tensor]:
    """Parameters and buffers with a row, or a number, for every token; tied ones once."""
    output = model.get_output_embeddings()
    tensors = [model.get_input_embeddings().weight]
    if output is not None:
        tensors += [output.weight, getattr(output, "bias", None)]
    return {id(tensor): tensor for tensor in tensors if tensor is not None}


def _require_only_known_matrices(model: Any, num_rows: int) -> None:
    """DataError for a model with another embedding of tokens, such as one for each layer."""
    if num_rows == getattr(model.config.get_text_config(), "max_position_embeddings", None):
        return  # sizes do not tell tokens from positions
    known = _vocabulary_tensors(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == num_rows:
            if id(module.weight) in known:
                continue
            raise DataError(
                f"model type {model.config.model_type} cannot take new tokens: {name} has rows for tokens, too; "
                "prepare the data with the model's own tokenizer"
            )
