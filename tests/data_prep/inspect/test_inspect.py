"""What a terminal shows of a store is what is in it, and nothing in it reaches the terminal but as text."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fixtures import byte_level_folder, prepared, section, write_jsonl
from inspect_fixtures import COLOR, HOSTILE, Page, backend, chat_store
from store_fixtures import SourceDocuments, make_store

from data_prep.errors import DataConfigError
from data_prep.inspect.page import render_page
from data_prep.inspect.rows import Selection, select
from data_prep.inspect.terminal import describe
from data_prep.inspect.token_text import clean
from data_prep.rows.arrange import RowPlan
from data_prep.token_store import TokenStore, open_rows
from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_tokenizer(str(byte_level_folder(tmp_path_factory.mktemp("byte_level"))))


def test_brackets_hold_what_is_trained_and_nothing_else(tmp_path: Path, byte_level: Tokenizer) -> None:
    lines = list(describe(chat_store(tmp_path / "store", byte_level), Selection(number=0, count=5), color=False))
    text = "\n".join(lines)
    assert "the river⟦ 漢字 runs<|end|>⟧" in text
    shown = clean(HOSTILE).replace("⟦", "<U+27E6>").replace("⟧", "<U+27E7>").replace(" ␍ ", "·␍·")
    assert f"\n{shown}⟦{shown}<|end|>⟧\n" in text, "user text cannot close the brackets"
    assert "under↵\n↵\n··the⇥⟦bridge<|end|>⟧" in text
    assert "-- document 0, one.jsonl:1, source one: " in text
    assert "-- document 2, two<i>␛[1m.jsonl:3, source two<i>␛[1m: " in text
    store = TokenStore.open(tmp_path / "store")
    size = len(store.tokens(2))
    assert f": {size} tokens, 2 targets\n" in text
    assert f"... {store.manifest['row_tokens'] - size} tokens of padding" in lines
    assert not [char for char in text if not char.isprintable() and char != "\n"]


def test_colors_say_the_same_and_only_colors_reach_the_terminal(tmp_path: Path, byte_level: Tokenizer) -> None:
    path = chat_store(tmp_path / "store", byte_level)
    for selection in (None, Selection(number=0, count=5), Selection(number=0, count=5, documents=True)):
        plain = "\n".join(describe(path, selection, color=False))
        colored = "\n".join(describe(path, selection, color=True))
        stripped = COLOR.sub("", colored)
        assert "\x1b" not in stripped
        assert stripped.partition("-- ")[2] == plain.replace("⟦", "").replace("⟧", "").partition("-- ")[2]
    trained = re.findall(r"48;5;1(?:14|50)m([^\x1b]*)", colored)
    assert "".join(trained).replace(" trained ", "").startswith(" 漢字 runs")


def test_the_first_token_of_a_segment_is_not_trained(tmp_path: Path, byte_level: Tokenizer) -> None:
    ids = byte_level.encode_batch(["the river runs under"])[0]
    assert len(ids) == 4, "the words of the fixture are tokens"
    source = SourceDocuments("text", [(ids, [True] * 4)])
    make_store(tmp_path / "s", [source], RowPlan(2, "best_fit", "split"), tokenizer=backend(byte_level))
    text = "\n".join(describe(tmp_path / "s", Selection(number=0, count=2), color=False))
    assert "the⟦ river⟧" in text and "\n·runs⟦ under⟧" in text
    assert text.count(" 1 target ==") == 2
    assert "2 tokens (2 to 4 of 4), 1 target" in text
    whole = "\n".join(describe(tmp_path / "s", Selection(number=0, documents=True), color=False))
    assert "the⟦ river runs under⟧" in whole and "4 tokens, 3 targets" in whole


def test_summary_has_figures_ledger_and_a_row(tmp_path: Path, byte_level: Tokenizer) -> None:
    path = chat_store(tmp_path / "store", byte_level)
    store = TokenStore.open(path)
    text = "\n".join(describe(path, None, color=False))
    assert re.search(rf"documents +3\n +tokens +{store.num_tokens} ", text)
    assert "unusable: 3 no answer: one 3\n" in text
    assert re.search(r"0  one +text +1 +2 ", text) and re.search(r"1  two<i>␛\[1m +text +1 +1 ", text)
    assert "Documents by length" in text and "█" in text
    assert "byte-level" in text and "<|end|>" in text
    assert "== row " in text


def labelled(
    folder: Path,
    tokenizer: Tokenizer,
    task: str,
    columns: dict[str, tuple[str, np.ndarray]],
    names: tuple[str, str] = ("no", "yes<b>\x1b[1m"),
) -> str:
    """Everything that is said about a store of two equal documents with the given columns."""
    ids = tokenizer.encode_batch(["the river runs"])[0]
    assert len(ids) == 3, "the words of the fixture are tokens"
    source = SourceDocuments("labelled", [(ids, [True, False, True])] * 2)
    backend_ = backend(tokenizer)
    make_store(folder, [source], RowPlan(4), task=task, columns=columns, tokenizer=backend_, label_names=names)
    page = render_page(folder, Selection(count=2))
    assert "\x1b" not in page and not Page(page).open
    summary = "\n".join(describe(folder, None, color=False))
    rows_text = "\n".join(describe(folder, Selection(number=0, count=2), color=False))
    assert "\x1b" not in summary + rows_text
    return summary + rows_text


def test_tags_of_words_outside_are_not_written(tmp_path: Path, byte_level: Tokenizer) -> None:
    tags = {"tags": per("token", [1, -1, 0] * 2, np.int16)}
    text = labelled(tmp_path / "o", byte_level, "token_classification", tags, ("O", "B"))
    assert "⟦the/B⟧ river⟦ runs⟧" in text


def per(kind: str, values: list[Any], dtype: Any) -> tuple[str, np.ndarray]:
    return kind, np.array(values, dtype=dtype)


def test_labels_scores_and_tags_have_their_names(tmp_path: Path, byte_level: Tokenizer) -> None:
    labels = {"labels": per("document", [1, 0], np.int32), "pair_starts": per("document", [0, 2], np.uint32)}
    text = labelled(tmp_path / "a", byte_level, "sequence_classification", labels)
    assert "label: yes<b>␛[1m" in text and "label: no, second text from token 2" in text
    assert re.search(r"yes<b>␛\[1m +1 +█", text)
    sets = {"label_sets": per("ragged", [0, 1], np.int32), "label_sets_ends": per("ends", [2, 2], np.uint32)}
    text = labelled(tmp_path / "b", byte_level, "sequence_classification", sets)
    assert "labels: no, yes<b>␛[1m" in text and "labels: none" in text
    scores = {"scores": per("document", [0.5, 4], np.float32)}
    text = labelled(tmp_path / "c", byte_level, "sequence_classification", scores)
    assert "score: 0.5" in text and "score: 4" in text
    tags = {"tags": per("token", [1, -1, 0, 1, -1, 1], np.int16)}
    text = labelled(tmp_path / "d", byte_level, "token_classification", tags)
    assert "⟦the/yes<b>␛[1m⟧ river⟦ runs/no⟧" in text
    assert re.search(r"Tags .*\n +yes<b>␛\[1m +3 +█+\n +no +1 +█", text)


def test_answers_and_target_texts(tmp_path: Path, byte_level: Tokenizer) -> None:
    columns = {
        "answer_spans": per("ragged", [1, 3], np.int32),
        "answer_spans_ends": per("ends", [2, 2], np.uint32),
        "pair_starts": per("document", [1, 1], np.uint32),
        "questions": per("document", [4, 4], np.uint32),
    }
    text = labelled(tmp_path / "a", byte_level, "question_answering", columns)
    assert "the⟦ river runs⟧" in text
    assert "question 4: one answer" in text and "question 4: no answer in this window" in text
    target = byte_level.encode_batch(["old stone"])[0]
    columns = {
        "target_ids": per("ragged", target, np.uint16),
        "target_ids_ends": per("ends", [len(target), len(target)], np.uint32),
    }
    text = labelled(tmp_path / "b", byte_level, "seq2seq_lm", columns)
    assert f"-- target, {len(target)} tokens\n⟦old stone⟧" in text


PREPARED = {
    "causal_lm": ({"prompt": "the river", "response": " 漢字 runs"}, "the river⟦ 漢字 runs<|end|>⟧"),
    "sequence_classification": (
        {"sentence1": "the river", "sentence2": "runs", "label": "yes"},
        "label: yes, second text from",
    ),
    "token_classification": ({"tokens": ["the", "river"], "tags": ["O", "B-water"]}, "⟦the river/B-water⟧"),
    "question_answering": (
        {
            "question": "the river",
            "context": "under old bridge 漢字",
            "answers": {"text": ["漢字"], "answer_start": [17]},
        },
        "⟦ 漢字⟧",
    ),
    "seq2seq_lm": ({"source": "the river", "target": "runs"}, "-- target, "),
}


@pytest.mark.parametrize("task", sorted(PREPARED))
def test_prepared_data_is_shown(tmp_path: Path, task: Any) -> None:
    record, expected = PREPARED[task]
    other = {**record, "label": "no"} if "label" in record else record
    path = write_jsonl(tmp_path / "records.jsonl", [record, other])
    values = section(tmp_path, byte_level_folder(tmp_path / "tokenizer"), path, stride_tokens=8)
    store, _ = prepared(values, task)
    text = "\n".join(describe(store.path, Selection(number=0, documents=True), color=False))
    assert expected in text
    assert f"-- document 0, {path}:1, source " in text
    assert not Page(render_page(store.path, Selection())).open


def test_selection(tmp_path: Path, byte_level: Tokenizer) -> None:
    store = TokenStore.open(chat_store(tmp_path / "store", byte_level))
    rows = open_rows(store, store.manifest["row_tokens"])

    def chosen(**which: Any) -> list[int]:
        return select(store, rows, Selection(**which))

    assert chosen(source="one", count=5) == [0]
    assert chosen(source="1", count=5) == [1]
    assert chosen(source="0", count=5, documents=True) == [0, 1]
    assert chosen(number=1, count=5) == [1]
    assert chosen(count=9) == [0, 1]
    assert chosen(count=2, seed=4, documents=True) == chosen(count=2, seed=4, documents=True)
    assert len({tuple(chosen(count=2, seed=seed, documents=True)) for seed in range(20)}) == 3
    with pytest.raises(DataConfigError, match="rows 0 to 1"):
        chosen(number=2)
    with pytest.raises(DataConfigError, match=r"0 one, 1 two"):
        chosen(source="three")
