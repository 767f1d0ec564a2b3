"""Rows of every packing and policy: what goes in comes out, once, and the ledger says where the rest went."""

import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from data_fixtures import byte_level_folder
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from store_fixtures import SourceDocuments, make_store, random_documents, write_store

import data_prep.rows.arrange
from data_prep.config import SourceConfig
from data_prep.errors import BadDataError, DataConfigError
from data_prep.rows.arrange import RowPlan, write_rows
from data_prep.rows.ledger import check_identities, ledger_table, rows_per_epoch
from data_prep.token_store import Rows, TokenStore


def placed_tokens(store: TokenStore, rows: Rows) -> dict[int, list[tuple[int, int]]]:
    """Document -> its pieces (start, length) in row order; checks every row against the store."""
    pieces: dict[int, list[tuple[int, int]]] = {}
    for row in range(rows.num_rows):
        documents, starts, lengths = rows.segments(row)
        assert 0 < int(lengths.sum()) <= rows.row_tokens
        ids, marks = store.gather(documents, starts, lengths)
        offset, targets = 0, 0
        for document, start, length in zip(documents.tolist(), starts.tolist(), lengths.tolist(), strict=True):
            pieces.setdefault(document, []).append((start, length))
            assert ids[offset : offset + length].tolist() == store.tokens(document, start, start + length).tolist()
            own = store.targets(document, start, start + length)
            assert marks[offset : offset + length].tolist() == own.tolist()
            targets += int(own[1:].sum())
            offset += length
        assert targets == int(rows.row_targets[row])
        sources = {store.source_of(document) for document in documents.tolist()}
        assert len(sources) == 1
        source = rows.sources[sources.pop()]
        assert source.first_row <= row < source.first_row + source.num_rows
    return pieces


documents_of = st.builds(
    random_documents, st.integers(1, 25), st.integers(0, 1000), st.integers(1, 50), st.booleans()
)  # fmt: skip


@examples(150)
@given(
    st.lists(documents_of, min_size=1, max_size=3),
    st.integers(2, 24),
    st.sampled_from(["best_fit", "none", "wrap"]),
    st.sampled_from(["drop", "split", "truncate"]),
    st.integers(1, 6),
    st.integers(1, 12),
)
def test_no_token_twice_none_lost_and_the_ledger_adds_up(
    corpora: list[Any], row_tokens: int, packing: Any, overlong: Any, min_targets: int, window: int
) -> None:
    plan = RowPlan(row_tokens, packing, overlong, min_targets)
    sources = [
        SourceDocuments(f"s{number}", documents, other_split=number, duplicates=2, dropped={"empty": 1})
        for number, documents in enumerate(corpora)
    ]
    earlier = data_prep.rows.arrange._WINDOW_ROWS, data_prep.rows.arrange._WINDOW_DOCUMENTS
    data_prep.rows.arrange._WINDOW_ROWS, data_prep.rows.arrange._WINDOW_DOCUMENTS = 1, (window, 3 * window)
    try:
        with tempfile.TemporaryDirectory() as folder:
            store, rows = make_store(Path(folder) / "store", sources, plan)
            check_rows_and_ledger(store, rows, plan)
    finally:
        data_prep.rows.arrange._WINDOW_ROWS, data_prep.rows.arrange._WINDOW_DOCUMENTS = earlier


def check_rows_and_ledger(store: TokenStore, rows: Rows, plan: RowPlan) -> None:
    pieces = placed_tokens(store, rows)
    fates = {"kept": 0, "split": 0, "truncated": 0, "overlong": 0, "too_few_targets": 0}
    tokens = dict.fromkeys(("in_rows", "cut", "overlong", "too_few_targets"), 0)
    for document in range(store.num_documents):
        length = len(store.tokens(document))
        own = sorted(pieces.get(document, []))
        held = sum(size for _, size in own)
        tokens["in_rows"] += held
        assert [start for start, _ in own] == [sum(size for _, size in own[:place]) for place in range(len(own))]
        if held == length:
            fates["kept" if len(own) == 1 else "split"] += 1
        elif held:
            assert plan.overlong == "truncate" and plan.packing != "wrap" and length > plan.row_tokens
            fates["truncated"] += 1
            tokens["cut"] += length - held
        else:
            long = length > plan.row_tokens and plan.overlong == "drop" and plan.packing != "wrap"
            reason = "overlong" if long else "too_few_targets"
            if not long and plan.overlong != "truncate":
                counted = store.targets(document)
                limit = plan.min_targets + (-(-length // plan.row_tokens) if plan.overlong == "split" else 0)
                assert int(counted.sum()) < limit + 1
            fates[reason] += 1
            tokens[reason] += length
    total = store.ledger["total"]
    for entry in (*store.ledger["sources"], total):
        check_identities(entry)
    assert {**{key: total[key] for key in ("kept", "split", "truncated")}, **total["dropped"]} == fates
    assert {"in_rows": total["tokens_in_rows"], "cut": total["tokens_cut"], **total["tokens_dropped"]} == tokens
    assert total["targets_in_rows"] == int(rows.row_targets.sum()) and total["rows"] == rows.num_rows
    assert store.num_targets == total["targets"]
    if plan.packing == "wrap":
        for source in rows.sources:
            sums = [
                int(rows.segments(row)[2].sum()) for row in range(source.first_row, source.first_row + source.num_rows)
            ]
            assert sums[:-1] == [plan.row_tokens] * (len(sums) - 1)
            # one stream: documents and their tokens in order
        stream = [
            (document, start)
            for row in range(rows.num_rows)
            for document, start, _ in zip(*rows.segments(row), strict=True)
        ]
        assert stream == sorted(stream)
    if plan.packing == "none":
        assert rows.num_rows == len(rows.documents)


def test_an_overlong_record_is_named_before_anything_else(tmp_path: Path) -> None:
    documents = [([1] * length, [False] + [True] * (length - 1)) for length in (5, 8, 9, 30)]
    with pytest.raises(BadDataError, match=r"^a\.jsonl:3: 9 tokens do not fit a row of 8 \(data\.row_tokens\)"):
        make_store(tmp_path / "s", [SourceDocuments("a", documents)], RowPlan(8))


def test_prompts_and_chats_are_never_cut_into_pieces(tmp_path: Path) -> None:
    documents = [([1] * 12, [False] * 6 + [True] * 6)]
    with pytest.raises(BadDataError, match=r"^a\.jsonl:1: 12 tokens .* split is for plain text"):
        make_store(tmp_path / "a", [SourceDocuments("a", documents, shape="prompt")], RowPlan(8, overlong="split"))
    with pytest.raises(DataConfigError, match=r"data\.packing: wrap is for plain text, but a holds messages records"):
        make_store(tmp_path / "b", [SourceDocuments("a", documents, shape="messages")], RowPlan(8, "wrap"))
    short = [SourceDocuments("a", documents, shape="prompt")]
    store, _ = make_store(tmp_path / "c", short, RowPlan(12, overlong="split"))
    assert store.ledger["total"]["kept"] == 1


def test_a_conversation_is_cut_after_its_last_whole_turn(tmp_path: Path) -> None:
    #        0  1  2  3  4  5  6  7  8  9 10 11
    marks = [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1]
    documents = [(list(range(12)), [bool(mark) for mark in marks])]
    for row_tokens, kept in ((11, 8), (8, 8), (7, 4), (4, 4), (12, 12)):
        store, rows = make_store(
            tmp_path / str(row_tokens), [SourceDocuments("a", documents, "messages")], RowPlan(row_tokens, overlong="truncate")
        )  # fmt: skip
        assert rows.lengths.tolist() == [kept], row_tokens
        assert store.ledger["total"]["tokens_cut"] == 12 - kept
        assert store.ledger["total"]["targets_cut"] == sum(marks[kept:])


def texts_kept(folder: Path, tokenizer: tokenizers.Tokenizer, texts: list[str], row_tokens: int) -> list[str]:
    """What is left of texts that are truncated, decoded."""
    documents = [(ids := tokenizer.encode(text).ids, [False] + [True] * (len(ids) - 1)) for text in texts]
    size = max(tokenizer.get_vocab().values()) + 1
    store, rows = make_store(
        folder, [SourceDocuments("a", documents)], RowPlan(row_tokens, "none", "truncate"), tokenizer=tokenizer, vocab_size=size
    )  # fmt: skip
    return [
        tokenizer.decode(store.tokens(document, 0, length).tolist())
        for document, length in zip(rows.documents.tolist(), rows.lengths.tolist(), strict=True)
    ]


def test_text_is_cut_after_a_sentence_in_the_last_quarter_or_at_the_end_of_the_row(tmp_path: Path) -> None:
    byte_level_folder(tmp_path / "bytes")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "bytes" / "tokenizer.json"))
    sentence = "the river runs under an old stone bridge while children watch"  # 11 words of one or two tokens
    size = len(tokenizer.encode(sentence).ids)
    texts = [
        f"{sentence}. {sentence}",
        f'{sentence}." {sentence}',
        f"{sentence}\n{sentence}",
        f"{sentence}9.5{sentence}",
        f"Yes. {sentence} {sentence}",
    ]
    kept = texts_kept(tmp_path / "s", tokenizer, texts, size + 3)
    assert kept[:3] == [f"{sentence}.", f'{sentence}."', f"{sentence}\n"]
    for text, end in zip(texts[3:], kept[3:], strict=True):
        assert text.startswith(end) and len(tokenizer.encode(end).ids) == size + 3


def test_sentences_end_in_sentencepiece_and_bert_vocabularies_too(tmp_path: Path) -> None:
    for name, words, between in (
        ("sp", ["▁a", ".", "▁b"], 1),
        ("bert", ["a", ".", "b", "##c"], 1),
        ("wide", ["文", "。", "字"], 1),
    ):
        vocabulary = {piece: index for index, piece in enumerate(words)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=words[0]))
        ids = [0] * 9 + [between] + [2] * 20
        _, rows = make_store(
            tmp_path / name, [SourceDocuments("a", [(ids, [False] + [True] * (len(ids) - 1))])],
            RowPlan(12, overlong="truncate"), tokenizer=tokenizer, vocab_size=len(words),
        )  # fmt: skip
        assert rows.lengths.tolist() == [10], name


def test_weights_are_shares_of_tokens_in_whole_rows(tmp_path: Path) -> None:
    sizes = (120, 40, 40)
    sources = [
        SourceDocuments(f"s{number}", [([1] * 8, [False] + [True] * 7)] * size) for number, size in enumerate(sizes)
    ]
    weights = [SourceConfig(path="x", weight=weight) for weight in (1.0, 2.0, 1.0)]
    store, rows = make_store(tmp_path / "w", sources, RowPlan(16), weights)
    assert [source.num_rows for source in rows.sources] == [60, 20, 20]
    assert [source.rows_per_epoch for source in rows.sources] == [25, 50, 25]
    assert rows.epoch_rows == 100
    assert [entry["epochs"] for entry in store.ledger["sources"]] == [25 / 60, 2.5, 1.25]
    assert [entry["tokens_per_epoch"] for entry in store.ledger["sources"]] == [400, 800, 400]
    thirds = [SourceConfig(path="x", weight=1.0)] * 3
    _, rows = make_store(tmp_path / "t", sources, RowPlan(16), thirds)
    assert sorted(source.rows_per_epoch for source in rows.sources) == [33, 33, 34]
    epochs = [SourceConfig(path="x", epochs=value) for value in (0.5, 2.0, 0.001)]
    _, rows = make_store(tmp_path / "e", sources, RowPlan(16), epochs)
    assert [source.rows_per_epoch for source in rows.sources] == [30, 40, 1]
    _, plain = make_store(tmp_path / "p", sources, RowPlan(16))
    assert plain.epoch_rows == plain.num_rows == 100
    assert plain.digest != rows.digest


@examples(200)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 64), st.floats(1e-3, 1e3)), min_size=1, max_size=6))
def test_shares_are_those_of_the_weights_to_less_than_a_row(drawn: list[tuple[int, int, float]]) -> None:
    rows = [count for count, _, _ in drawn]
    tokens = [count * each for count, each, _ in drawn]
    sources = [SourceConfig(path="x", weight=weight) for _, _, weight in drawn]
    counts = rows_per_epoch(rows, tokens, sources)
    total_weight = sum(weight for _, _, weight in drawn)
    for count, (_, each, weight) in zip(counts, drawn, strict=True):
        quota = sum(tokens) * weight / total_weight / each
        assert count == 1 if quota < 1e-9 else abs(count - quota) < 1 + 1e-6
    if len(drawn) == 1:
        assert counts == rows


def test_memory_is_that_of_a_window_whatever_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_prep.rows.arrange, "_WINDOW_ROWS", 1)
    monkeypatch.setattr(data_prep.rows.arrange, "_WINDOW_DOCUMENTS", (1000, 1000))
    for packing in ("best_fit", "wrap", "none"):
        peaks = []
        for copies in (1, 10):
            documents = random_documents(4000) * copies
            store = write_store(tmp_path / f"{packing}{copies}", [SourceDocuments("a", documents)])
            tracemalloc.start()
            write_rows(store, RowPlan(64, packing))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < 1.2 * peaks[0], packing


def test_a_weighted_source_that_came_to_nothing_is_an_error(tmp_path: Path) -> None:
    good = SourceDocuments("good", [([1] * 8, [False] + [True] * 7)])
    empty = SourceDocuments("empty", [([1] * 8, [False] * 8)])
    weights = [SourceConfig(path="good"), SourceConfig(path="x", name="empty", epochs=2.0)]
    with pytest.raises(BadDataError, match="empty: no row is left of it"):
        make_store(tmp_path / "s", [good, empty], RowPlan(8), weights)
    store, rows = make_store(tmp_path / "t", [good, empty], RowPlan(8))
    assert [source.rows_per_epoch for source in rows.sources] == [1, 0]
    assert store.ledger["total"]["dropped"]["too_few_targets"] == 1


def test_the_plan_is_small_and_plain(tmp_path: Path) -> None:
    store, rows = make_store(tmp_path / "s", [SourceDocuments("a", random_documents(200))], RowPlan(64))
    for name in ("documents", "starts", "lengths", "ends", "targets"):
        assert np.load(store.path / f"rows_{name}.npy", allow_pickle=False).dtype == np.uint32
    assert len(rows.documents) == store.manifest["num_segments"]


def test_length_histogram_counts_documents_and_tokens(tmp_path: Path) -> None:
    lengths = (1, 2, 3, 4, 5, 8, 9, 33)
    documents = [([1] * length, [False] + [True] * (length - 1)) for length in lengths]
    store, _ = make_store(tmp_path / "s", [SourceDocuments("a", documents)], RowPlan(64))
    assert store.ledger["sources"][0]["lengths"] == [
        {"up_to": 1, "documents": 1, "tokens": 1},
        {"up_to": 2, "documents": 1, "tokens": 2},
        {"up_to": 4, "documents": 2, "tokens": 7},
        {"up_to": 8, "documents": 2, "tokens": 13},
        {"up_to": 16, "documents": 1, "tokens": 9},
        {"up_to": 64, "documents": 1, "tokens": 33},
    ]


def test_the_table_shows_what_there_is(tmp_path: Path) -> None:
    long = [([1] * 80, [False] + [True] * 79)]
    sources = [
        SourceDocuments("plain", random_documents(30), other_split=3),
        SourceDocuments("more", random_documents(1200, 1) + long, dropped={"no_answer": 2}),
    ]
    store, _ = make_store(tmp_path / "s", sources, RowPlan(64, overlong="drop", min_targets=2))
    table = ledger_table(store.manifest).splitlines()
    assert table[0].split() == (
        "source records other split unusable documents kept dropped tokens in rows targets rows filled".split()
    )
    assert [line.split()[0] for line in table[1:4]] == ["plain", "more", "total"]
    assert len({len(line) for line in table[:4]}) == 1
    assert "1,203" in table[2]
    assert "unusable: 2 no_answer: more 2" in table and "dropped: 1 overlong (80 tokens): more 1" in table


def test_tasks_without_packing_have_one_document_a_row(tmp_path: Path) -> None:
    sources = [SourceDocuments("a", random_documents(20, longest=8), "label")]
    labels = {"labels": ("document", np.arange(20, dtype=np.int32) % 2)}
    store, rows = make_store(
        tmp_path / "s", sources, RowPlan(8, min_targets=5), task="sequence_classification", columns=labels
    )
    assert rows.num_rows == 20 and rows.row_targets.tolist() == [1] * 20
    assert store.manifest["packing"] == "none" and store.ledger["total"]["padding_tokens"] is None
