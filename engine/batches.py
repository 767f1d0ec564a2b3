"""Which rows a step uses, how they fall on ranks and micro-batches, and the tensors they become.

Everything here is a pure function of (seed, position in the endless stream of rows, sizes): no
iterator, no state, so resuming is arithmetic. The stream is one permutation of all rows an epoch,
one epoch after the other; a step takes the next ``global_rows`` of it, also across an epoch's end.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.token_store import Rows, RowSource, TokenStore

Rows64 = NDArray[np.int64]

_ROUNDS = 4
#: A token's share of all linear layers costs as much as attending over about so many tokens: six times the hidden
#: size where attention is causal. Rows that are full of tokens come in the same order whatever it is.
_LINEAR_TOKENS = 1 << 15


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank; tensors of one device. B rows, T tokens, D documents, U targets.

    Packed: input_ids and position_ids are (1, T), the documents of all rows one after the other
    without padding; document_ends is (D + 1,) int32 from 0 to T.
    Padded: input_ids is (B, T), one document a row, padded on the right; lengths is (B,).
    What targets are is the task's affair, and so are the columns that it adds.
    """

    input_ids: Tensor
    target_positions: Tensor  # (U,)
    target_ids: Tensor  # (U,)
    rows: tuple[int, ...]  # none in a filler batch
    num_tokens: int
    position_ids: Tensor | None = None
    document_ends: Tensor | None = None
    longest_document_tokens: int = 0
    lengths: Tensor | None = None
    row_tokens: tuple[int, ...] = ()  # of each row; none in a filler batch
    columns: Mapping[str, Tensor] = field(default_factory=dict)

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
    def attention_mask(self) -> Tensor:
        """(B, T) int64 of a padded batch: 1 for tokens, 0 for padding."""
        assert self.lengths is not None
        positions = torch.arange(self.input_ids.shape[1], device=self.lengths.device)
        return (positions < self.lengths[:, None]).long()

    @property
    def num_padding(self) -> int:
        """Positions that hold no token."""
        return self.input_ids.numel() - self.num_tokens


def permuted(indices: Rows64, num_rows: int, seed: int, epoch: int | str) -> Rows64:
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


def rows_of_epoch(sources: Sequence[RowSource]) -> int:
    """Rows of one epoch."""
    return sum(source.rows_per_epoch for source in sources)


def stream_rows(position: int, count: int, sources: Sequence[RowSource], seed: int) -> Rows64:
    """Rows at [position, position + count) of the endless stream, shape (count,).

    An epoch is a permutation of its places; a source has as many of them as it has rows, unless the
    mixture says otherwise.
    """
    num_places = rows_of_epoch(sources)
    positions = np.arange(position, position + count, dtype=np.int64)
    rows = np.empty(count, dtype=np.int64)
    epochs = positions // num_places
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        places = permuted(positions[chosen] % num_places, num_places, seed, epoch)
        rows[chosen] = _rows_at(places, sources, seed, epoch)
    return rows


def _rows_at(places: Rows64, sources: Sequence[RowSource], seed: int, epoch: int) -> Rows64:
    """The rows at places of an epoch, which hold the sources one after the other.

    A source fills its places with all its rows, as often as they fit, and the rest with the next part
    of an order of its own that goes on from epoch to epoch: with half the rows an epoch, two epochs
    use each once. No row comes twice as often as another.
    """
    rows = np.empty(len(places), dtype=np.int64)
    ends = np.cumsum([source.rows_per_epoch for source in sources])
    which = np.searchsorted(ends, places, side="right")
    for number in np.unique(which).tolist():
        source = sources[number]
        here = which == number
        inner = places[here] - (int(ends[number]) - source.rows_per_epoch)
        repeats, rest = divmod(source.rows_per_epoch, source.num_rows)
        beyond = inner >= repeats * source.num_rows
        inner[~beyond] %= source.num_rows
        turn = (inner[beyond] - repeats * source.num_rows + epoch * rest) % source.num_rows
        inner[beyond] = permuted(turn, source.num_rows, seed, f"part of {number}")
        rows[here] = source.first_row + inner
    return rows


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
    return _row_sums(index, rows, lambda lengths: lengths)


def row_costs(index: Rows, rows: Rows64) -> Rows64:
    """What each of `rows` costs to train, in one unit: attention is quadratic in a document's length, the
    rest linear in tokens."""
    return _row_sums(index, rows, lambda lengths: lengths * (lengths + _LINEAR_TOKENS))


def _row_sums(index: Rows, rows: Rows64, value: Callable[[Rows64], Rows64]) -> Rows64:
    if len(rows) == 0:
        return np.zeros(0, dtype=np.int64)
    _, _, lengths, counts = segments_of(index, rows)
    return np.add.reduceat(value(lengths), np.cumsum(counts) - counts)


@dataclass(frozen=True)
class MicroBatches:
    """How much a rank takes through the model at once: so many rows, or rows x longest up to so many tokens."""

    rows: int = 1
    tokens: int | None = None  # goes before `rows`


def split_rows(index: Rows, rows: Rows64, world_size: int, size: MicroBatches) -> list[list[Rows64]]:
    """``result[micro_batch][rank]``: the rows each rank takes, at nearly equal cost for all ranks.

    Ranks meet in every layer, so each micro-batch takes as long as its dearest rank. Rows of similar
    cost come together, and within a micro-batch each next dearest row goes to the rank that has least.
    Where rows do not divide, ranks of the last micro-batch get fewer, some perhaps none; every rank
    has the same number of micro-batches. A pure function of the rows and sizes.
    """
    rows, costs = _dearest_first(index, rows)
    totals = np.zeros(world_size, dtype=np.int64)
    return [
        _deal(rows[begin:end], costs[begin:end], world_size, totals)
        for begin, end in _micro_batch_borders(index, rows, world_size, size)
    ]


def row_groups(index: Rows, rows: Rows64, size: MicroBatches) -> list[Rows64]:
    """`rows` in micro-batches of one rank each, of similar cost, the dearest first. No number of ranks is in it."""
    rows, _ = _dearest_first(index, rows)
    return [rows[begin:end] for begin, end in _micro_batch_borders(index, rows, 1, size)]


def groups_of_sources(index: Rows, size: MicroBatches) -> list[tuple[int, Rows64]]:
    """The micro-batches of an evaluation: (number of the source, rows), so that none mixes sources."""
    return [
        (number, rows)
        for number, source in enumerate(index.sources)
        for rows in row_groups(index, np.arange(source.first_row, source.first_row + source.num_rows), size)
    ]


def _dearest_first(index: Rows, rows: Rows64) -> tuple[Rows64, Rows64]:
    """`rows` by falling cost, and their costs."""
    costs = row_costs(index, rows)
    order = np.argsort(-costs, kind="stable")
    return rows[order], costs[order]


def _micro_batch_borders(index: Rows, rows: Rows64, world_size: int, size: MicroBatches) -> Iterator[tuple[int, int]]:
    """Where micro-batches begin and end in `rows`, the dearest first."""
    lengths = None if size.tokens is None else row_lengths(index, rows)
    begin = 0
    while begin < len(rows):
        each = size.rows
        if lengths is not None and size.tokens is not None:
            each = _rows_within(lengths[begin:], world_size, size.tokens)
        yield begin, min(begin + world_size * each, len(rows))
        begin += world_size * each


def _rows_within(lengths: Rows64, world_size: int, micro_tokens: int) -> int:
    """How many rows each rank can take from the front so that rows x longest stays within `micro_tokens`."""
    most = max(1, micro_tokens // int(lengths[0]))
    longest = np.maximum.accumulate(lengths[: most * world_size])
    each = np.arange(1, -(-len(longest) // world_size) + 1)
    fits = longest[np.minimum(each * world_size, len(longest)) - 1] * each <= micro_tokens
    return max(1, int(fits.sum()))  # both factors grow, so those that fit come first


def _deal(rows: Rows64, costs: Rows64, world_size: int, totals: Rows64) -> list[Rows64]:
    """Give the rows of one micro-batch to the ranks, a round of one row each at a time; adds to `totals`."""
    taken: list[list[int]] = [[] for _ in range(world_size)]
    sums = np.zeros(world_size, dtype=np.int64)
    for begin in range(0, len(rows), world_size):
        # Equal ranks of this micro-batch: the one with least so far in the step goes first.
        ranks = np.lexsort((totals, sums))[: len(rows) - begin]
        for place, rank in enumerate(ranks.tolist(), begin):
            taken[rank].append(int(rows[place]))
            sums[rank] += costs[place]
            totals[rank] += costs[place]
    return [np.array(own, dtype=np.int64) for own in taken]


def packed_batch(store: TokenStore, index: Rows, rows: Rows64, filler_row: int) -> Batch:
    """The documents of `rows`, one after the other. Without rows: `filler_row` with no targets,
    because a rank that has nothing to train must still take part in every collective."""
    taken = rows if len(rows) else np.array([filler_row])
    documents, starts, lengths, _ = segments_of(index, taken)
    input_ids, marks = store.gather(documents, starts, lengths)
    ends = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=ends[1:])
    positions = np.arange(len(input_ids))
    positions -= np.repeat(ends[:-1], lengths)
    if len(rows):
        marks[ends[:-1]] = False  # nothing precedes the first token of a segment
        targets = np.flatnonzero(marks)
    else:
        targets = np.zeros(0, dtype=np.int64)
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        document_ends=torch.from_numpy(ends),
        longest_document_tokens=int(lengths.max()),
        target_positions=torch.from_numpy(targets - 1),
        target_ids=torch.from_numpy(input_ids.take(targets)),
        rows=tuple(rows.tolist()),
        num_tokens=len(input_ids) if len(rows) else 0,
        row_tokens=tuple(row_lengths(index, rows).tolist()),
    )


def padded_batch(store: TokenStore, index: Rows, rows: Rows64, filler_row: int, columns: Sequence[str] = ()) -> Batch:
    """A batch with one document a row, padded on the right to the longest. Without rows: as `packed_batch`.

    Targets are the marked tokens, at their positions in the flattened (B, T). `columns` of the store,
    which have one value a document, come along as (B,) int64.
    """
    taken = rows if len(rows) else np.array([filler_row])
    documents, starts, lengths, _ = segments_of(index, taken)
    assert len(documents) == len(taken), "a row of a padded task holds one document"
    tokens, marks = store.gather(documents, starts, lengths)
    input_ids, marked = pad(tokens, lengths, store.pad_id), pad(marks & (len(rows) > 0), lengths, 0)
    targets = np.flatnonzero(marked)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        lengths=torch.from_numpy(lengths),
        target_positions=torch.from_numpy(targets),
        target_ids=torch.from_numpy(input_ids.reshape(-1)[targets]),
        rows=tuple(rows.tolist()),
        num_tokens=int(lengths.sum()) if len(rows) else 0,
        row_tokens=tuple(lengths.tolist()) if len(rows) else (),
        columns={name: torch.from_numpy(store.column(name)[documents].astype(np.int64)) for name in columns},
    )


def pad(values: NDArray[Any], lengths: Rows64, fill: int) -> Rows64:
    """Values of documents one after the other as (B, T) int64, each document in a row of its own, `fill` behind it."""
    padded = np.full((len(lengths), int(lengths.max())), fill, dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = values
    return padded
