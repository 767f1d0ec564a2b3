"""How the rows of a step, or of an evaluation, fall on micro-batches and ranks.

Everything here is a pure function of the rows and sizes, as in `engine.row_stream`: what a rank trains follows from
arithmetic alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.token_store import Rows
from engine.batches import Rows64, row_lengths, row_sums

#: A token's share of all linear layers costs as much as attending over about so many tokens: six times the hidden
#: size where attention is causal. Rows that are full of tokens come in the same order whatever it is.
_LINEAR_TOKENS = 1 << 15


def row_costs(index: Rows, rows: Rows64) -> Rows64:
    """The cost of training each of `rows`, in one unit: attention is quadratic in a document's length, the
    rest linear in tokens."""
    return row_sums(index, rows, lambda lengths: lengths * (lengths + _LINEAR_TOKENS))


@dataclass(frozen=True)
class MicroBatches:
    """How much a rank takes through the model at once: so many rows, or rows of up to so many tokens together."""

    rows: int = 1
    tokens: int | None = None  # goes before `rows`
    is_padded: bool = False  # then each row counts as the longest


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
    """The borders of micro-batches in `rows`, the dearest first."""
    lengths = None if size.tokens is None else row_lengths(index, rows)
    begin = 0
    while begin < len(rows):
        each = size.rows
        if lengths is not None and size.tokens is not None:
            each = _rows_within(lengths[begin:], world_size, size.tokens, size.is_padded)
        yield begin, min(begin + world_size * each, len(rows))
        begin += world_size * each


def _rows_within(lengths: Rows64, world_size: int, micro_tokens: int, is_padded: bool) -> int:
    """How many rows each rank can take from the front so that no rank has more than `micro_tokens`.

    Rows are dealt in rounds of one row a rank, so of each round a rank has the longest at most.
    """
    most = max(1, micro_tokens // int(lengths[0])) if is_padded else micro_tokens
    front = lengths[: most * world_size]
    longest = np.maximum.reduceat(front, np.arange(0, len(front), world_size))  # of each round
    as_padded = np.maximum.accumulate(longest) * np.arange(1, len(longest) + 1)
    positions = as_padded if is_padded else np.cumsum(longest)
    return max(1, int((positions <= micro_tokens).sum()))  # positions only grow, so those that fit come first


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
