"""What is shown of a store is what is in it, and nothing in it reaches the terminal or the page as anything but text."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fixtures import bert_vocabulary, byte_level_folder, sentencepiece_folder
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import CannotWriteError, DataConfigError
from data_prep.inspect import describe
from data_prep.inspect_html import render_page, write_page
from data_prep.inspect_rows import Selection, select
from data_prep.store_writer import write_column
from data_prep.token_store import (
    CURRENT_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    ROW_COLUMNS,
    TokenStore,
    content_digest,
    hash_file,
    open_rows,
)
from data_prep.token_text import TokenText, clean, visible
from data_prep.tokenizer import Tokenizer, open_tokenizer
from launcher import cli

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = (
    "\x1b[2J\x1b]0;title\x07<script>alert('x')</script>\" onload=\"y\u202eabc\u2066 \x9b31m &amp; \u27e6z\u27e7 \r end"
)
COLOR = re.compile(r"\x1b\[[0-9;]*m")
Segment = tuple[int, int, int]


def write_store(
    folder: Path,
    tokenizer: Tokenizer,
    documents: Sequence[tuple[list[int], list[bool]]],
    rows: Sequence[Sequence[Segment]],
    task: str = "causal_lm",
    columns: Mapping[str, np.ndarray] | None = None,
    sources: Sequence[tuple[str, int]] = (("records.jsonl", -1),),
    label_names: Sequence[str] = (),
    row_tokens: int = 64,
) -> Path:
    """A store of the given documents (ids, marks), with rows of (document, start, length)."""
    tokenizer.save(folder / "tokenizer")
    lengths = np.array([len(ids) for ids, _ in documents])
    marks = np.array([mark for _, marks in documents for mark in marks], dtype=bool)
    segments = np.array([segment for row in rows for segment in row], dtype=np.int64).reshape(-1, 3)
    arrays = {
        "input_ids": np.array([token for ids, _ in documents for token in ids], dtype=np.uint16),
        "document_ends": np.cumsum(lengths).astype(np.uint32),
        "document_lines": np.arange(1, len(documents) + 1, dtype=np.uint32),
        **(columns or {}),
    }
    if task in ("causal_lm", "token_classification"):
        arrays["targets"] = np.packbits(marks)
    plan = (*segments.T, np.cumsum([len(row) for row in rows]), np.ones(len(rows)))
    arrays |= {f"rows_{name}": values.astype(np.int64) for name, values in zip(ROW_COLUMNS, plan, strict=True)}
    files = {f"{name}.npy": write_column(folder / f"{name}.npy", a.dtype, len(a), [a]) for name, a in arrays.items()}
    for path in sorted((folder / "tokenizer").iterdir()):
        files[f"tokenizer/{path.name}"] = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
    described, first = [], 0
    for path, number in sources:
        number = len(documents) if number < 0 else number
        described.append({"path": path, "first_document": first, "num_documents": number})
        first += number
    account = {"records_read": len(documents), "records": len(documents), "kept": len(documents), "tokens": len(marks)}
    padded = len(rows) * row_tokens - int(segments[:, 2].sum()) if task == "causal_lm" else None
    manifest = {
        "format": FORMAT_VERSION, "task": task, "vocab_size": tokenizer.vocab_size, "label_names": list(label_names),
        "pad_id": tokenizer.pad_id, "eos_id": tokenizer.eos_id, "bos_id": tokenizer.bos_id,
        "num_documents": len(documents), "num_tokens": len(marks), "num_targets": int(marks.sum()), "sources": described,
        "row_tokens": row_tokens, "num_rows": len(rows), "num_segments": len(segments), "overlong": "drop", "files": files,
        "ledger": {
            "sources": [{**account, "dropped": {"overlong": 3}} for _ in described],
            "total": {**account, "padding_tokens": padded, "dropped": {"overlong": 3}},
        },
    }  # fmt: skip
    manifest["digest"] = content_digest(manifest)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_tokenizer(str(byte_level_folder(tmp_path_factory.mktemp("byte_level"))))


def answered(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[bool]]:
    """A document with a trained answer and end of text."""
    first, second = tokenizer.encode_batch([prompt, answer])
    assert tokenizer.eos_id is not None
    return [*first, *second, tokenizer.eos_id], [False] * len(first) + [True] * (len(second) + 1)


def chat_store(folder: Path, tokenizer: Tokenizer) -> Path:
    """Two rows of three documents from two files; the last one's tail lies in the second row."""
    documents = [
        answered(tokenizer, "the river", " 漢字 runs"),
        answered(tokenizer, HOSTILE, HOSTILE),
        answered(tokenizer, "under\n\n  the\t", "bridge"),
    ]
    sizes = [len(ids) for ids, _ in documents]
    rows = [[(0, 0, sizes[0]), (1, 0, sizes[1])], [(2, 1, sizes[2] - 1)]]
    sources = (("one.jsonl", 2), ("two\x1b[1m.jsonl", 1))
    return write_store(folder, tokenizer, documents, rows, sources=sources, row_tokens=sum(sizes))


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
    assert "nder↵\n↵\n··the⇥⟦bridge<|end|>⟧" in text or "↵\n↵\n··the⇥⟦bridge<|end|>⟧" in text
    assert "-- document 0, one.jsonl:1: " in text
    assert "-- document 2, two␛[1m.jsonl:3: " in text
    store = TokenStore.open(tmp_path / "store")
    rows = open_rows(store, store.manifest["row_tokens"])
    size = len(store.tokens(2))
    assert f"{size - 1} tokens (1 to {size} of {size}), " in text
    assert f"... {rows.row_tokens - size + 1} tokens of padding" in lines
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
    document = (ids, [True] * len(ids))
    path = write_store(tmp_path / "s", byte_level, [document], [[(0, 0, 2)], [(0, 2, len(ids) - 2)]])
    text = "\n".join(describe(path, Selection(number=0, count=2), color=False))
    assert "the⟦ river⟧" in text
    assert " runs⟦" in text.replace("·", " ")
    assert f"{len(ids) - 3} targets" in text


def test_summary_has_figures_ledger_and_a_row(tmp_path: Path, byte_level: Tokenizer) -> None:
    path = chat_store(tmp_path / "store", byte_level)
    store = TokenStore.open(path)
    text = "\n".join(describe(path, None, color=False))
    assert re.search(rf"documents +3\n +tokens +{store.num_tokens} ", text)
    assert re.search(r"dropped: overlong +3 +3 +3", text)
    assert re.search(r"0  one\.jsonl .* 2 ", text) and re.search(r"1  two␛\[1m\.jsonl .* 1 ", text)
    assert "Documents by length" in text and "█" in text
    assert "byte-level" in text and "<|end|>" in text
    assert "== row " in text


def labelled(tmp_path: Path, tokenizer: Tokenizer, task: str, columns: dict[str, np.ndarray]) -> str:
    ids = tokenizer.encode_batch(["the river runs"])[0]
    documents = [(ids, [True, False, True] + [False] * (len(ids) - 3))] * 2
    rows = [[(0, 0, len(ids))], [(1, 0, len(ids))]]
    names = ("no", "yes\x1b[1m")
    path = write_store(tmp_path / task, tokenizer, documents, rows, task, columns, label_names=names)
    page = render_page(path, Selection(count=2))
    assert "\x1b" not in page
    summary = "\n".join(describe(path, None, color=False))
    rows_text = "\n".join(describe(path, Selection(number=0, count=2), color=False))
    assert "\x1b" not in summary + rows_text
    return summary + rows_text


def test_labels_scores_and_tags_have_their_names(tmp_path: Path, byte_level: Tokenizer) -> None:
    size = len(byte_level.encode_batch(["the river runs"])[0])
    assert size == 3, "the words of the fixture are tokens"
    pairs = {"pair_starts": np.array([0, 2], dtype=np.uint32)}
    text = labelled(
        tmp_path / "a", byte_level, "sequence_classification", {"labels": np.array([1, 0], dtype=np.int32), **pairs}
    )
    assert "label: yes␛[1m" in text and "label: no, second text from token 2" in text
    assert re.search(r"yes␛\[1m +1 +█", text)
    sets = {"label_sets": np.array([0, 1], dtype=np.int32), "label_sets_ends": np.array([2, 2], dtype=np.uint32)}
    text = labelled(tmp_path / "b", byte_level, "sequence_classification", sets)
    assert "labels: no, yes␛[1m" in text and "labels: none" in text
    text = labelled(
        tmp_path / "c", byte_level, "sequence_classification", {"scores": np.array([0.5, 4], dtype=np.float32)}
    )
    assert "score: 0.5" in text and "score: 4" in text
    tags = {"tags": np.array([1, -1, 0] * 2, dtype=np.int16)}
    text = labelled(tmp_path / "d", byte_level, "token_classification", tags)
    assert "⟦the/yes␛[1m⟧ river⟦ runs/no⟧" in text
    assert re.search(r"Tags .*\n +no +2 +█", text)


def test_answers_and_target_texts(tmp_path: Path, byte_level: Tokenizer) -> None:
    columns = {
        "answer_spans": np.array([1, 3], dtype=np.int32),
        "answer_spans_ends": np.array([2, 2], dtype=np.uint32),
        "pair_starts": np.array([1, 1], dtype=np.uint32),
        "questions": np.array([4, 4], dtype=np.uint32),
    }
    text = labelled(tmp_path, byte_level, "question_answering", columns)
    assert "the⟦ river runs⟧" in text
    assert "question 4: one answer" in text and "question 4: no answer in this window" in text
    target = byte_level.encode_batch(["old stone"])[0]
    ends = np.array([len(target), len(target)], dtype=np.uint32)
    text = labelled(
        tmp_path, byte_level, "seq2seq_lm", {"target_ids": np.array(target, dtype=np.uint16), "target_ids_ends": ends}
    )
    assert f"-- target, {len(target)} tokens\n⟦old stone⟧" in text


def test_selection(tmp_path: Path, byte_level: Tokenizer) -> None:
    store = TokenStore.open(chat_store(tmp_path / "store", byte_level))
    rows = open_rows(store, store.manifest["row_tokens"])

    def chosen(**which: Any) -> list[int]:
        return select(store, rows, Selection(**which))

    assert chosen(source="one.jsonl", count=5) == [0]
    assert chosen(source="1", count=5) == [1]
    assert chosen(source="0", count=5, documents=True) == [0, 1]
    assert chosen(number=1, count=5) == [1]
    assert chosen(count=9) == [0, 1]
    assert chosen(count=2, seed=4, documents=True) == chosen(count=2, seed=4, documents=True)
    assert len({tuple(chosen(count=2, seed=seed, documents=True)) for seed in range(20)}) == 3
    with pytest.raises(DataConfigError, match="rows 0 to 1"):
        chosen(number=2)
    with pytest.raises(DataConfigError, match=r"0 one\.jsonl, 1 two"):
        chosen(source="three.jsonl")


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
    assert "two␛[1m.jsonl:3" in page.text
    assert re.search(r"dropped: overlong\s*3\s*3\s*3", page.text)
    assert [entry.name for entry in tmp_path.iterdir() if "page" in entry.name] == ["page.html"]


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
    from launcher.run_config import load_run

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
        (["run.yaml", "--source", "x"], 78, "one.jsonl"),
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
        assert "two␛[1m.jsonl" in output.out or "page.html" in output.out or "one.jsonl" in output.out


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
    documents, length = 200_000, 5_000
    ids = byte_level.encode_batch(["the"])[0]
    path = write_store(tmp_path / "s", byte_level, [(ids, [True])], [[(0, 0, 1)]])
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    columns = {
        "document_ends": np.arange(1, documents + 1, dtype=np.uint32) * length,
        "document_lines": np.ones(documents, dtype=np.uint32),
        "rows_documents": np.arange(documents),
        "rows_starts": np.zeros(documents, dtype=np.int64),
        "rows_lengths": np.full(documents, length),
        "rows_ends": np.arange(1, documents + 1),
        "rows_targets": np.ones(documents, dtype=np.int64),
    }
    for name, values in columns.items():
        manifest["files"][f"{name}.npy"] = write_column(path / f"{name}.npy", values.dtype, documents, [values])
    for name, kind, number in (
        ("input_ids", np.uint16, documents * length),
        ("targets", np.uint8, documents * length // 8),
    ):
        np.lib.format.open_memmap(path / f"{name}.npy", "w+", kind, (number,))  # a file of holes
        manifest["files"][f"{name}.npy"]["bytes"] = (path / f"{name}.npy").stat().st_size
    manifest |= {"num_documents": documents, "num_tokens": documents * length, "num_rows": documents}
    manifest |= {"num_segments": documents, "row_tokens": length}
    manifest["sources"][0]["num_documents"] = documents
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
