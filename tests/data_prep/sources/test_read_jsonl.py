"""JSONL: the exact verdict on hostile lines, and the same records whatever the blocks."""

from itertools import pairwise
from pathlib import Path

import pytest

from data_prep.errors import BadDataError
from data_prep.sources.read_json import read_jsonl
from data_prep.sources.records import Record
from data_prep.sources.spans import cut_at_lines

FINE = b'{"text": "fine"}\n'


def pieces(content: bytes, size: int) -> list[bytes]:
    return [content[at : at + size] for at in range(0, len(content), size)]


def records(content: bytes, size: int = 1 << 20, **more: int) -> list[Record]:
    return list(read_jsonl(pieces(content, size), "a.jsonl", **more))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('\ufeff{"text": "mark"}'.encode(), "mark"),
        (b'{"text": "crlf"}\r', "crlf"),
        (b' \t{"text": "blanks"} \t', "blanks"),
        ('{"text": "a\u2028b\u2029c\u0085d\x0be"}'.replace("\x0b", "\\u000b").encode(), "a\u2028b\u2029c\u0085d\x0be"),
        (b'{"text": "a\\u0000b"}', "a\0b"),
        (b'{"text": "\\ud83d\\ude00"}', "\U0001f600"),
        (b'{"text": "\\ud83d\\ude00", "n": 1e308, "m": [-0.0, 12345678901234567890]}', "\U0001f600"),
        (b'{"text": "twice", "a": {"text": 1}, "b": [{"text": 2}, {"text": 3}]}', "twice"),
        (b'{"text": "x' + b"y" * 5000 + b'"}', "x" + "y" * 5000),
    ],
)
@pytest.mark.parametrize("last", [b"\n", b""])
def test_unusual_lines_that_are_right(line: bytes, text: str, last: bytes) -> None:
    assert [record.value["text"] for record in records(line + last)] == [text]
    assert [record.value["text"] for record in records(line + last, 3)] == [text]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', "not valid JSON (column 13): Expecting ',' delimiter"),
        (b'{"text": "a"} {"text": "b"}', "not valid JSON (column 15): Extra data"),
        (b'{"text": "a"}{"text": "b"}', "not valid JSON (column 14): Extra data"),
        (b'{"text": "\xff"}', "not UTF-8 (byte 11 of the line: "),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8 (byte 11"),
        (b'{"text": "\xc0\x80"}', "not UTF-8 (byte 11"),
        (b'\xef\xbb\xbf{"text": "a"}', "not valid JSON"),
        (b"[1, 2]", "not a list (of a JSON array: `format: json`)"),
        (b'"text"', "not a text"),
        (b"null", "not null"),
        (b'{"text": "a", "text": "b"}', "'text' is given twice"),
        (b'{"a": [{"b": {"c": 1, "d": 2, "c": 1}}]}', "'c' is given twice"),
        (b'{"n": NaN}', "NaN is not a JSON number"),
        (b'{"n": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"n": 1e999}', "1e999 is beyond every number"),
        (b'{"n": -1e999}', "-1e999 is beyond every number"),
        (b'{"n": 01}', "not valid JSON (column 8)"),
        (b'{"n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"n": ' + b'{"n":' * 100_000 + b"1" + b"}" * 100_000 + b"}", "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"{'text': 1}", "not valid JSON (column 2)"),
        (b'{"text": "a\x00b"}', "not valid JSON (column 12): Invalid control character"),
        (b"\x00" * 10, "not valid JSON (column 1)"),
        (b'{"text": "a\x0bb"}', "Invalid control character"),
        (b'{"text": "ab\\ud83d"}', "field 'text' holds half of a surrogate pair at character 2"),
        (b'{"a": {"b": ["c", "\\uDE00"]}}', "field 'a.b[1]' holds half of a surrogate pair at character 0"),
        (b'{"\\udc00": 1}', "a key holds half of a surrogate pair"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8 (byte 1 of the line: "),
        (b'{"text": "a"},', "Extra data"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("size", [1, 17, 1 << 20])
def test_faulty_lines_name_file_and_line_after_what_came_before(line: bytes, words: str, size: int) -> None:
    if len(line) > 1000 and size == 1:
        pytest.skip("slow in blocks of one byte")
    found = []
    with pytest.raises(BadDataError) as caught:
        found.extend(record for record in read_jsonl(pieces(FINE + b"\n" + line + b"\n" + FINE, size), "a.jsonl"))
    message = str(caught.value)
    assert message.startswith("a.jsonl:3: ") and words in message and "\n" not in message
    assert len(message) < 300


def test_records_before_a_fault_are_given() -> None:
    for fault in (b'{"text": "\xff"}\n', b'{"text": }\n', b'{"text": "\\ud800"}\n'):
        stream = read_jsonl([FINE * 3 + fault], "a.jsonl")
        assert [next(stream).line for _ in range(3)] == [1, 2, 3]
        with pytest.raises(BadDataError, match=r"^a\.jsonl:4: "):
            next(stream)


@pytest.mark.parametrize("size", [7, 100])
def test_a_line_beyond_the_limit_is_refused(size: int) -> None:
    long = b'{"text": "' + b"x" * 500 + b'"}\n'
    for content in (FINE + long, FINE + long.strip(), FINE + long + FINE):
        with pytest.raises(BadDataError, match=r"^a\.jsonl:2: a line of more than 400 bytes"):
            records(content, size, limit_bytes=400)
        assert len(records(content, size, limit_bytes=600)) >= 2


def test_a_line_without_end_is_refused_before_it_fills_memory() -> None:
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield b"x" * 1000

    with pytest.raises(BadDataError, match="more than 50000 bytes"):
        list(read_jsonl(endless(), "a.jsonl", limit_bytes=50_000))  # type: ignore[arg-type]
    assert taken <= 51


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("span_bytes", [1, 7, 64, 1000, 1 << 20])
def test_spans_partition_the_lines(span_bytes: int, ending: str, last: bool) -> None:
    lines = [f'{{"text": "{"é" * (number % 37)} {number}"}}' for number in range(200)]
    lines[5:5] = ["", ""]
    content = ("\ufeff" + ending.join(lines) + (ending if last else "")).encode()
    whole = records(content)
    assert [record.line for record in whole] == [1, 2, 3, 4, 5, *range(8, 203)]
    for size in (1, 50, 4096):
        spans, num_lines = cut_at_lines(pieces(content, size), span_bytes)
        assert num_lines == 202
        assert [spans[0].start, spans[-1].stop] == [0, len(content)]
        assert all(a.stop == b.start for a, b in pairwise(spans))
        assert all(span.stop - span.start >= span_bytes for span in spans[:-1])
        assert span_bytes > 64 or len(spans) > 50
        pieced = [r for s in spans for r in records(content[s.start : s.stop], size, first_line=s.first_line)]
        assert pieced == whole


def test_nothing_is_no_records(tmp_path: Path) -> None:
    assert records(b"") == records(b"\n \r\n\t\n") == []
