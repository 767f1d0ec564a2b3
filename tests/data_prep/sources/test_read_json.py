"""JSON arrays and SQuAD: cut without parsing at the same borders a parser sees, and parsed strictly."""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from examples import IS_LONG, examples
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import BadDataError, DataConfigError
from data_prep.sources.read_json import cut_json, questions, read_json, stream_json
from data_prep.sources.records import Record, Span

TEXTS = st.text(st.sampled_from('a"\\[]{},:\n é😀\u2028'), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), max_size=12)
INDENTS = st.sampled_from([None, 0, 2])


def pieces(content: bytes, size: int) -> Iterator[bytes]:
    return (content[at : at + size] for at in range(0, len(content), size))


def by_spans(content: bytes, size: int, span_bytes: int, key: str | None = None, **more: Any) -> list[Record]:
    found: list[Record] = []
    for span in cut_json(pieces(content, size), "a.json", key, span_bytes):
        begins = content[span.start - 1 : span.start] == b"["
        blocks = pieces(content[span.start : span.stop], size)
        found += read_json(blocks, "a.json", span.first_line, more.get("columns"), begins)
    return found


def streamed(content: bytes, size: int, key: str | None = None, **more: Any) -> list[Record]:
    return list(stream_json(pieces(content, size), "a.json", key, more.get("columns")))


@examples(120)
@given(RECORDS, INDENTS, st.booleans(), st.integers(1, 40), st.integers(1, 200))
def test_arrays_are_cut_where_a_parser_would(
    values: list[dict[str, Any]], indent: int | None, ascii_only: bool, size: int, span_bytes: int
) -> None:
    content = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
    for found in (by_spans(content, size, span_bytes), streamed(content, size)):
        assert [record.value for record in found] == values
        assert [record.line for record in found] == list(range(1, len(values) + 1))
        assert [record.where for record in found] == [f"a.json: element {record.line}" for record in found]


@examples(80)
@given(
    st.dictionaries(TEXTS, RECORDS, min_size=1, max_size=4), VALUES, INDENTS, st.integers(1, 40), st.integers(1, 200)
)
def test_objects_of_splits(
    splits: dict[str, list[dict[str, Any]]], other: Any, indent: int | None, size: int, span_bytes: int
) -> None:
    outer: dict[str, Any] = {"meta": {"inner": [other]}, "version": '1.0 ["', **splits}
    content = ("\ufeff " + json.dumps(outer, indent=indent, ensure_ascii=False) + " \n").encode()
    for key, values in splits.items():
        assert [record.value for record in by_spans(content, size, span_bytes, key)] == values
        assert [record.value for record in streamed(content, size, key)] == values


@pytest.mark.parametrize(("count", "span_bytes"), [(400, 200), pytest.param(2000, 1000, marks=pytest.mark.long)])
def test_spans_are_many_and_do_not_depend_on_blocks(count: int, span_bytes: int) -> None:
    content = json.dumps([{"text": "x" * (number % 50), "n": number} for number in range(count)]).encode()
    spans = cut_json(pieces(content, 1 << 20), "a.json", None, span_bytes)
    assert len(spans) > 50
    assert [cut_json(pieces(content, size), "a.json", None, span_bytes) for size in (1, 777)] == [spans, spans]
    assert all(a.stop == b.start for a, b in pairwise(spans))


def test_lists_become_records_through_columns() -> None:
    content = b'{"val": [["c", "d"]], "train": [["a", "b"], ["e", "f"]]}'
    for read in (lambda **m: by_spans(content, 5, 1, "train", **m), lambda **m: streamed(content, 5, "train", **m)):
        found = read(columns=("text", "label"))
        assert [record.value for record in found] == [{"text": "a", "label": "b"}, {"text": "e", "label": "f"}]
        with pytest.raises(BadDataError, match=r"^a\.json: element 1: is a list; name its parts"):
            read()
        with pytest.raises(BadDataError, match=r"^a\.json: element 1: a list of 2, but `columns` names 3"):
            read(columns=("a", "b", "c"))


@pytest.mark.parametrize(
    ("content", "key", "words"),
    [
        (b'{"a": [{}], "b": [{}]}', None, r"holds 2 arrays; say which with `split` \(arrays: 'a', 'b'\)"),
        (b'{"a": [{}], "b": [{}]}', "c", r"holds no array 'c' \(arrays: 'a', 'b'\)"),
        (b'{"a": {}}', None, r"holds 0 arrays; say which with `split` \(arrays: none\)"),
        (b"[{}]", "train", "is one array, so `split: train` names nothing"),
    ],
)
def test_arrays_that_are_not_there(content: bytes, key: str | None, words: str) -> None:
    with pytest.raises(DataConfigError, match=words):
        by_spans(content, 4, 1, key)
    with pytest.raises(DataConfigError, match=words):
        streamed(content, 4, key)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty, not JSON"),
        (b" \n", "empty, not JSON"),
        (b'"text"', "not a JSON array"),
        (b'[{"a": 1}', "cut off inside its outer array or object (after 9 bytes)"),
        (b'[{"a": "1}]', "cut off inside"),
        (b'[{"a": 1}] x', "more text behind the end of the JSON value (byte 11)"),
        (b'[{"a": 1}] [{"b": 1}]', "more text behind the end of the JSON value (byte 11)"),
        (b'{"a": 1}\n{"a": 2}\n', "of one object a line: `format: jsonl`"),
        (b'[{"a": 1} {"a": 2}]', "element 2: not valid JSON: no comma"),
        (b'[{"a": 1},, {"a": 2}]', "element 2: not valid JSON"),
        (b'[{"a": 1}, {"a": 2},]', "element 3: not valid JSON"),
        (b'[,{"a": 1}]', "element 1: not valid JSON (character 1 of the element)"),
        (b'[{"a": 1}, 5, {"a": 2}]', "element 2: a record is an object"),
        (b'["a", "b"]', 'element 1: a record is an object such as {"text": ...}, not a text'),
        (b'[{"a": 1}, {"a": 1, "a": 2}]', "element 2: not valid JSON: key 'a' is given twice"),
        (b'[{"a": 1}, {"a": NaN}]', "element 2: not valid JSON: NaN"),
        (b'[{"a": 1}, {"a": 1e999}]', "element 2: not valid JSON: 1e999"),
        (b'[{"a": 1}, {"a": "\\udc00"}]', "element 2: field 'a' holds half of a surrogate pair"),
        (b'[{"a": 1}, {"a": "\xff"}]', "element 2: not UTF-8"),
        (b'[{"a": 1}, {"a": [}}]', "element 2: not valid JSON (character 8 of the element)"),
        (b'[{"a": 1}, {"a": [}]}]', "brackets do not match somewhere before byte 21"),
        (b'[{"a": 1}}', "brackets do not match somewhere before byte 10"),
        (b'[{"a": 1}, {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]", "element 2: JSON nested too deeply"),
        (b'{"a": [{}], "a": [{}]}', "key 'a' is given twice"),
        (b'{"a": [{}], "n": NaN}', "NaN is not a JSON number"),
        (b'{"a": [{}] "n": 1}', "outside the arrays of records: not valid JSON (column 10)"),
        (b'{"a": [{}], [{}]}', "an array in an object without a key"),
        (b'{"a": [{}], "n": "\xff"}', "not UTF-8 outside the arrays of records"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("size", [3, 1 << 20])
def test_faults_name_the_item(content: bytes, words: str, size: int) -> None:
    key = "a" if content.startswith(b'{"a": [') else None
    size = size if IS_LONG else max(size, len(content) // 1000)  # a thousand blocks are many enough
    for read in (lambda: by_spans(content, size, 1, key), lambda: streamed(content, size, key)):
        with pytest.raises(BadDataError) as caught:
            read()
        message = str(caught.value)
        assert message.startswith("a.json: ") and words in message and len(message) < 300


def test_items_beyond_the_limit_are_refused() -> None:
    content = json.dumps([{"a": "x"}, {"a": "x" * 1000}, {"a": "y"}]).encode()
    for size in (10, 300, 1 << 20):
        with pytest.raises(BadDataError, match=r"^a\.json: element 2: more than 500 bytes are not one record"):
            cut_json(pieces(content, size), "a.json", None, limit_bytes=500)
    assert cut_json(pieces(content, 10), "a.json", None, limit_bytes=1200) == [Span(1, len(content) - 1, 1)]


def article(**more: Any) -> Record:
    question = {"id": "q1", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}], **more}
    value = {"title": "T", "paragraphs": [{"context": "Ann ran.", "qas": [question, {**question, "id": "q2"}]}]}
    return Record(value, "a.json: element 3", 3)


def test_squad_gives_one_record_a_question() -> None:
    first, second = questions(article())
    answers = {"text": ["Ann"], "answer_start": [0]}
    assert first.value == {"id": "q1", "question": "Who?", "context": "Ann ran.", "title": "T", "answers": answers}
    assert (second.value["id"], second.line) == ("q2", 3)
    assert second.where == "a.json: article 3, paragraph 1, question 2"
    impossible = next(questions(article(is_impossible=True, answers=[], plausible_answers=[{"text": "Ann"}])))
    assert impossible.value["answers"] == {"text": [], "answer_start": []}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"answers": None}, "field 'answers' must be a list, not null"),
        ({"question": 5}, "field 'question' must be text, not a number"),
        ({"answers": ["Ann"]}, "must be an object, not a text"),
        ({"answers": [{"text": "Ann"}]}, "answer_start must be a whole number, not null"),
        ({"answers": [{"text": "Ann", "answer_start": True}]}, "answer_start must be a whole number, not a boolean"),
        ({"answers": [{"answer_start": 1}]}, "field 'text' is missing"),
    ],
)
def test_faulty_questions_are_named(more: dict[str, Any], words: str) -> None:
    with pytest.raises(BadDataError) as caught:
        list(questions(article(**more)))
    assert str(caught.value) == f"a.json: article 3, paragraph 1, question 1: {words}"


def test_many_escapes_before_a_quote_do_not_hide_it() -> None:
    values = [{"text": "\n\t\\" * number + '"{[' * (number % 3)} for number in range(300)]
    content = json.dumps(values).encode()
    assert [record.value for record in by_spans(content, 1 << 20, 100)] == values
