"""Plain text and parallel text."""

from pathlib import Path

import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from data_prep.config import SourceConfig
from data_prep.errors import BadDataError
from data_prep.sources.read_text import read_text
from data_prep.sources.records import Record
from data_prep.sources.spans import cut_at_blank_lines, find_lines

CONTENT = "\ufefffirst\u2028still\r\n\n  \nthird  \n fourth\n\n\nlast".encode()


def texts(document: str, content: bytes = CONTENT, **more: int) -> list[tuple[str, int]]:
    records = read_text([content], "a.txt", document, **more)  # type: ignore[arg-type]
    return [(record.value["text"], record.line) for record in records]


def test_documents_are_lines_paragraphs_or_files() -> None:
    assert texts("line") == [("first\u2028still", 1), ("third  ", 4), (" fourth", 5), ("last", 8)]
    assert texts("blank_line") == [("first\u2028still", 1), ("third  \n fourth", 4), ("last", 8)]
    assert texts("file") == [(CONTENT.decode("utf-8-sig"), 1)]
    for document in ("line", "blank_line", "file"):
        assert texts(document, b" \n\n") == texts(document, b"") == []
    assert next(read_text([CONTENT], "a.txt", "line")) == Record({"text": "first\u2028still"}, "a.txt:1", 1, 12, True)


@pytest.mark.parametrize("document", ["line", "blank_line", "file"])
def test_bytes_that_are_no_text(document: str) -> None:
    with pytest.raises(BadDataError, match=r"^a\.txt:3: not UTF-8 \(byte 2 of the line: "):
        texts(document, b"a\n\nb\xff\n")
    with pytest.raises(BadDataError, match=r"^a\.txt:1: not UTF-8 .*set `encoding: utf-16`"):
        texts(document, "text".encode("utf-16"))


def test_documents_beyond_the_limit_are_refused() -> None:
    with pytest.raises(BadDataError, match=r"^a\.txt:1: more than 10 bytes for one document; set `document: line`"):
        texts("file", b"a\n" * 20, limit_bytes=10)
    with pytest.raises(BadDataError, match=r"^a\.txt:3: no blank line within 10 bytes"):
        texts("blank_line", b"a\n\n" + b"aaa\n" * 20, limit_bytes=10)


@pytest.mark.parametrize("size", [1, 10, 1 << 20])
def test_paragraphs_are_the_same_in_spans(size: int) -> None:
    content = "\n".join(
        f"{'x' * (number % 5)}\n" * (number % 3) + " \t\n" * (number % 2) for number in range(100)
    ).encode()
    blocks = [content[at : at + size] for at in range(0, len(content), size)]
    spans = cut_at_blank_lines(blocks, 20)
    assert len(spans) > 10
    pieced = [pair for s in spans for pair in texts("blank_line", content[s.start : s.stop], first_line=s.first_line)]
    assert pieced == texts("blank_line", content)


def test_lines_are_found_by_number() -> None:
    content = b"".join(b"x" * (number % 9) + b"\n" for number in range(100)) + b"end"
    starts = [0, *(index + 1 for index, byte in enumerate(content) if byte == 10)]
    for size in (1, 7, 1000):
        blocks = [content[at : at + size] for at in range(0, len(content), size)]
        assert find_lines(blocks, [1, 2, 3, 50, 101, 102]) == ([starts[index - 1] for index in (1, 2, 3, 50, 101)], 101)
    assert find_lines([b"a\nb\n"], [1]) == ([0], 2)


def test_a_text_source_needs_one_origin() -> None:
    with pytest.raises(ValueError, match="exactly one of path, hub and aligned"):
        SourceConfig(path="a", aligned={"a": "b"})


def test_records_are_small_tuples(tmp_path: Path) -> None:
    value, where, line, *_ = Record({"text": "a"}, "a.txt:1", 1)
    assert (value, where, line) == ({"text": "a"}, "a.txt:1", 1)


@examples(200)
@given(
    st.lists(
        st.sampled_from(["a", "b c", " indented", "", " ", "\t", "\u3000", "\x1c", "漢", "x\r", "\r", "é "]),
        max_size=30,
    ),
    st.integers(1, 9),
    st.booleans(),
)
def test_paragraphs_are_those_of_a_line_by_line_reading(lines: list[str], step: int, ends_open: bool) -> None:
    content = "\n".join(lines) + ("" if ends_open else "\n")
    expected: list[tuple[str, int]] = []
    begin, paragraph = 0, []
    for number, line in enumerate([*content.split("\n"), ""], 1):
        if line and not line.isspace():
            begin = begin if paragraph else number
            paragraph.append(line.removesuffix("\r"))
        elif paragraph:
            expected.append(("\n".join(paragraph), begin))
            paragraph = []
    data = content.encode()
    blocks = [data[start : start + step] for start in range(0, len(data), step)]
    found = [(record.value["text"], record.line) for record in read_text(blocks, "a.txt", "blank_line")]
    assert found == expected
