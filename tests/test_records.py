"""Reading JSONL: what is a record, where it stands, and how faults are told."""

from pathlib import Path

import pytest

from data_prep.errors import BadDataError, MissingInputError
from data_prep.records import (
    LINE_LIMIT_BYTES,
    Record,
    find_files,
    label_field,
    messages_field,
    read_records,
    scan_source,
    shape_of,
    text_field,
)


def record(value: dict[str, object]) -> Record:
    return Record(value, "data.jsonl:7", 7)


def test_only_newlines_end_records_and_blank_lines_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"text": "one\u2028two\u0085three"}\r\n\n   \n{"text": "four"}'.encode())
    found = list(read_records(str(path)))
    assert [entry.value["text"] for entry in found] == ["one\u2028two\u0085three", "four"]
    assert [entry.where for entry in found] == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("span_bytes", [1, 7, 64, 1000, 1 << 20])
def test_spans_partition_the_file(tmp_path: Path, span_bytes: int, ending: str, last: bool) -> None:
    path = tmp_path / "a.jsonl"
    lines = [f'{{"text": "{"é" * (number % 37)} {number}"}}' for number in range(200)]
    lines[5:5] = ["", ""]
    path.write_bytes((ending.join(lines) + (ending if last else "")).encode())
    source = scan_source(str(path), span_bytes)
    assert source.size_bytes == path.stat().st_size
    assert [source.spans[0].start, source.spans[-1].stop] == [0, source.size_bytes]
    assert all(a.stop == b.start for a, b in zip(source.spans, source.spans[1:], strict=False))
    if span_bytes < 1000:
        assert len(source.spans) > 3
    pieced = [entry for span in source.spans for entry in read_records(str(path), span)]
    assert pieced == list(read_records(str(path)))


def test_spans_of_a_file_larger_than_a_read_block(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    long = "x" * 300_000
    path.write_text("".join(f'{{"text": "{number} {long if number % 3 == 0 else ""}"}}\n' for number in range(40)))
    source = scan_source(str(path), span_bytes=500_000)
    pieced = [entry for span in source.spans for entry in read_records(str(path), span)]
    assert len(source.spans) > 4 and pieced == list(read_records(str(path)))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', "not valid JSON"),
        (b'{"text": "a"} {"text": "b"}', "not valid JSON"),
        (b'{"text": "\xff"}', "not UTF-8 (byte 11"),
        (b"[1, 2]", "not a list"),
        (b'"text"', "not a text"),
        (b'{"text": "a", "text": "b"}', "'text' is given twice"),
        (b'{"text": NaN}', "NaN is not a JSON number"),
        (b'{"n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
        (b'{"text": "a\x00b"}', "not valid JSON"),
    ],
)
def test_faulty_lines_name_file_and_line(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(BadDataError) as caught:
        list(read_records(str(path)))
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ") and words in message and "\n" not in message


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.truncate(3 * LINE_LIMIT_BYTES)
    with pytest.raises(BadDataError, match=r"a\.jsonl:1: a line of more than 64 MiB"):
        list(read_records(str(path)))


def test_shapes() -> None:
    assert shape_of(record({"text": "a", "id": 3})) == "text"
    assert shape_of(record({"prompt": "a", "response": "b"})) == "prompt"
    assert shape_of(record({"messages": []})) == "messages"
    with pytest.raises(BadDataError, match=r"data\.jsonl:7: mixes text and messages"):
        shape_of(record({"text": "a", "messages": []}))
    with pytest.raises(BadDataError, match=r"none of the known shapes \(fields: instruction, output\)"):
        shape_of(record({"instruction": "a", "output": "b"}))


def test_labels_are_texts_numbers_or_booleans() -> None:
    values = ["good", 3, -1, True, False]
    assert [label_field(record({"label": value})) for value in values] == ["good", "3", "-1", "true", "false"]
    for value in (None, 1.5, ["a"]):
        with pytest.raises(BadDataError, match="field 'label' must be text"):
            label_field(record({"label": value}))


def test_lone_surrogates_are_refused_and_pairs_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n{"text": "ab\\ud83d"}\n')
    whole, half = read_records(str(path))
    assert text_field(whole, "text") == "\U0001f600"
    with pytest.raises(BadDataError, match=r"a\.jsonl:2: field 'text' holds half of a surrogate pair at character 2"):
        text_field(half, "text")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "must be a list of turns, not a text"),
        ([], "must be a list of turns"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"role": "user"}], r"messages\[0\] lacks 'content'"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content must be text, not null"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content must be text, not a list"),
        ([{"role": "user", "content": "a", "weight": 1}], r"messages\[0\] has 'weight'"),
    ],
)
def test_faulty_conversations(messages: object, words: str) -> None:
    with pytest.raises(BadDataError, match=words):
        messages_field(record({"messages": messages}))


def test_files_by_path_glob_folder_and_list(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "notes.txt", "deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    a, b, c = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "deep/c.jsonl"))
    assert find_files((str(tmp_path),), "train") == [a, b]
    assert find_files((f"{tmp_path}/*.jsonl",), "train") == [a, b]
    assert find_files((f"{tmp_path}/**/*.jsonl",), "train") == [a, b, c]
    assert find_files((b, a, b), "train") == [b, a]
    for missing in (f"{tmp_path}/none.jsonl", f"{tmp_path}/x*.jsonl"):
        with pytest.raises(MissingInputError, match=r"no such file \(data\.train\)"):
            find_files((missing,), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match=r"holds no \.jsonl file \(data\.validation\)"):
        find_files((str(tmp_path / "empty"),), "validation")
