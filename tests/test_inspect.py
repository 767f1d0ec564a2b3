"""What is shown of a store is what is in it, and nothing in it reaches the terminal or the page as anything but text."""

import json
import os
import pty
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from data_fixtures import bert_vocabulary, byte_level_folder, prepared, section, sentencepiece_folder, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from store_fixtures import SourceDocuments, make_store

from data_prep.arrange import RowPlan
from data_prep.errors import CannotWriteError, DataConfigError
from data_prep.inspect import describe
from data_prep.inspect_html import render_page, write_page
from data_prep.inspect_rows import Selection, select
from data_prep.token_store import CURRENT_NAME, MANIFEST_NAME, TokenStore, content_digest, open_rows
from data_prep.token_text import TokenText, clean, visible
from data_prep.tokenizer import Tokenizer, open_tokenizer
from launcher import cli
from launcher.run_config import load_run

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = (
    "\x1b[2J\x1b]0;title\x07<script>alert('x')</script>\" onload=\"y\u202eabc\u2066 \x9b31m &amp; \u27e6z\u27e7 \r end"
)
COLOR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_tokenizer(str(byte_level_folder(tmp_path_factory.mktemp("byte_level"))))


def answered(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[bool]]:
    """A document with a trained answer and end of text."""
    first, second = tokenizer.encode_batch([prompt, answer])
    assert tokenizer.eos_id is not None
    return [*first, *second, tokenizer.eos_id], [False] * len(first) + [True] * (len(second) + 1)


def chat_store(folder: Path, tokenizer: Tokenizer) -> Path:
    """Two rows of three documents from two sources, one with a name that would colour a terminal."""
    first = [answered(tokenizer, "the river", " 漢字 runs"), answered(tokenizer, HOSTILE, HOSTILE)]
    second = [answered(tokenizer, "under\n\n  the\t", "bridge")]
    sources = [SourceDocuments("one", first, dropped={"no answer": 3}), SourceDocuments("two<i>\x1b[1m", second)]
    plan = RowPlan(sum(len(ids) for ids, _ in first), "best_fit", "error")
    make_store(folder, sources, plan, tokenizer=backend(tokenizer), vocab_size=tokenizer.vocab_size)
    return folder


def backend(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer.files(None)["tokenizer.json"])


@pytest.mark.parametrize("kind", ["byte_level", "bpe", "unigram", "bert"])
def test_pieces_are_the_decoded_text(tmp_path: Path, kind: str) -> None:
    folder = {
        "byte_level": lambda: byte_level_folder(tmp_path / "in"),
        "bpe": lambda: sentencepiece_folder(tmp_path / "in", "bpe"),
        "unigram": lambda: sentencepiece_folder(tmp_path / "in", "unigram"),
        "bert": lambda: bert_vocabulary(tmp_path / "in" / "vocab.txt"),
    }[kind]()
    tokenizer = open_tokenizer(str(folder))
    tokenizer.save(tmp_path / "out")
    text = "the river  runs 漢字 naïve 😀\n\tbirds don" if kind != "bert" else "the river runs under birds don"
    ids = tokenizer.encode_batch([text])[0]
    pieces = TokenText(tmp_path / "out").pieces(ids, [None] * len(ids))
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids) == text
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == len(ids)
    if kind != "bert":
        smiley = next(piece for piece in pieces if "😀" in piece.text)
        assert smiley.stop - smiley.start >= 4 and smiley.text == "😀", "bytes of one character are one piece"


def test_ideographs_of_wordpiece_stand_together(tmp_path: Path) -> None:
    file = bert_vocabulary(tmp_path / "vocab.txt")
    file.write_bytes(file.read_bytes() + "漢\n字\n".encode())
    tokenizer = open_tokenizer(str(file))
    tokenizer.save(tmp_path / "out")
    ids = tokenizer.encode_batch(["the 漢字 river"])[0]
    pieces = TokenText(tmp_path / "out").pieces(ids, [None] * len(ids))
    assert [piece.text for piece in pieces] == ["the", "漢", "字", " river"]


_READ: list[tuple[Tokenizer, TokenText]] = []


@given(st.text())
def test_any_text_comes_out_of_its_pieces(text: str) -> None:
    if not _READ:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            tokenizer = open_tokenizer(str(byte_level_folder(Path(folder) / "in")))
            tokenizer.save(Path(folder) / "out")
            _READ.append((tokenizer, TokenText(Path(folder) / "out")))
    tokenizer, reader = _READ[0]
    ids = tokenizer.encode_batch([text])[0]
    pieces = reader.pieces(ids, [None] * len(ids))
    assert "".join(piece.text for piece in pieces) == text
    for runs in visible([piece.text for piece in pieces]):
        for shown, is_sign in runs:
            assert all(char.isprintable() or (char == "\n" and is_sign) for char in shown), ascii(shown)


def test_a_character_cut_by_marks_or_borders_is_shown_as_bytes(tmp_path: Path, byte_level: Tokenizer) -> None:
    byte_level.save(tmp_path)
    reader = TokenText(tmp_path)
    ids = byte_level.encode_batch(["Ω€"])[0]
    assert len(ids) == 5
    cut = reader.pieces(ids, [False, False, False, True, True])
    assert [piece.text for piece in cut] == ["Ω", "\udce2", "\udc82", "\udcac"]
    assert visible(["\udce2"]) == [[("<0xE2>", True)]]
    assert [piece.text for piece in reader.pieces(ids[1:4], [None] * 3)] == ["\udca9", "\udce2\udc82"]
    assert reader.token_bytes(60000) == b"<no token 60000>"


def test_blanks_are_visible_where_they_could_be_missed() -> None:
    def line(*texts: str) -> str:
        return "".join(shown for runs in visible(texts) for shown, _ in runs)

    assert line("a b", " c") == "a b c"
    assert line("a", " ", "b") == "a b"
    assert line("a  b") == "a··b"
    assert line("a ", " b") == "a··b"
    assert line(" a\n", " b ") == "·a↵\n·b·"
    assert line("\t\x00\x7f\r\x9b\u202e") == "⇥␀␡␍<U+009B><U+202E>"
    assert clean("a\nb\x1b[1m") == "a↵b␛[1m"


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


class Page(HTMLParser):
    """Elements, attributes and text of a page; the parser itself complains of nothing, so borders are counted."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.trained = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "mark" in self.open:
            self.trained += data


def test_page_stands_alone_and_user_text_stays_text(tmp_path: Path, byte_level: Tokenizer) -> None:
    path = chat_store(tmp_path / "store", byte_level)
    write_page(path, tmp_path / "page.html", Selection(count=20))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert not {"script", "link", "img", "iframe", "object"} & set(page.elements)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert not re.search(r"https?:|url\(|@import", text)
    assert "<script>alert('x')</script>\" onload=\"y<U+202E>abc" in page.text
    assert page.trained.count("<script>") == 1 and " 漢字 runs<|end|>" in page.trained
    assert {"svg", "table", "details"} <= set(page.elements)
    assert "two<i>␛[1m.jsonl:3" in page.text
    assert "unusable: 3 no answer: one 3" in page.text
    assert [entry.name for entry in tmp_path.iterdir() if "page" in entry.name] == ["page.html"]


def test_control_tokens_with_hostile_names_stay_text(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>\x1b[31m"
    tokenizer = open_tokenizer(str(byte_level_folder(tmp_path / "in", extra=(name,))))
    index = next(iter(tokenizer.control_ids - {tokenizer.bos_id, tokenizer.eos_id}))
    source = SourceDocuments("text", [([5, index, index], [True] * 3)])
    plan = RowPlan(4)
    make_store(tmp_path / "s", [source], plan, tokenizer=backend(tokenizer), vocab_size=tokenizer.vocab_size)
    page = Page(render_page(tmp_path / "s", Selection()))
    assert "img" not in page.elements and not page.open
    assert page.trained.count(clean(name)) == 2
    for color in (False, True):
        text = "\n".join(describe(tmp_path / "s", None, color))
        assert "\x1b" not in COLOR.sub("", text) and "\x1b[31m" not in text and text.count("<img src=x") == 3


def test_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, byte_level: Tokenizer) -> None:
    path = chat_store(tmp_path / "store", byte_level)
    with pytest.raises(CannotWriteError, match="--html"):
        write_page(path, tmp_path / "nowhere" / "page.html", Selection())
    (tmp_path / "page.html").mkdir()
    (tmp_path / "page.html" / "kept").touch()
    with pytest.raises(CannotWriteError, match="--html"):
        write_page(path, tmp_path / "page.html", Selection())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["page.html", "store"]


RUN_FILE = """
run_dir: run
task: causal_lm
data: {store_dir: stores, train: records.jsonl, tokenizer: tokenizer, row_tokens: 64, overlong: drop}
model: {path: model}
optimizer: {learning_rate: 1e-3}
batch: {global_rows: 8}
duration: {steps: 10}
"""


@pytest.fixture
def project(tmp_path: Path, byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file, and what preparation leaves for its training split."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    (tmp_path / "records.jsonl").touch()
    (tmp_path / "tokenizer").mkdir()
    chat_store(tmp_path / "stores" / "train-1", byte_level)
    data = load_run(Path("run.yaml"), []).values["data"]
    current = {"task": "causal_lm", "data": data, "splits": {"train": "train-1"}}
    (tmp_path / "stores" / CURRENT_NAME).write_text(json.dumps(current, default=str))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run.yaml"], 0, ""),
        (["run.yaml", "data.row_tokens=32"], 0, "warning: "),
        (["run.yaml", "--row", "1"], 0, ""),
        (["run.yaml", "--html", "page.html"], 0, ""),
        (["stores"], 0, ""),
        (["stores/train-1", "--source", "0", "--documents"], 0, ""),
        (["run.yaml", "--split", "validation"], 66, "no split 'validation'"),
        (["run.yaml", "data.store_dir=elsewhere"], 66, "fulltune prepare"),
        (["nowhere.yaml"], 66, "nowhere.yaml"),
        (["tokenizer"], 66, "neither a token store"),
        (["run.yaml", "--row", "2"], 78, "0 to 1"),
        (["run.yaml", "--source", "x"], 78, "0 one"),
        (["run.yaml", "--random", "2", "--rows", "2"], 78, "--rows"),
        (["stores", "data.row_tokens=32"], 78, "only a run file"),
        (["run.yaml", "--html", "nowhere/page.html"], 73, "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_command(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert cli.main(["inspect", *arguments]) == code
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == bool(message)
    if code == 0:
        assert "\x1b" not in output.out, "captured output is no terminal"
        assert "two<i>␛[1m.jsonl" in output.out or "page.html" in output.out or "one.jsonl" in output.out


def in_terminal(folder: Path, environment: dict[str, str], *arguments: str) -> str:
    """What ``fulltune inspect`` writes to a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "launcher.cli", "inspect", *arguments]
    clean_environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    variables = {**clean_environment, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environment}
    process = subprocess.Popen(command, cwd=folder, stdout=theirs, env=variables)
    os.close(theirs)
    written = b""
    try:
        while block := os.read(ours, 1 << 16):
            written += block
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return written.decode()


def test_colors_on_a_terminal_unless_unwanted(project: Path) -> None:
    colored = in_terminal(project, {}, "stores", "--row", "0")
    assert COLOR.search(colored) and "\x1b" not in COLOR.sub("", colored)
    for environment, arguments in (({"NO_COLOR": "1"}, []), ({"TERM": "dumb"}, []), ({}, ["--no-color"])):
        plain = in_terminal(project, environment, "stores", "--row", "0", *arguments)
        assert "\x1b" not in plain and "⟦" in plain


def test_looking_at_one_row_does_not_read_the_store(tmp_path: Path, byte_level: Tokenizer) -> None:
    path, documents, length = tmp_path / "s", 200_000, 5_000
    make_store(path, [SourceDocuments("text", [([0] * 2, [True] * 2)])], RowPlan(length), tokenizer=backend(byte_level))
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    columns = {
        "document_ends": np.arange(1, documents + 1, dtype=np.uint32) * length,
        "document_lines": np.ones(documents, dtype=np.uint32),
        "rows_documents": np.arange(documents, dtype=np.uint32),
        "rows_starts": np.zeros(documents, dtype=np.uint32),
        "rows_lengths": np.full(documents, length, dtype=np.uint32),
        "rows_ends": np.arange(1, documents + 1, dtype=np.uint32),
        "rows_targets": np.ones(documents, dtype=np.uint32),
    }
    for name, values in columns.items():
        np.save(path / f"{name}.npy", values)
    for name, kind, number in (("input_ids", np.uint16, 1), ("targets", np.uint8, 8)):
        np.lib.format.open_memmap(path / f"{name}.npy", "w+", kind, (documents * length // number,))  # a file of holes
    for name in (*columns, "input_ids", "targets"):
        manifest["files"][f"{name}.npy"]["bytes"] = (path / f"{name}.npy").stat().st_size
    manifest |= {"num_documents": documents, "num_tokens": documents * length, "num_rows": documents}
    manifest |= {"num_segments": documents, "row_tokens": length}
    manifest["sources"][0]["num_documents"] = documents
    manifest["row_sources"][0] |= {"num_rows": documents, "rows_per_epoch": documents}
    manifest["digest"] = content_digest(manifest)
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))
    code = (
        "import resource, sys; from launcher.cli import main; code = main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "inspect", str(path)]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak_kib = int(result.stdout.splitlines()[-1])
    assert peak_kib < 400 << 10, "the store has 2 GB of tokens"
