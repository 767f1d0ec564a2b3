"""Byte-pair learning on top of tokens that exist: merges the most frequent neighbours, again and again.

Nothing is recounted. Every token of the text is a place in flat arrays, linked to its neighbours; every
pair of neighbours knows the places where it once stood. A merge rewrites the places of its pair only and
notes the pairs that it creates. Pairs that lost places find out when their turn comes: their count is
an upper bound until then, so the first whose count holds true is the most frequent of all.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_BORDER, _GONE = -1, -2
_AT_ONCE = 1 << 62


@dataclass(frozen=True)
class Merge:
    """Tokens `left` and `right` become `token`. A token can come from several merges."""

    left: int
    right: int
    token: int


def learn_merges(
    words: Sequence[Sequence[int]],
    counts: Sequence[int],
    name: Callable[[int, int], int | None],
    num_tokens: int,
    min_count: int = 2,
) -> tuple[list[Merge], dict[int, int]]:
    """Merges in the order in which they apply, and how often each token stands in the text in the end.

    words: token ids of every different word, -1 for what must not be merged; counts: how often the word occurs.
    name(left, right): the id for a merge of these two, the same for equal texts, or None to forbid it. Stops
    after `num_tokens` different ids, or when no pair occurs `min_count` times. Ties go to the smaller ids.
    """
    text = _LinkedText(words, counts)
    merges: list[Merge] = []
    learned: dict[int, int] = {}  # pair -> its place in `merges`
    made: set[int] = set()
    while text.queue:
        negative, pair = heapq.heappop(text.queue)
        places = text.places_of(pair)
        count = int(text.weights[places].sum())
        rank = learned.get(pair)
        token = None if rank is None else merges[rank].token
        if token is None:
            if count < min_count:
                continue
            if count < -negative:  # it has lost places since it was queued
                heapq.heappush(text.queue, (-count, pair))
                continue
            token = name(pair >> 32, pair & 0xFFFFFFFF)
            if token is None:
                text.forget(pair)
                continue
            if token not in made and len(made) == num_tokens:
                break
            made.add(token)
            learned[pair] = len(merges)
            merges.append(Merge(pair >> 32, pair & 0xFFFFFFFF, token))
        text.merge(pair, places, token, learned, min_count)
    return merges, text.token_counts()


class _LinkedText:
    """Different words one after the other, with borders between them; all arrays are [places]."""

    def __init__(self, words: Sequence[Sequence[int]], counts: Sequence[int]):
        lengths = np.array([len(word) + 1 for word in words], dtype=np.int64)
        size = int(lengths.sum()) + 1
        self.ids = np.full(size, _BORDER, dtype=np.int64)
        inside = np.ones(size, dtype=bool)
        inside[0] = False
        inside[np.cumsum(lengths)] = False
        self.ids[inside] = np.fromiter((index for word in words for index in word), np.int64, int(inside.sum()))
        self.weights = np.zeros(size, dtype=np.int64)
        self.weights[1:] = np.repeat(np.asarray(counts, dtype=np.int64), lengths)
        self.next = np.arange(1, size + 1, dtype=np.int32)
        self.previous = np.arange(-1, size - 1, dtype=np.int32)
        self.queue: list[tuple[int, int]] = []  # (-count, pair); a pair is left << 32 | right
        self._places: dict[int, list[np.ndarray]] = {}
        self._bounds: dict[int, int] = {}
        self._note(np.flatnonzero((self.ids[:-1] >= 0) & (self.ids[1:] >= 0)), {}, 2)
        heapq.heapify(self.queue)

    def _note(self, places: np.ndarray, learned: dict[int, int], min_count: int) -> None:
        """Put the pairs that stand at `places` into the index, and into the queue."""
        if not len(places):
            return
        pairs = self.ids[places] << 32 | self.ids[self.next[places]]
        order = np.argsort(pairs, kind="stable")
        pairs, places = pairs[order], places[order]
        starts = np.flatnonzero(np.diff(pairs, prepend=-1))
        totals = np.add.reduceat(self.weights[places], starts)
        stops = [*starts[1:].tolist(), len(places)]
        first = not self._places
        for pair, total, start, stop in zip(
            pairs[starts].tolist(), totals.tolist(), starts.tolist(), stops, strict=True
        ):
            self._places.setdefault(pair, []).append(places[start:stop])
            bound = self._bounds[pair] = self._bounds.get(pair, 0) + total
            if first:
                self.queue.append((-bound, pair))
            elif pair in learned:  # which a tokenizer would merge at once, the earliest learned first
                heapq.heappush(self.queue, (learned[pair] - _AT_ONCE, pair))
            elif bound >= min_count:
                heapq.heappush(self.queue, (-bound, pair))

    def places_of(self, pair: int) -> np.ndarray:
        """Where the pair stands now, without overlaps, in order."""
        found = self._places.get(pair)
        if found is None:
            return np.zeros(0, dtype=np.int64)
        left, right = pair >> 32, pair & 0xFFFFFFFF
        places = found[0] if len(found) == 1 else np.unique(np.concatenate(found))
        places = places[(self.ids[places] == left) & (self.ids[self.next[places]] == right)]
        self._places[pair] = [places]
        self._bounds[pair] = int(self.weights[places].sum())
        return self._without_overlaps(places) if left == right else places

    def _without_overlaps(self, places: np.ndarray) -> np.ndarray:
        """Of a run of one token, pairs from its start: the second token of one is not the first of the next."""
        kept, taken = [], -1
        for place, after in zip(places.tolist(), self.next[places].tolist(), strict=True):
            if place != taken:
                kept.append(place)
                taken = after
        return np.array(kept, dtype=np.int64)

    def forget(self, pair: int) -> None:
        """A forbidden pair needs no index."""
        del self._places[pair]

    def merge(self, pair: int, places: np.ndarray, token: int, learned: dict[int, int], min_count: int) -> None:
        """Rewrite the pair at `places` to `token`."""
        self._places.pop(pair, None)
        self._bounds.pop(pair, None)
        second = self.next[places]
        self.ids[places] = token
        self.ids[second] = _GONE
        after = self.next[second]
        self.next[places] = after
        self.previous[after] = places
        before = self.previous[places]
        changed = np.unique(np.concatenate([before[self.ids[before] >= 0], places[self.ids[after] >= 0]]))
        self._note(changed.astype(np.int64), learned, min_count)

    def token_counts(self) -> dict[int, int]:
        """Occurrences of every token that is there."""
        alive = self.ids >= 0
        tokens, inverse = np.unique(self.ids[alive], return_inverse=True)
        totals = np.bincount(inverse, weights=self.weights[alive], minlength=len(tokens))
        return dict(zip(tokens.tolist(), totals.astype(np.int64).tolist(), strict=True))
