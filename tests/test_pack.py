"""Packing: every token once, no row too long, as few rows as the item-by-item algorithm."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.pack import cut_segments, pack_rows


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Space left in every bin, one item at a time, by the textbook."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda index: spaces[index])] -= length
        else:
            spaces.append(capacity - length)
    return sorted(spaces)


def naive_first_fit(lengths: list[int], capacity: int) -> int:
    spaces: list[int] = []
    for length in lengths:
        index = next((index for index, space in enumerate(spaces) if space >= length), None)
        if index is None:
            spaces.append(capacity - length)
        else:
            spaces[index] -= length
    return len(spaces)


@st.composite
def corpora(draw: st.DrawFn) -> tuple[int, list[int]]:
    capacity = draw(st.integers(1, 70))
    return capacity, draw(st.lists(st.integers(1, capacity), max_size=120))


@settings(max_examples=300, deadline=None)
@given(corpora())
def test_rows_hold_every_segment_once_and_equal_the_naive_algorithm(corpus: tuple[int, list[int]]) -> None:
    capacity, lengths = corpus
    order, ends = pack_rows(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    rows = np.split(order, ends[:-1]) if len(ends) else []
    sums = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < total <= capacity for total in sums)
    assert sorted(capacity - total for total in sums) == naive_best_fit_decreasing(lengths, capacity)


def test_never_more_rows_than_first_fit_and_nearly_full_on_real_length_distributions() -> None:
    rng = np.random.default_rng(3)
    for capacity in (256, 2048):
        for spread in (0.5, 1.0, 1.6):
            lengths = np.clip(rng.lognormal(4.5, spread, 3000).astype(np.int64) + 1, 1, capacity)
            _, ends = pack_rows(lengths, capacity)
            assert len(ends) <= naive_first_fit(lengths.tolist(), capacity)
            fewest = -(-int(lengths.sum()) // capacity)
            over_half = int((lengths > capacity // 2).sum())
            assert len(ends) <= max(fewest * 1.02 + 1, over_half + 1)


def test_equal_lengths_take_documents_in_store_order() -> None:
    order, ends = pack_rows(np.array([3, 3, 3, 3, 3], dtype=np.int64), 6)
    assert order.tolist() == [0, 1, 2, 3, 4]
    assert ends.tolist() == [2, 4, 5]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(2, 20))
def test_split_keeps_every_token_in_order(lengths: list[int], row_tokens: int) -> None:
    segments = cut_segments(np.array(lengths, dtype=np.int64), row_tokens, "split")
    seen = [
        (int(document), token)
        for document, start, length in zip(segments.documents, segments.starts, segments.lengths, strict=True)
        for token in range(int(start), int(start + length))
    ]
    assert seen == [(document, token) for document, length in enumerate(lengths) for token in range(length)]
    assert all(1 <= length <= row_tokens for length in segments.lengths)


def test_drop_and_truncate() -> None:
    lengths = np.array([5, 12, 8, 30], dtype=np.int64)
    dropped = cut_segments(lengths, 8, "drop")
    assert dropped.documents.tolist() == [0, 2] and dropped.overlong.tolist() == [1, 3]
    truncated = cut_segments(lengths, 8, "truncate")
    assert truncated.documents.tolist() == [0, 1, 2, 3]
    assert truncated.starts.tolist() == [0, 0, 0, 0] and truncated.lengths.tolist() == [5, 8, 8, 8]


def test_no_documents_no_rows() -> None:
    order, ends = pack_rows(np.zeros(0, dtype=np.int64), 8)
    assert len(order) == len(ends) == 0
