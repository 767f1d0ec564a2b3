"""Packing: every token once, no row too long, as few rows as the item-by-item algorithm."""

import tracemalloc

import numpy as np
import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from data_prep.rows.pack import pack_rows, wrap_rows


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


@examples(300)
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


@examples(200)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(2, 20), st.data())
def test_wrap_is_one_stream_cut_where_rows_are_full(lengths: list[int], row_tokens: int, data: st.DataObject) -> None:
    filled = data.draw(st.integers(0, row_tokens - 1))
    cuts, documents, row_ends = wrap_rows(np.array(lengths, dtype=np.int64), filled, row_tokens)
    stream = [document for document, length in enumerate(lengths) for _ in range(length)]
    begins = [filled, *cuts.tolist()][: len(cuts)]
    seen = [
        int(document)
        for document, begin, cut in zip(documents, begins, cuts, strict=True)
        for _ in range(begin, int(cut))
    ]
    assert seen == stream
    full = [int(cuts[end - 1]) for end in row_ends]
    assert full == list(range(row_tokens, filled + len(stream) + 1, row_tokens))
    assert all(begin // row_tokens == (int(cut) - 1) // row_tokens for begin, cut in zip(begins, cuts, strict=True))


def real_lengths(kind: str, count: int, capacity: int) -> np.ndarray:
    """Lengths shaped like conversations (mean about 137 tokens) or like documents."""
    center, spread = (4.6, 0.8) if kind == "instruct" else (7.0, 1.3)
    drawn = np.random.default_rng(0).lognormal(center, spread, count)
    return np.clip(drawn, 1, capacity).astype(np.uint32)


@pytest.mark.parametrize("capacity", [2048, 8192, 32768, 131072])
@pytest.mark.parametrize("kind", ["instruct", "docs"])
def test_rows_are_full_when_there_are_thousands(kind: str, capacity: int) -> None:
    mean = float(real_lengths(kind, 10_000, capacity).mean())
    lengths = real_lengths(kind, int(4200 * capacity / mean), capacity)
    order, ends = pack_rows(lengths, capacity)
    assert len(ends) >= 4096
    assert int(lengths.sum(dtype=np.int64)) / (len(ends) * capacity) >= 0.999
    assert np.array_equal(np.bincount(order), np.ones(len(lengths)))
    sums = np.add.reduceat(lengths[order].astype(np.int64), np.concatenate(([0], ends[:-1])))
    assert int(sums.max()) <= capacity


def test_packing_needs_few_bytes_a_document() -> None:
    count = 2_000_000
    lengths = real_lengths("instruct", count, 8192)
    tracemalloc.start()
    pack_rows(lengths, 8192)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * count


def test_no_documents_no_rows() -> None:
    order, ends = pack_rows(np.zeros(0, dtype=np.int64), 8)
    assert len(order) == len(ends) == 0
