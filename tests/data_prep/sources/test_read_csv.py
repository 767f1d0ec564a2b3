"""CSV and TSV: records end where a csv reader says so, wherever blocks and spans end."""

import csv
import io
from collections.abc import Iterator

import pytest
from examples import examples
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.errors import BadDataError
from data_prep.sources.read_csv import Dialect, cut_csv, read_csv, read_header, read_rows
from data_prep.sources.records import Record

CSV, TSV, PLAIN_TSV = Dialect(",", True), Dialect("\t", True), Dialect("\t", False)


def pieces(content: bytes, size: int) -> Iterator[bytes]:
    return (content[at : at + size] for at in range(0, len(content), size))


def rows_by_spans(content: bytes, dialect: Dialect, size: int, span_bytes: int) -> list[tuple[list[str], int]]:
    found: list[tuple[list[str], int]] = []
    for span in cut_csv(pieces(content, size), "a.csv", dialect, span_bytes):
        found += read_rows(pieces(content[span.start : span.stop], size), "a.csv", dialect, span.first_line)
    return found


def records(content: bytes, columns: tuple[str, ...], dialect: Dialect = CSV, skip: bool = False) -> list[Record]:
    return list(read_csv([content], "a.csv", dialect, columns, skip))


CELLS = st.text(st.sampled_from('a",\n \té'), max_size=6)
ROWS = st.lists(st.lists(CELLS, min_size=2, max_size=3), max_size=12)


@examples(400)
@given(ROWS, st.sampled_from([CSV, TSV]), st.sampled_from(["\n", "\r\n"]), st.integers(1, 20), st.integers(1, 60))
def test_written_rows_come_back(rows: list[list[str]], dialect: Dialect, end: str, size: int, span_bytes: int) -> None:
    stream = io.StringIO()
    csv.writer(stream, delimiter=dialect.delimiter, lineterminator=end).writerows(rows)
    content = ("\ufeff" + stream.getvalue()).encode()
    found = rows_by_spans(content, dialect, size, span_bytes)
    assert [row for row, _ in found] == rows
    lines = 1
    for row, line in found:
        assert line == lines
        lines += 1 + sum(cell.count("\n") for cell in row)


@examples(400)
@example('5" pipe,a\n"b\nc\nd",e\n', 1, 1)  # a quote in the middle of a field opens none
@example('5",""a\n"b\nc\nd",e\n', 7, 1)
@example('"a""\nb""","c"\n' * 3, 4, 1)
@example('"aaaaaa""b\nc",5"x\n', 8, 1)  # a doubled quote across blocks, and one that opens nothing
@given(st.text(st.sampled_from('a",\n'), max_size=40), st.integers(1, 20), st.integers(1, 30))
def test_any_text_gives_what_the_csv_module_gives(text: str, size: int, span_bytes: int) -> None:
    try:
        wanted: list[list[str]] | None = [
            row for row in csv.reader(io.StringIO(text, newline="\n"), strict=True) if row
        ]
    except csv.Error:
        wanted = None
    try:
        found: list[list[str]] | None = [row for row, _ in rows_by_spans(text.encode(), CSV, size, span_bytes)]
    except BadDataError:
        found = None
    assert found == wanted


@examples(100)
@given(st.lists(st.text(st.sampled_from('a"\t é'), max_size=8), max_size=20), st.integers(1, 20), st.integers(1, 60))
def test_without_quoting_a_quote_is_a_character(lines: list[str], size: int, span_bytes: int) -> None:
    found = rows_by_spans("\n".join(lines).encode(), PLAIN_TSV, size, span_bytes)
    assert found == [(text.split("\t"), line) for line, text in enumerate(lines, 1) if text]


def test_records_have_columns_and_lines() -> None:
    content = b'text,label\n"one\n""two""",1\n\n5" pipe,0\n'
    assert read_header([content], "a.csv", CSV) == ("text", "label")
    assert records(content, ("text", "label"), skip=True) == [
        Record({"text": 'one\n"two"', "label": "1"}, "a.csv:2", 2),
        Record({"text": '5" pipe', "label": "0"}, "a.csv:5", 5),
    ]


@pytest.mark.parametrize(
    ("content", "dialect", "words"),
    [
        (b"a,b\nc\n", CSV, r"^a\.csv:2: 1 field, but 2 fields in the header or `columns`$"),
        (b"a,b\nc,d,e\n", CSV, r"^a\.csv:2: 3 fields, but 2 fields"),
        (b'a,b\n"c,d\ne,f\n', CSV, r"^a\.csv:2: not a valid row: unexpected end of data; where quotes are ordinary"),
        (b'a,b\n"c"d,e\n', CSV, r"^a\.csv:2: not a valid row: ',' expected after '\"'; .*`quoting: false`"),
        (b"a,b\nc,\xff\n", CSV, r"^a\.csv:2: not UTF-8 \(byte 3 of the line: "),
        (b'a\tb\n"c\td\te\n', PLAIN_TSV, r"^a\.csv:2: 3 fields, but 2 fields"),
        (b"a,b\nc\rd,e\n", CSV, r"^a\.csv:2: not a valid row: new-line character"),
    ],
)
def test_faults_name_the_line(content: bytes, dialect: Dialect, words: str) -> None:
    stream = read_csv([content], "a.csv", dialect, ("one", "two"), False)
    assert next(stream).line == 1
    with pytest.raises(BadDataError, match=words):
        list(stream)


def test_a_quote_without_end_does_not_fill_memory() -> None:
    content = b'a,b\n"c,d\n' + b"e,f\n" * 1000
    with pytest.raises(BadDataError, match=r"^a\.csv:2: a row of more than 500 bytes; a quote without its end\?"):
        list(read_rows(pieces(content, 300), "a.csv", CSV, limit_bytes=500))
    with pytest.raises(BadDataError, match="a quote without its end"):
        cut_csv(pieces(content, 300), "a.csv", CSV, limit_bytes=500)


@pytest.mark.parametrize("content", [b"", b"\n", b"a,a\n1,2\n", b"a,,b\n1,2,3\n"])
def test_headers_need_different_names(content: bytes) -> None:
    with pytest.raises(BadDataError, match=r"^a\.csv:1: .*set `columns`"):
        read_header([content], "a.csv", CSV)
