"""Which rows a step uses, how they fall on ranks and micro-batches, and the tensors they become.

Everything here is a pure function of (seed, position in the endless stream of rows, sizes): no
iterator, no state, so resuming is arithmetic. The stream is one permutation of all rows an epoch,
one epoch after the other; a step takes the next ``global_rows`` of it, also across an epoch's end.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows64 = NDArray[np.int64]

_ROUNDS = 4


class Store(Protocol):
    """What a batch needs of a token store."""

    pad_id: int

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer]: ...
    def targets(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.bool_]: ...
    def column(self, name: str) -> NDArray[np.integer]: ...


class RowIndex(Protocol):
    """Documents arranged into rows: segments of row r are [row_ends[r-1], row_ends[r])."""

    @property
    def documents(self) -> Rows64: ...
    @property
    def starts(self) -> Rows64: ...
    @property
    def lengths(self) -> Rows64: ...
    @property
    def row_ends(self) -> Rows64: ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank; tensors of one device.

    Packed (causal_lm): input_ids and position_ids are (1, N), the documents of all rows one after
    the other without padding; document_ends is (D + 1,) int32 from 0 to N; targets are the U
    positions whose next token is trained, and those tokens.
    Padded (classification): input_ids is (B, T), lengths (B,); targets are rows and label ids.
    """

    input_ids: Tensor
    target_positions: Tensor
    target_ids: Tensor
    rows: tuple[int, ...]
    num_tokens: int
    position_ids: Tensor | None = None
    document_ends: Tensor | None = None
    longest_document_tokens: int = 0
    lengths: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    @property
    def num_padding(self) -> int:
        """Positions that hold no token."""
        return self.input_ids.numel() - self.num_tokens


def permuted(indices: Rows64, num_rows: int, seed: int, epoch: int) -> Rows64:
    """Where the epoch's permutation of ``range(num_rows)`` sends each of `indices`.

    A keyed Feistel network on the next even number of bits, walked until it falls inside the
    range: any index in constant time and memory, and the same on every numpy version.
    (Black & Rogaway 2002, "Ciphers with arbitrary finite domains".)
    """
    half_bits = max(1, math.ceil(math.log2(max(2, num_rows)) / 2))
    mask = np.uint64((1 << half_bits) - 1)
    digest = hashlib.sha256(f"fulltune rows {seed} {epoch}".encode()).digest()
    keys = np.frombuffer(digest, dtype="<u8", count=_ROUNDS)
    result = indices.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        value = result[outside]
        left, right = value >> np.uint64(half_bits), value & mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        result[outside] = (left << np.uint64(half_bits)) | right
        outside = result >= num_rows
    return result.astype(np.int64)


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A 64-bit finaliser (the constants are splitmix64's) keyed by `key`; wraps on purpose."""
    with np.errstate(over="ignore"):
        mixed = values + key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def stream_rows(position: int, count: int, num_rows: int, seed: int) -> Rows64:
    """Rows at [position, position + count) of the endless stream, shape (count,)."""
    positions = np.arange(position, position + count, dtype=np.int64)
    rows = np.empty(count, dtype=np.int64)
    epochs = positions // num_rows
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = permuted(positions[chosen] % num_rows, num_rows, seed, int(epoch))
    return rows


def row_lengths(index: RowIndex) -> Rows64:
    """Tokens of each row, shape (R,)."""
    sums = np.concatenate([[0], np.cumsum(index.lengths)])
    ends = sums[np.asarray(index.row_ends)]
    return np.diff(ends, prepend=0)


def num_micro_batches(num_rows: int, world_size: int, micro_rows: int) -> int:
    """Forward passes of every rank for `num_rows` rows; equal on all ranks, as ZeRO-3 needs."""
    return -(-num_rows // (world_size * micro_rows))


def split_rows(rows: Rows64, lengths: Rows64, world_size: int, micro_rows: int) -> list[list[Rows64]]:
    """``result[micro_batch][rank]``: the rows each rank takes, similar lengths together.

    `lengths` has the tokens of each of `rows`. Where rows do not divide, ranks of the last
    micro-batch get fewer, some perhaps none; every rank has the same number of micro-batches.
    """
    by_length = rows[np.argsort(-lengths, kind="stable")]
    width = world_size * micro_rows
    chunks = [by_length[start : start + width] for start in range(0, len(rows), width)]
    return [[chunk[rank::world_size] for rank in range(world_size)] for chunk in chunks]


def packed_batch(store: Store, index: RowIndex, rows: Rows64, filler_row: int) -> Batch:
    """The documents of `rows`, one after the other. Without rows: `filler_row` with no targets,
    because a rank that has nothing to train must still take part in every collective."""
    tokens, positions, marks, lengths = [], [], [], []
    for row in rows if len(rows) else [filler_row]:
        begin = index.row_ends[row - 1] if row else 0
        for segment in range(begin, index.row_ends[row]):
            document, start = int(index.documents[segment]), int(index.starts[segment])
            length = int(index.lengths[segment])
            tokens.append(store.tokens(document, start, start + length))
            mark = store.targets(document, start, start + length).copy()
            mark[0] = False  # nothing precedes the first token of a segment
            marks.append(mark)
            positions.append(np.arange(length, dtype=np.int64))
            lengths.append(length)
    input_ids = np.concatenate(tokens).astype(np.int64)
    mark = np.concatenate(marks) if len(rows) else np.zeros(len(input_ids), dtype=bool)
    targets = np.flatnonzero(mark)
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        document_ends=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        longest_document_tokens=max(lengths),
        target_positions=torch.from_numpy(targets - 1),
        target_ids=torch.from_numpy(input_ids[targets]),
        rows=tuple(int(row) for row in rows),
        num_tokens=len(input_ids) if len(rows) else 0,
    )


def padded_batch(store: Store, index: RowIndex, rows: Rows64, filler_row: int) -> Batch:
    """One document a row, padded on the right to the longest. Without rows: as `packed_batch`."""
    taken = rows if len(rows) else np.array([filler_row])
    segments = [int(index.row_ends[row]) - 1 for row in taken]
    lengths = np.array([int(index.lengths[segment]) for segment in segments])
    documents = [int(index.documents[segment]) for segment in segments]
    input_ids = np.full((len(taken), int(lengths.max())), store.pad_id, dtype=np.int64)
    for line, (document, segment, length) in enumerate(zip(documents, segments, lengths, strict=True)):
        start = int(index.starts[segment])
        input_ids[line, :length] = store.tokens(document, start, start + int(length))
    labels = np.asarray(store.column("labels"))[documents].astype(np.int64)
    targets = np.arange(len(rows))
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        lengths=torch.from_numpy(lengths),
        target_positions=torch.from_numpy(targets),
        target_ids=torch.from_numpy(labels[: len(rows)]),
        rows=tuple(int(row) for row in rows),
        num_tokens=int(lengths.sum()) if len(rows) else 0,
    )
