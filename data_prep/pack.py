"""Arranges documents into rows: what happens to over-long ones, then best-fit decreasing over the whole set.

Best-fit decreasing never asks which document of a length it places, so it runs on the histogram of
lengths: bins with equal content are one group, and a length's documents move through whole groups at
once. The work is O(documents) in numpy plus a number of group steps that depends on how many different
lengths there are. Only at the end do concrete documents take the places, in the order of the store.
"""

from dataclasses import dataclass

import numpy as np

from data_prep.config import Overlong


@dataclass(frozen=True)
class Segments:
    """Pieces of documents that fit a row, and the documents that did not come whole. int64 arrays."""

    documents: np.ndarray  # [S] segment -> document
    starts: np.ndarray  # [S] first token in the document
    lengths: np.ndarray  # [S] 1..row_tokens
    overlong: np.ndarray  # documents longer than a row


def cut_segments(document_lengths: np.ndarray, row_tokens: int, overlong: Overlong) -> Segments:
    """Cut documents (int64 [N] lengths) to at most `row_tokens`. ``error`` is the caller's: it keeps none of them.

    ``split`` gives consecutive pieces that hold every token once; ``truncate`` keeps the first row.
    """
    too_long = np.flatnonzero(document_lengths > row_tokens)
    pieces = np.ones(len(document_lengths), dtype=np.int64)
    if overlong == "split":
        pieces[too_long] = -(-document_lengths[too_long] // row_tokens)
    elif overlong != "truncate":
        pieces[too_long] = 0
    documents = np.repeat(np.arange(len(document_lengths), dtype=np.int64), pieces)
    first_piece = np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = (np.arange(len(documents), dtype=np.int64) - first_piece) * row_tokens
    lengths = np.minimum(document_lengths[documents] - starts, row_tokens)
    return Segments(documents, starts, lengths, too_long)


@dataclass(frozen=True)
class _Pattern:
    """Content of equal bins, as a chain: `count` items of `length` on top of what `below` holds."""

    length: int
    count: int
    below: "_Pattern | None"


def pack_rows(lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing of `lengths` (int64 [S], 1..row_tokens) into rows.

    Returns order (int64 [S]: segments in row order) and row_ends (int64 [R]: row r is
    order[row_ends[r - 1]:row_ends[r]]). Deterministic; the number of rows is that of the
    ordinary item-by-item algorithm.
    """
    if len(lengths) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    assert int(lengths.min()) > 0 and int(lengths.max()) <= row_tokens
    counts = np.bincount(lengths, minlength=row_tokens + 1)
    groups = _fill_bins(counts, row_tokens)
    return _hand_out(lengths, counts, groups)


def _fill_bins(counts: np.ndarray, row_tokens: int) -> list[tuple[_Pattern, int]]:
    """Groups (pattern, number of equal bins) that hold `counts[length]` items of every length."""
    closed: list[tuple[_Pattern, int]] = []
    open_bins: dict[int, list[tuple[_Pattern | None, int]]] = {}
    occupied = 0  # bit s is set while some open bin has s tokens of space left

    def put(pattern: _Pattern, num_bins: int, space: int) -> None:
        nonlocal occupied
        if space == 0:
            closed.append((pattern, num_bins))
            return
        open_bins.setdefault(space, []).append((pattern, num_bins))
        occupied |= 1 << space

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = occupied >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                below, num_bins = open_bins[space].pop()
                if not open_bins[space]:
                    del open_bins[space]
                    occupied ^= 1 << space
            else:
                space, below, num_bins = row_tokens, None, left
            # A bin that took one item is now the tightest fit, so it takes equal ones until it is full.
            each = space // length
            filled = min(num_bins, left // each)
            if filled:
                put(_Pattern(length, each, below), filled, space - each * length)
                left -= filled * each
            rest = num_bins - filled
            if rest and left:
                # Fewer than `each` remain, or bins ran out: one bin takes what is left.
                put(_Pattern(length, left, below), 1, space - left * length)
                rest, left = rest - 1, 0
            if rest and below is not None:
                put(below, rest, space)
    for space in sorted(open_bins):
        closed.extend((pattern, num_bins) for pattern, num_bins in open_bins[space] if pattern is not None)
    return closed


def _hand_out(
    lengths: np.ndarray, counts: np.ndarray, groups: list[tuple[_Pattern, int]]
) -> tuple[np.ndarray, np.ndarray]:
    by_length = np.argsort(lengths, kind="stable").astype(np.int64)
    next_free = np.cumsum(counts) - counts
    order = np.empty(len(lengths), dtype=np.int64)
    row_sizes = []
    filled = 0
    for pattern, num_bins in groups:
        chain: list[tuple[int, int]] = []
        node: _Pattern | None = pattern
        while node is not None:
            chain.append((node.length, node.count))
            node = node.below
        chain.reverse()
        size = sum(count for _, count in chain)
        rows = order[filled : filled + num_bins * size].reshape(num_bins, size)
        column = 0
        for length, count in chain:
            first = next_free[length]
            rows[:, column : column + count] = by_length[first : first + num_bins * count].reshape(num_bins, count)
            next_free[length] = first + num_bins * count
            column += count
        filled += num_bins * size
        row_sizes.append((size, num_bins))
    sizes = np.repeat([size for size, _ in row_sizes], [num_bins for _, num_bins in row_sizes])
    return order, np.cumsum(sizes, dtype=np.int64)
