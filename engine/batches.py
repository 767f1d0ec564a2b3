"""The tensors of a micro-batch, and how rows become them: laid end to end, or padded.

`engine.row_stream` has which rows a step uses, `engine.micro_batches` how they fall on ranks.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.token_store import Rows, TokenStore

Rows64 = NDArray[np.int64]

#: Tokens of the documents of a sample: another number for each, so that no two are mistaken for one another.
_SAMPLE_LENGTHS = (23, 16, 41)


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank; tensors of one device. B rows, T tokens, D documents, U targets.

    Flat (`lengths` is None): input_ids and position_ids are (1, T), the documents of all rows one after the
    other without padding; document_ends is (D + 1,) int32 from 0 to T.
    Padded: input_ids is (B, T), one document a row, padded on the right; lengths is (B,).
    In both forms positions count in the flattened input_ids, so ``logits.flatten(0, 1)[target_positions]`` fits.
    What targets are is the task's affair, and so are the columns that it adds; one of the store has a value a document.
    """

    input_ids: Tensor
    target_positions: Tensor  # (U,)
    target_ids: Tensor  # (U, ...)
    rows: tuple[int, ...]  # none in a filler batch
    num_tokens: int
    position_ids: Tensor | None = None
    document_ends: Tensor | None = None
    longest_document_tokens: int = 0
    lengths: Tensor | None = None
    row_tokens: tuple[int, ...] = ()  # of each row; none in a filler batch
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    target_owners: Tensor = field(kw_only=True)  # (U,): the number, in this batch, of the document a target is of

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            attribute.name: value.to(device, non_blocking=True)
            for attribute in dataclasses.fields(self)
            if isinstance(value := getattr(self, attribute.name), Tensor)
        }
        columns = {name: value.to(device, non_blocking=True) for name, value in self.columns.items()}
        return dataclasses.replace(self, columns=columns, **moved)

    @property
    def first_tokens(self) -> Tensor:
        """(D,): the position of each document's first token."""
        if self.document_ends is not None:
            return self.document_ends[:-1].long()
        return torch.arange(len(self.input_ids), device=self.input_ids.device) * self.input_ids.shape[1]

    @property
    def document_lengths(self) -> Tensor:
        """(D,): tokens of each document."""
        if self.document_ends is not None:
            return self.document_ends.diff().long()
        assert self.lengths is not None
        return self.lengths

    @property
    def last_tokens(self) -> Tensor:
        """(D,): the position of each document's last token."""
        return self.first_tokens + self.document_lengths - 1

    @property
    def token_owners(self) -> Tensor:
        """(T,) of a flat batch: the number of the document that each token is of."""
        numbers = torch.arange(len(self.document_lengths), device=self.input_ids.device)
        return numbers.repeat_interleave(self.document_lengths, output_size=self.input_ids.numel())

    @property
    def attention_mask(self) -> Tensor:
        """(B, T) int64 of a padded batch: 1 for tokens, 0 for padding."""
        assert self.lengths is not None
        positions = torch.arange(self.input_ids.shape[1], device=self.lengths.device)
        return (positions < self.lengths[:, None]).long()

    @property
    def num_padding(self) -> int:
        """Positions that hold no token."""
        return self.input_ids.numel() - self.num_tokens

    def with_targets(self, chosen: Tensor) -> "Batch":
        """The same batch with some of its targets: a mask (U,), or their numbers in another order."""
        positions, ids, owners = (
            values[chosen] for values in (self.target_positions, self.target_ids, self.target_owners)
        )
        return dataclasses.replace(self, target_positions=positions, target_ids=ids, target_owners=owners)


def segments_of(index: Rows, rows: Rows64) -> tuple[Rows64, Rows64, Rows64, Rows64]:
    """Documents, starts and lengths of the segments of `rows`, row after row, and how many each row has."""
    ends = index.row_ends[rows].astype(np.int64)
    begins = index.row_ends[rows - 1].astype(np.int64)
    begins[rows == 0] = 0
    counts = ends - begins
    stops = np.cumsum(counts)
    chosen = np.repeat(begins - (stops - counts), counts)
    chosen += np.arange(len(chosen))
    documents, starts, lengths = (
        column[chosen].astype(np.int64) for column in (index.documents, index.starts, index.lengths)
    )
    return documents, starts, lengths, counts


def row_lengths(index: Rows, rows: Rows64) -> Rows64:
    """Tokens of each of `rows`."""
    return row_sums(index, rows, lambda lengths: lengths)


def row_sums(index: Rows, rows: Rows64, value: Callable[[Rows64], Rows64]) -> Rows64:
    if len(rows) == 0:
        return np.zeros(0, dtype=np.int64)
    _, _, lengths, counts = segments_of(index, rows)
    return np.add.reduceat(value(lengths), np.cumsum(counts) - counts)


def flat_batch(
    store: TokenStore,
    index: Rows,
    rows: Rows64,
    filler_row: int,
    columns: Sequence[str] = (),
    target_column: str | None = None,
) -> Batch:
    """The documents of `rows` one after the other, in this order. Without rows: `filler_row` with no targets,
    because a rank that has nothing to train must still take part in every collective.

    Targets are the marked tokens: their positions, their ids, and the documents that own them. With
    `target_column`, a column of the store with a value a token, target_ids are its values there. `columns`,
    which have one value a document, come along as (D,) int64.
    """
    return _flat(_documents_of(store, index, rows, filler_row, columns, target_column))


def padded_batch(
    store: TokenStore,
    index: Rows,
    rows: Rows64,
    filler_row: int,
    columns: Sequence[str] = (),
    target_column: str | None = None,
) -> Batch:
    """As `flat_batch`, with one document a row, padded on the right to the longest."""
    documents = _documents_of(store, index, rows, filler_row, columns, target_column)
    assert len(documents.lengths) == max(1, len(rows)), "a row of a padded task holds one document"
    return _padded(documents, store.pad_id)


def sample_batch(
    vocab_size: int, end_id: int, is_padded: bool, columns: Mapping[str, Sequence[int]] | None = None
) -> Batch:
    """Three documents of 23, 16 and 41 tokens, of any ids, as `flat_batch` and `padded_batch` lay them out.

    All tokens are targets, with the target 0. `columns` have three values each.
    """
    lengths = np.array(_SAMPLE_LENGTHS)
    tokens = 1 + np.arange(lengths.sum()) * 7 % max(1, vocab_size - 1)
    tokens[np.cumsum(lengths) - 1] = end_id
    every = np.ones(len(tokens), dtype=bool)
    values = {name: np.array(column) for name, column in (columns or {}).items()}
    documents = _Documents(np.arange(len(lengths)), tokens % vocab_size, every, tokens * 0, lengths, lengths, values)
    return _padded(documents, 0) if is_padded else _flat(documents)


class _Documents(NamedTuple):
    """The documents of a batch, one after the other: D documents, N tokens."""

    rows: Rows64  # none in a filler batch
    tokens: Rows64  # (N,)
    marks: NDArray[np.bool_]  # (N,): the tokens that are targets
    values: Rows64  # (N,): what target_ids are taken from
    lengths: Rows64  # (D,)
    row_tokens: Rows64  # of each of `rows`
    columns: Mapping[str, Rows64]  # (D,) each


def _documents_of(
    store: TokenStore,
    index: Rows,
    rows: Rows64,
    filler_row: int,
    columns: Sequence[str],
    target_column: str | None,
) -> _Documents:
    documents, starts, lengths, _ = segments_of(index, rows if len(rows) else np.array([filler_row]))
    tokens, marks = store.gather(documents, starts, lengths)
    values = tokens
    if target_column is not None:
        pieces = zip(documents.tolist(), starts.tolist(), (starts + lengths).tolist(), strict=True)
        values = np.concatenate([store.token_column(target_column, *piece) for piece in pieces]).astype(np.int64)
    own = {name: store.column(name)[documents].astype(np.int64) for name in columns}
    return _Documents(rows, tokens, marks & (len(rows) > 0), values, lengths, row_lengths(index, rows), own)


def _flat(documents: _Documents) -> Batch:
    lengths, tokens = documents.lengths, documents.tokens
    ends = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=ends[1:])
    targets = np.flatnonzero(documents.marks)
    return Batch(
        input_ids=torch.from_numpy(tokens)[None],
        position_ids=torch.from_numpy(np.arange(len(tokens)) - np.repeat(ends[:-1], lengths))[None],
        document_ends=torch.from_numpy(ends),
        longest_document_tokens=int(lengths.max()),
        target_positions=torch.from_numpy(targets),
        target_ids=torch.from_numpy(documents.values.take(targets)),
        target_owners=torch.from_numpy(np.searchsorted(ends[1:], targets, side="right")),
        **_counts(documents),
    )


def _padded(documents: _Documents, pad_id: int) -> Batch:
    lengths = documents.lengths
    targets = np.flatnonzero(pad(documents.marks, lengths, 0))
    input_ids = pad(documents.tokens, lengths, pad_id)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        lengths=torch.from_numpy(lengths),
        target_positions=torch.from_numpy(targets),
        target_ids=torch.from_numpy(documents.values[documents.marks]),
        target_owners=torch.from_numpy(targets // input_ids.shape[1]),
        **_counts(documents),
    )


def _counts(documents: _Documents) -> dict[str, Any]:
    """The fields of a batch that both forms have alike."""
    return {
        "rows": tuple(documents.rows.tolist()),
        "num_tokens": len(documents.tokens) if len(documents.rows) else 0,
        "row_tokens": tuple(documents.row_tokens.tolist()),
        "columns": {name: torch.from_numpy(values) for name, values in documents.columns.items()},
    }


def pad(values: NDArray[Any], lengths: Rows64, fill: int) -> Rows64:
    """Values of documents one after the other as (B, T) int64, each document in a row of its own, `fill` behind it."""
    padded = np.full((len(lengths), int(lengths.max())), fill, dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = values
    return padded
