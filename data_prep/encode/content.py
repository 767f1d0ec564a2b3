"""The parts that all encode functions share: their context, the ids of texts, and the checks of records and ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.encode.blocks import Names
from data_prep.errors import BadDataError, FatalDataError, UntrainableError
from data_prep.sources.records import Record
from data_prep.tokenizer.backends import Backend
from data_prep.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:  # with its template engine, which most data does without
    from data_prep.chat.format import ChatFormat


@dataclass(frozen=True)
class Context:
    """The context of encoding. `limit_tokens` bounds a document of a task that cannot be cut later."""

    tokenizer: Tokenizer
    backend: Backend
    chat: "ChatFormat | None"
    names: Names
    train_on_prompt: bool = False
    allow_untrained_stop: bool = False
    limit_tokens: int | None = None
    splits: bool = False  # what is longer becomes several documents; else its end is cut off
    target_limit_tokens: int | None = None
    row_tokens: int = 0
    stride_tokens: int = 0
    makes_windows: bool = False  # of a record that is longer than a row
    every_piece: bool = False  # of a word is a target, else its first one

    @property
    def id_type(self) -> np.dtype[Any]:
        """The stored type of token ids."""
        return self.tokenizer.id_type


def refuse_untrainable(faulty: np.ndarray, records: Sequence[Record], reason: str) -> None:
    """UntrainableError for the marked ones of `records` (bool [records]), if any."""
    if faulty.any():
        indices = tuple(np.flatnonzero(faulty).tolist())
        raise UntrainableError(
            f"{records[indices[0]].where}: nothing in this record would be trained: {reason}"
            " (data.min_targets: 1 drops and counts such records)",
            indices,
        )


def refuse_untrainable_at(indices: Sequence[int], records: Sequence[Record], reason: str) -> None:
    """`refuse_untrainable` for the records with these indices."""
    faulty = np.zeros(len(records), dtype=bool)
    faulty[list(indices)] = True
    refuse_untrainable(faulty, records, reason)


def refuse_strides(record: Record, what: str, room: int, context: Context) -> None:
    """FatalDataError where windows of `room` tokens over a record's `what` cannot share `context.stride_tokens`."""
    if room > context.stride_tokens:
        return
    advice = f"set data.stride_tokens to {room // 4}, or raise data.row_tokens" if room > 0 else "raise data.row_tokens"
    raise FatalDataError(
        f"{record.where}: the {what} is longer than a row, and a row of {context.row_tokens} tokens leaves no room for"
        f" windows that share {context.stride_tokens} tokens: {advice}"
    )


def encode_texts(texts: Sequence[str], records: Sequence[Record], context: Context) -> list[list[int]]:
    """Ids of every text, checked to hold no control token; `records` [texts] are those that the texts come from."""
    ids, ends = context.backend.encode(texts)
    check_content(context.tokenizer, ids, ends, records)
    return [part.tolist() for part in np.split(ids, ends[:-1])] if len(texts) else []


def check_content(tokenizer: Tokenizer, ids: np.ndarray, ends: np.ndarray, records: Sequence[Record]) -> None:
    """Refuse content (documents ending at `ends`) with ids outside the vocabulary or of control tokens."""
    check_range(tokenizer, ids, ends, records)
    # Control tokens mostly have the largest ids, which few texts reach.
    if len(ids) and int(ids.max()) >= tokenizer.first_forbidden and tokenizer.forbidden[ids].any():
        place = int(np.argmax(tokenizer.forbidden[ids]))
        where = records[int(np.searchsorted(ends, place, side="right"))].where
        raise BadDataError(f"{where}: this tokenizer turns part of the text into a control token", "control_token")


def check_range(tokenizer: Tokenizer, ids: np.ndarray, ends: np.ndarray, records: Sequence[Record]) -> None:
    """Refuse ids (documents ending at `ends`) outside the vocabulary."""
    if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
        place = int(np.argmax(ids >= tokenizer.vocab_size))
        where = records[int(np.searchsorted(ends, place, side="right"))].where
        raise BadDataError(f"{where}: token id {ids[place]} is outside the vocabulary of {tokenizer.vocab_size}")
