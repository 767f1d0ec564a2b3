"""Row order, the split over ranks and micro-batches, and the tensors rows become."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_stores import MemoryRows, memory_store

from data_prep.rows.pack import pack_rows
from data_prep.token_store import RowSource
from engine.arithmetic import StepBatch
from engine.batches import flat_batch, padded_batch, row_lengths
from engine.micro_batches import MicroBatches, row_groups, split_rows
from engine.row_stream import permuted, rows_of_epoch, stream_rows
from engine.tasks import TASKS
from engine.tasks.task import STILL


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_a_permutation(num_rows: int, seed: int, epoch: int) -> None:
    order = permuted(np.arange(num_rows), num_rows, seed, epoch)
    assert sorted(order.tolist()) == list(range(num_rows))


def test_order_depends_on_seed_and_epoch_and_is_not_the_identity() -> None:
    orders = [tuple(permuted(np.arange(1000), 1000, seed, epoch)) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert len({*orders, tuple(range(1000))}) == 4


def plain_permutation(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The definition in whole numbers, one index at a time."""
    half = 1
    while 4**half < num_rows:
        half += 1
    word, mask = 2**64 - 1, 2**half - 1
    digest = hashlib.sha256(f"fulltune rows {seed} {epoch}".encode()).digest()
    keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(4)]

    def mix(value: int, key: int) -> int:
        value = (value + key) & word
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & word
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & word
        return value ^ (value >> 31)

    order = []
    for index in range(num_rows):
        value, outside = index, True
        while outside:
            left, right = value >> half, value & mask
            for key in keys:
                left, right = right, left ^ (mix(right, key) & mask)
            value = (left << half) | right
            outside = value >= num_rows
        order.append(value)
    return order


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 16, 17, 100, 1025])
def test_order_equals_its_definition(num_rows: int) -> None:
    assert permuted(np.arange(num_rows), num_rows, 17, 3).tolist() == plain_permutation(num_rows, 17, 3)


def test_order_is_fixed_for_ever() -> None:
    # A changed order would make old checkpoints repeat and skip rows.
    assert permuted(np.arange(8), 8, 17, 0).tolist() == [1, 4, 0, 6, 5, 3, 7, 2]


def test_positions_of_the_permutation_are_spread_evenly() -> None:
    # Mean rank correlation with the identity over many keys is near zero for a fair shuffle.
    n = 512
    correlations = [
        np.corrcoef(np.arange(n), permuted(np.arange(n), n, seed, 0))[0, 1] for seed in range(64)
    ]  # fmt: skip
    assert abs(float(np.mean(correlations))) < 4 / np.sqrt(64 * n)


def uniform(num_rows: int) -> tuple[RowSource, ...]:
    return (RowSource("all", 0, num_rows, num_rows),)


def test_far_positions_cost_no_more_than_near_ones() -> None:
    rows = stream_rows(10**12, 4, uniform(10**9), seed=3)
    assert rows.shape == (4,)
    assert ((rows >= 0) & (rows < 10**9)).all()


@given(st.integers(1, 40), st.integers(1, 25), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_stream_is_one_permutation_after_the_other(num_rows: int, step_rows: int, seed: int) -> None:
    epochs = 3
    taken = [stream_rows(p, step_rows, uniform(num_rows), seed) for p in range(0, epochs * num_rows, step_rows)]
    stream = np.concatenate(taken)[: epochs * num_rows].reshape(epochs, num_rows)
    for epoch in range(epochs):
        assert stream[epoch].tolist() == permuted(np.arange(num_rows), num_rows, seed, epoch).tolist()
        assert sorted(stream[epoch].tolist()) == list(range(num_rows))


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=4),
    st.integers(0, 5),
    st.integers(1, 17),
)
@settings(max_examples=80, deadline=None)
def test_a_mixture_uses_the_rows_of_each_source_evenly(sizes: list[tuple[int, int]], seed: int, step_rows: int) -> None:
    firsts = np.cumsum([0, *(rows for rows, _ in sizes)])
    sources = tuple(
        RowSource(f"s{number}", int(first), rows, used)
        for number, (first, (rows, used)) in enumerate(zip(firsts, sizes, strict=False))
    )
    epoch_rows, epochs = rows_of_epoch(sources), 4
    parts = [stream_rows(p, step_rows, sources, seed) for p in range(0, epochs * epoch_rows, step_rows)]
    stream = np.concatenate(parts)[: epochs * epoch_rows].reshape(epochs, epoch_rows)
    for source in sources:
        own = slice(source.first_row, source.first_row + source.num_rows)
        in_epoch = [np.bincount(row, minlength=firsts[-1])[own] for row in stream]
        for counts in in_epoch:
            assert counts.sum() == source.rows_per_epoch
            assert counts.max() - counts.min() <= 1
        together = np.sum(in_epoch, axis=0)
        assert together.max() - together.min() <= 1


def test_half_a_source_is_another_half_each_epoch() -> None:
    sources = (RowSource("a", 0, 10, 5), RowSource("b", 10, 4, 4))
    halves = [[row for row in stream_rows(9 * epoch, 9, sources, 1).tolist() if row < 10] for epoch in range(3)]
    assert sorted(halves[0] + halves[1]) == list(range(10)) and sorted(halves[2]) == sorted(halves[0])
    assert halves[0] != sorted(halves[0])


def index_of(lengths: list[list[int]]) -> MemoryRows:
    """Rows of documents of the given lengths; the documents themselves do not matter."""
    flat = np.array([length for row in lengths for length in row])
    ends = np.cumsum([len(row) for row in lengths])
    zeros = np.zeros(len(flat), dtype=np.int64)
    return MemoryRows(np.arange(len(flat)), zeros, flat, ends, np.ones(len(ends)), uniform(len(ends)))


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_split_gives_every_row_once_and_equal_counts(
    num_rows: int, world_size: int, micro_rows: int, by_tokens: bool, is_padded: bool
) -> None:
    draw = np.random.default_rng(num_rows)
    index = index_of([draw.integers(1, 50, draw.integers(1, 4)).tolist() for _ in range(num_rows + 3)])
    rows = draw.permutation(num_rows + 3)[:num_rows]
    size = MicroBatches(tokens=200, is_padded=is_padded) if by_tokens else MicroBatches(micro_rows)
    parts = split_rows(index, rows, world_size, size)
    assert all(len(ranks) == world_size for ranks in parts)
    assert sorted(np.concatenate([part for ranks in parts for part in ranks]).tolist()) == sorted(rows.tolist())
    for ranks in parts:
        assert max(len(part) for part in ranks) - min(len(part) for part in ranks) <= 1
    if by_tokens:
        taken = [row_lengths(index, part) for ranks in parts for part in ranks if len(part)]
        assert max(int(rows.max()) * len(rows) if is_padded else int(rows.sum()) for rows in taken) <= 200
    else:
        assert len(parts) == StepBatch(num_rows, world_size, micro_rows).num_micro_batches
        assert all(len(part) <= micro_rows for ranks in parts for part in ranks)
    again = split_rows(index, rows, world_size, size)
    assert [[part.tolist() for part in ranks] for ranks in parts] == [
        [part.tolist() for part in ranks] for ranks in again
    ]


def test_rows_of_a_micro_batch_have_similar_lengths() -> None:
    lengths = [3, 90, 5, 88, 4, 91, 6, 89]
    parts = split_rows(index_of([[length] for length in lengths]), np.arange(8), 2, MicroBatches(2))
    assert {int(row) for part in parts[0] for row in part} == {1, 3, 5, 7}


def test_a_token_budget_takes_more_short_rows_than_long_ones() -> None:
    index = index_of([[length] for length in [100] * 4 + [10] * 40])
    parts = split_rows(index, np.arange(44), 2, MicroBatches(tokens=100))
    assert [[len(part) for part in ranks] for ranks in parts] == [[1, 1], [1, 1], [10, 10], [10, 10]]


@pytest.mark.parametrize(("is_padded", "counts"), [(False, [1, 1, 6]), (True, [1, 1, 5, 1])])
def test_a_token_budget_counts_padding_where_there_is_any(is_padded: bool, counts: list[int]) -> None:
    lengths = [100, 90, 20, 16, 16, 16, 16, 16]
    parts = split_rows(
        index_of([[length] for length in lengths]), np.arange(8), 1, MicroBatches(tokens=100, is_padded=is_padded)
    )
    assert [len(ranks[0]) for ranks in parts] == counts


def attention(index: MemoryRows, rows: np.ndarray) -> int:
    """Sum of squared document lengths."""
    return sum(int((index.segments(int(row))[2] ** 2).sum()) for row in rows)


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
@pytest.mark.parametrize("micro_rows", [1, 2, 4])
def test_ranks_have_nearly_equal_attention_cost(world_size: int, micro_rows: int) -> None:
    draw = np.random.default_rng(world_size)
    lengths = np.clip(draw.lognormal(6.0, 1.3, 20_000), 1, 8192).astype(np.int64)
    order, ends = pack_rows(lengths, 8192)
    packed = [lengths[row].tolist() for row in np.split(order, ends[:-1])]
    index = index_of(packed)
    rows = draw.permutation(len(packed))[: world_size * micro_rows * 16]
    parts = split_rows(index, rows, world_size, MicroBatches(micro_rows))

    def waited(parts: list[list[np.ndarray]]) -> float:
        """Time of a step over that of perfectly even ranks, which meet in every micro-batch."""
        costs = np.array([[attention(index, part) for part in ranks] for ranks in parts])
        return float(costs.max(axis=1).sum() / costs.mean(axis=1).sum())

    totals = np.array([[attention(index, part) for part in ranks] for ranks in parts]).sum(axis=0)
    assert totals.max() / totals.mean() < 1.02
    as_they_come = [
        [chunk[rank::world_size] for rank in range(world_size)]
        for chunk in np.split(rows, range(world_size * micro_rows, len(rows), world_size * micro_rows))
    ]
    assert waited(parts) < 1.1
    assert waited(parts) - 1 < (waited(as_they_come) - 1) / 4


def test_a_flat_batch_lays_documents_one_after_the_other() -> None:
    store, index = memory_store("causal_lm")
    batch = TASKS["causal_lm"].batch(store, index, np.array([2, 0]), 0, STILL)
    documents = [6, 7, 8, 0, 1, 2]
    ids = np.concatenate([store.documents[d] for d in documents])
    assert batch.input_ids.tolist() == [ids.tolist()]
    assert batch.document_ends.tolist() == [0, *np.cumsum([len(store.documents[d]) for d in documents])]
    assert batch.position_ids[0].tolist() == [p for d in documents for p in range(len(store.documents[d]))]
    expected, offset = [], 0
    for document in documents:
        for position in range(1, len(store.documents[document])):
            if store.marks[document][position]:
                expected.append((offset + position - 1, int(store.documents[document][position])))
        offset += len(store.documents[document])
    assert list(zip(batch.target_positions.tolist(), batch.target_ids.tolist(), strict=True)) == expected
    assert len(expected) == index.row_targets[[2, 0]].sum()
    assert batch.num_padding == 0
    assert batch.num_tokens == row_lengths(index, np.array([2, 0])).sum()


def test_padded_batch_has_marked_tokens_as_targets_and_columns_of_its_documents() -> None:
    store, index = memory_store("sequence_classification")
    batch = padded_batch(store, index, np.array([4, 9]), 0, ("labels",)).to(torch.device("cpu"))
    marked = [(line, place) for line, row in enumerate((4, 9)) for place in np.flatnonzero(store.marks[row])]
    longest = batch.input_ids.shape[1]
    assert batch.target_positions.tolist() == [line * longest + place for line, place in marked]
    assert batch.target_ids.tolist() == [int(store.documents[(4, 9)[line]][place]) for line, place in marked]
    assert batch.columns["labels"].tolist() == store.labels[[4, 9]].tolist()
    assert batch.attention_mask.sum(1).tolist() == batch.lengths.tolist()
    assert batch.attention_mask[0, : batch.lengths[0]].all()
    filler = padded_batch(store, index, np.array([], dtype=np.int64), 9, ("labels",))
    assert filler.columns["labels"].tolist() == [int(store.labels[9])]  # one a row of input_ids
    assert filler.target_positions.numel() == filler.target_ids.numel() == 0


@given(st.integers(1, 60), st.integers(1, 5), st.booleans(), st.booleans())
@settings(max_examples=50, deadline=None)
def test_groups_hold_every_row_once_whatever_the_ranks(
    num_rows: int, micro_rows: int, by_tokens: bool, is_padded: bool
) -> None:
    draw = np.random.default_rng(num_rows)
    index = index_of([[int(draw.integers(1, 50))] for _ in range(num_rows)])
    size = MicroBatches(tokens=200, is_padded=is_padded) if by_tokens else MicroBatches(micro_rows)
    groups = row_groups(index, np.arange(num_rows), size)
    assert sorted(np.concatenate(groups).tolist()) == list(range(num_rows))
    assert np.all(np.diff(row_lengths(index, np.concatenate(groups))) <= 0)
    if by_tokens:
        taken = [row_lengths(index, group) for group in groups]
        assert max(int(rows.max()) * len(rows) if is_padded else int(rows.sum()) for rows in taken) <= 200
    else:
        assert all(len(group) == micro_rows for group in groups[:-1])


def test_both_forms_hold_the_same_documents_and_targets() -> None:
    store, index = memory_store("sequence_classification")
    rows = np.array([4, 9, 0])
    task = TASKS["sequence_classification"]
    assert task.padded is not None
    lengths = [len(store.documents[row]) for row in rows]
    for form in (task, task.padded):
        batch = form.batch(store, index, rows, 0, STILL)
        ids = batch.input_ids.flatten()
        assert batch.document_lengths.tolist() == lengths == list(batch.row_tokens)
        assert batch.target_ids.tolist() == store.labels[rows].tolist()
        assert batch.target_owners.tolist() == [0, 1, 2]
        for line, row in enumerate(rows):
            first = int(batch.first_tokens[line])
            assert ids[first : first + lengths[line]].tolist() == store.documents[row].tolist()
            assert int(batch.last_tokens[line]) == first + lengths[line] - 1
        assert batch.num_tokens == sum(lengths) and batch.num_padding == len(ids) - sum(lengths)
        if batch.lengths is not None:
            assert (batch.input_ids[batch.attention_mask == 0] == store.pad_id).all()
    assert flat_batch(store, index, rows, 0).token_owners.tolist() == [
        n for n, size in enumerate(lengths) for _ in range(size)
    ]


@pytest.mark.parametrize("make", [flat_batch, padded_batch])
def test_targets_may_have_the_values_of_a_column_of_the_store(make: Any) -> None:
    store, index = memory_store("token_classification")
    rows = np.array([7, 3])
    plain, tagged = make(store, index, rows, 0), make(store, index, rows, 0, target_column="tags")
    assert plain.target_ids.tolist() == plain.input_ids.flatten()[plain.target_positions].tolist()
    assert tagged.target_ids.tolist() == [tag for row in rows for tag in store.tags[row].tolist() if tag >= 0]
    marked = [n for n, row in enumerate(rows) for _ in range(int(store.marks[row].sum()))]
    assert tagged.target_owners.tolist() == marked
    assert (
        tagged.with_targets(tagged.target_owners == 1).target_ids.tolist() == store.tags[3][store.tags[3] >= 0].tolist()
    )


@pytest.mark.parametrize("task", TASKS)
def test_a_rank_without_rows_gets_a_filler_without_targets(task: str) -> None:
    store, index = memory_store(task)
    batch = TASKS[task].batch(store, index, np.array([], dtype=np.int64), 3, STILL)
    assert batch.input_ids.numel() > 0
    assert batch.target_ids.numel() == batch.target_positions.numel() == 0
    assert (batch.num_tokens, batch.rows) == (0, ())
    assert batch.to(torch.device("cpu")).num_padding == batch.input_ids.numel()
