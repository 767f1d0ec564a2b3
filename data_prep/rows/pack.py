"""Fills rows with documents: best-fit decreasing over the whole set, or one stream cut into rows; truncates.

Best-fit decreasing never asks which document of a length it places, so it runs on the histogram of
lengths: bins with equal content are one group, and a length's documents move through whole groups at
once. The work is O(documents) in numpy plus a number of group steps that depends on how many different
lengths there are. Only at the end do concrete documents take the places, in the order of the store.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np

from data_prep.token_store import TokenStore

_BLOCK = 1 << 18  # segments that are sorted at once
_STRETCHES_AT_ONCE = 1 << 12  # stretches of equal segments that are copied at once
_WORD = 512  # bits of one word of the set of spaces


class _Pattern(NamedTuple):
    """Content of equal bins, as a chain: `items` of `length` on top of what `below` holds."""

    length: int
    items: int
    below: "_Pattern | None"


def pack_rows(lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing of `lengths` (unsigned or int64 [S], 1..row_tokens) into rows.

    Returns order (uint32 [S]: segments in row order) and row_ends (int64 [R]: row r is
    order[row_ends[r - 1]:row_ends[r]]). Deterministic; the number of rows is that of the
    ordinary item-by-item algorithm. Needs 8 bytes a segment, and a fixed amount besides.
    """
    if len(lengths) == 0:
        return np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.int64)
    assert int(lengths.min()) > 0 and int(lengths.max()) <= row_tokens and len(lengths) < 2**32
    counts = np.zeros(row_tokens + 1, dtype=np.int64)
    for first in range(0, len(lengths), _BLOCK):
        counts += np.bincount(lengths[first : first + _BLOCK].astype(np.int64), minlength=row_tokens + 1)
    return _hand_out(_sorted_by_length(lengths, counts), counts, _fill_bins(counts, row_tokens))


def _sorted_by_length(lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """uint32 [S]: the segments in order of length, equal ones in their own order. A counting sort, block by block."""
    by_length = np.empty(len(lengths), dtype=np.uint32)
    next_place = np.cumsum(counts) - counts
    for first in range(0, len(lengths), _BLOCK):
        block = lengths[first : first + _BLOCK]
        # numpy sorts two-byte keys by radix, several times faster than it compares wider ones.
        inner = np.argsort(block.astype(np.uint16), kind="stable")
        if len(counts) > 1 << 16:
            inner = inner[np.argsort((block[inner] >> 16).astype(np.uint16), kind="stable")]
        keys = block[inner]
        begins = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        sizes = np.diff(begins, append=len(keys))
        present = keys[begins].astype(np.int64)
        places = np.repeat(next_place[present] - begins, sizes)
        places += np.arange(len(keys))
        inner += first
        by_length[places] = inner
        next_place[present] += sizes
    return by_length


class _OpenBins:
    """Bins that have space left, by how much: groups of equal ones, the tightest that fits found in two steps.

    Which spaces occur is a set of bits in two levels, because shifting one whole number of 128k bits
    at every step would cost more than all else: bit s % 512 of words[s // 512], and bit n of `busy`
    where words[n] is not 0.
    """

    def __init__(self, row_tokens: int):
        self.groups: dict[int, list[tuple[_Pattern, int]]] = {}
        self._words = [0] * (row_tokens // _WORD + 1)
        self._busy = 0

    def put(self, space: int, pattern: _Pattern, num_bins: int) -> None:
        groups = self.groups.get(space)
        if groups is not None:
            groups.append((pattern, num_bins))
            return
        self.groups[space] = [(pattern, num_bins)]
        self._words[space // _WORD] |= 1 << space % _WORD
        self._busy |= 1 << space // _WORD

    def take(self, length: int) -> tuple[int, _Pattern, int] | None:
        """Space, content and number of the bins with the least space that holds `length`; they leave the set."""
        number, words = length // _WORD, self._words
        fitting = words[number] >> length % _WORD << length % _WORD
        if not fitting:
            later = self._busy >> number + 1 << number + 1
            if not later:
                return None
            number = (later & -later).bit_length() - 1
            fitting = words[number]
        bit = fitting & -fitting
        space = number * _WORD + bit.bit_length() - 1
        groups = self.groups[space]
        pattern, num_bins = groups.pop()
        if not groups:
            del self.groups[space]
            words[number] ^= bit
            if not words[number]:
                self._busy ^= 1 << number
        return space, pattern, num_bins


def _fill_bins(counts: np.ndarray, row_tokens: int) -> list[tuple[_Pattern, int]]:
    """Groups (pattern, number of equal bins) that hold `counts[length]` items of every length."""
    full: list[tuple[_Pattern, int]] = []
    bins = _OpenBins(row_tokens)

    def put(space: int, pattern: _Pattern, num_bins: int) -> None:
        if space:
            bins.put(space, pattern, num_bins)
        else:
            full.append((pattern, num_bins))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            below: _Pattern | None
            space, below, num_bins = bins.take(length) or (row_tokens, None, left)
            # A bin that took one item is now the tightest fit, so it takes equal ones until it is full.
            each = space // length
            filled = min(num_bins, left // each)
            if filled:
                put(space - each * length, _Pattern(length, each, below), filled)
                left -= filled * each
            rest = num_bins - filled
            if rest and left:
                # Fewer than `each` remain, or bins ran out: one bin takes what is left.
                put(space - left * length, _Pattern(length, left, below), 1)
                rest, left = rest - 1, 0
            if rest and below is not None:
                bins.put(space, below, rest)
    for space in sorted(bins.groups):
        full.extend(bins.groups[space])
    return full


def _hand_out(
    by_length: np.ndarray, counts: np.ndarray, groups: list[tuple[_Pattern, int]]
) -> tuple[np.ndarray, np.ndarray]:
    next_free = (np.cumsum(counts) - counts).tolist()
    order = np.empty(len(by_length), dtype=np.uint32)
    row_sizes, repeats = [], []
    single: list[tuple[int, int, int]] = []  # of bins without an equal: place in `order`, first in `by_length`, count
    filled = 0
    for pattern, num_bins in groups:
        chain: list[tuple[int, int]] = []
        node: _Pattern | None = pattern
        while node is not None:
            chain.append((node.length, node.items))
            node = node.below
        size = sum([count for _, count in chain])
        row_sizes.append(size)
        repeats.append(num_bins)
        if num_bins == 1:
            for length, count in reversed(chain):
                first = next_free[length]
                single.append((filled, first, count))
                next_free[length] = first + count
                filled += count
            continue
        rows = order[filled : filled + num_bins * size].reshape(num_bins, size)
        column = 0
        for length, count in reversed(chain):
            first, taken = next_free[length], num_bins * count
            rows[:, column : column + count] = by_length[first : first + taken].reshape(num_bins, count)
            next_free[length] = first + taken
            column += count
        filled += num_bins * size
    for start in range(0, len(single), _STRETCHES_AT_ONCE):
        places, firsts, sizes = np.array(single[start : start + _STRETCHES_AT_ONCE], dtype=np.int64).T
        inner = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        order[np.repeat(places, sizes) + inner] = by_length[np.repeat(firsts, sizes) + inner]
    return order, np.cumsum(np.repeat(row_sizes, repeats), dtype=np.int64)


def wrap_rows(lengths: np.ndarray, filled: int, row_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents (int64 [D] lengths > 0) as one stream, cut wherever a row is full.

    `filled` (0..row_tokens - 1) is how full the first row is already. Returns the ends of the segments in
    the stream (int64 [S], the first begins at `filled`), the document of each, and row_ends (int64 [R]: as
    `pack_rows`) of the rows that became full; the segments after the last of them are in an unfinished row.
    """
    ends = filled + np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else filled
    full = np.arange(row_tokens, total + 1, row_tokens, dtype=np.int64)
    places = np.searchsorted(ends, full)
    apart = ends[np.minimum(places, len(ends) - 1)] != full if len(ends) else full > 0
    cuts = np.insert(ends, places[apart], full[apart])
    inside = np.insert(np.zeros(len(ends), dtype=bool), places[apart], True)  # cuts inside a document
    which = np.zeros(len(cuts), dtype=np.int64)
    which[1:] = np.cumsum(~inside)[:-1]
    return cuts, which, np.flatnonzero(cuts % row_tokens == 0) + 1


_CHATS = frozenset({"messages", "sharegpt"})
_CLOSING = "\"'”’»)]*_`"
_STOPS = (".", "!", "?", "…")
_FULL_WIDTH_STOPS = ("。", "！", "？", "｡")


class Truncation:
    """Finds the cuts for one store; looks at its vocabulary once, when the first text needs it."""

    def __init__(self, store: TokenStore, row_tokens: int):
        self._store = store
        self._row_tokens = row_tokens

    def kept_tokens(self, document: int, shape: str) -> int:
        """How many tokens (1..row_tokens) to keep of `document`, which has more than a row of them.

        A conversation is cut after the last trained turn that fits whole. Other documents, and
        conversations whose first trained turn is too long already, end after the last sentence or line
        in the row's last quarter.
        """
        size = self._row_tokens
        if shape in _CHATS:
            marks = self._store.targets(document, 0, size + 1)
            turns = np.flatnonzero(marks[:-1] & ~marks[1:])
            if len(turns):
                return int(turns[-1]) + 1
        first = size - max(1, size // 4)
        ids = self._store.tokens(document, first, size + 1)
        if int(ids.max()) >= self._store.vocab_size:
            return size
        line, stop, closing, blank = (table[ids] for table in self._vocabulary)
        stop[1:] |= closing[1:] & stop[:-1]
        ends = np.flatnonzero(line[:-1] | (stop[:-1] & blank[1:]))
        return first + int(ends[-1]) + 1 if len(ends) else size

    @cached_property
    def _vocabulary(self) -> tuple[np.ndarray, ...]:
        """bool [V] each: ends a line, or a sentence whatever follows; ends a sentence if a blank follows; is
        nothing but quotes and brackets that may stand between the two; begins with a blank."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._store.tokenizer_dir / "tokenizer.json"))
        pieces = [tokenizer.id_to_token(index) or "" for index in range(self._store.vocab_size)]
        texts = tokenizer.decode_batch([[index] for index in range(len(pieces))], skip_special_tokens=False)
        joined = "##" if any(piece.startswith("##") for piece in pieces) else None
        bare = [text.rstrip(_CLOSING) for text in texts]
        line = [text.endswith("\n") or end.endswith(_FULL_WIDTH_STOPS) for text, end in zip(texts, bare, strict=True)]
        stop = [end.endswith(_STOPS) for end in bare]
        closing = [bool(text) and not end for text, end in zip(texts, bare, strict=True)]
        blank = [
            not piece.startswith(joined) if joined else piece.startswith(("Ġ", "▁", "Ċ")) or text[:1].isspace()
            for piece, text in zip(pieces, texts, strict=True)
        ]
        return tuple(np.array(table, dtype=bool) for table in (line, stop, closing, blank))
