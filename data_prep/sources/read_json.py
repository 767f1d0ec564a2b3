"""JSON records: JSONL, JSON arrays alone or as values of one outer object, and SQuAD's articles of questions."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from json import JSONDecodeError
from typing import Any

import numpy as np

from data_prep.errors import BadDataError, DataConfigError
from data_prep.sources.json_items import find_items
from data_prep.sources.lines import LINE_LIMIT_BYTES, OnFault, raise_fault, text_lines, with_whole_mark
from data_prep.sources.records import Record, Span, kind
from data_prep.sources.spans import SPAN_BYTES, spans_between
from data_prep.sources.strict_json import has_surrogate_escape, parse_value, refuse_lone_surrogates, scan_value

_lenient = json.JSONDecoder()
_blanks = re.compile(r"[ \t\r\n]*").match
_BLANK = " \t\r"


def cut_json(
    blocks: Iterable[bytes],
    path: str,
    key: str | None,
    span_bytes: int = SPAN_BYTES,
    limit_bytes: int = LINE_LIMIT_BYTES,
) -> list[Span]:
    """Spans of whole items of the outer array, or of the array at `key` of the outer object (None: the only one).

    Bytes; a span begins behind the item before it. Raises BadDataError, or DataConfigError for a key that is not there.
    """
    borders: dict[str | None, list[tuple[int, int]]] = {}
    closed: dict[str | None, int] = {}
    for items in find_items(blocks, path, limit_bytes):
        if items.opened is not None:
            borders[items.key] = [(items.opened, 1)]
        found = borders[items.key]
        while (index := int(np.searchsorted(items.stops, found[-1][0] + span_bytes))) < len(items.stops):
            found.append((int(items.stops[index]), items.num_before + index + 2))
        if items.closed is not None:
            closed[items.key] = items.closed
    chosen = _chosen(list(closed), key, path)
    return spans_between(borders[chosen], closed[chosen])


def _chosen(keys: list[str | None], key: str | None, path: str) -> str | None:
    if keys == [None]:
        if key is not None:
            raise DataConfigError(f"{path}: is one array, so `split: {key}` names nothing; leave it out")
        return None
    known = ", ".join(map(repr, keys[:8])) or "none"
    if key is not None and key in keys:
        return key
    if key is None and len(keys) == 1:
        return keys[0]
    fault = f"holds no array {key!r}" if key is not None else f"holds {len(keys)} arrays; say which with `split`"
    raise DataConfigError(f"{path}: {fault} (arrays: {known})")


def read_json(
    blocks: Iterable[bytes],
    path: str,
    first_item: int,
    columns: Sequence[str] | None,
    begins_array: bool,
    on_fault: OnFault = raise_fault,
) -> Iterator[Record]:
    """The records of one span of `cut_json`. Items that are lists become objects with `columns` as their keys.

    `line` counts the elements of the array from 1. `on_fault` gets an element that is no record; an element whose
    end cannot be found raises BadDataError, because none behind it can be found either.
    """
    for value, item in _items(b"".join(blocks), path, first_item, begins_array, on_fault):
        where = f"{path}: element {item}"
        try:
            record = Record(_object(value, columns, where), where, item)
        except BadDataError as fault:
            on_fault(fault, item)
        else:
            yield record


def stream_json(
    blocks: Iterable[bytes],
    path: str,
    key: str | None,
    columns: Sequence[str] | None,
    limit_bytes: int = LINE_LIMIT_BYTES,
    on_fault: OnFault = raise_fault,
) -> Iterator[Record]:
    """`read_json` of a whole stream, whose array is found on the way. Raises BadDataError, DataConfigError."""
    for content, item, begins in _streamed(blocks, path, key, limit_bytes):
        yield from read_json([content], path, item, columns, begins, on_fault)


def _streamed(
    blocks: Iterable[bytes], path: str, key: str | None, limit_bytes: int
) -> Iterator[tuple[bytes, int, bool]]:
    """Bytes of whole items, the number of the first, and whether the array begins with them."""
    held = bytearray()
    held_from = 0
    reading = False

    def hold() -> Iterator[bytes]:
        nonlocal held_from
        for block in with_whole_mark(blocks):
            if not reading:
                held_from += len(held)
                held.clear()
            held.extend(block)
            yield block

    keys: list[str | None] = []
    for items in find_items(hold(), path, limit_bytes):
        if items.opened is not None:
            keys.append(items.key)
        if items.key not in (keys[0] if key is None else key, None):
            continue
        if items.opened is not None:
            del held[: items.opened - held_from]
            held_from, reading = items.opened, True
        stop = items.closed if items.closed is not None else int(items.stops[-1]) if len(items.stops) else held_from
        yield bytes(held[: stop - held_from]), items.num_before + 1, items.num_before == 0
        del held[: stop - held_from]
        held_from = stop
        reading = items.closed is None
    _chosen(keys, key, path)


def _items(content: bytes, path: str, item: int, begins_array: bool, on_fault: OnFault) -> Iterator[tuple[Any, int]]:
    """Values separated by one comma each; before the first of an array there is none."""
    is_utf8 = True
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text, is_utf8 = content.decode("utf-8", "surrogateescape"), False
    may_hold_surrogates = not is_utf8 or has_surrogate_escape(text)
    index = _stop_of_blanks(text, 0)
    while index < len(text):
        where = f"{path}: element {item}"
        if not begins_array:
            if text[index] != ",":
                raise BadDataError(f"{where}: not valid JSON: no comma before it (or the one before it ends early)")
            index = _stop_of_blanks(text, index + 1)
        begins_array = False
        try:
            value, stop, fault = *scan_value(text, index), None
        except (StopIteration, ValueError, RecursionError) as error:
            fault = _fault(error, index, where)
            value, stop = None, _stop_of_value(text, index, fault)
        if may_hold_surrogates and fault is None:
            fault = _fault_of_texts(value, text[index:stop], where)
        if fault is None:
            yield value, item
        else:
            on_fault(fault, item)
        index = _stop_of_blanks(text, stop)
        item += 1


def _stop_of_value(text: str, index: int, fault: BadDataError) -> int:
    """The end of a value that only strict JSON refuses (a key given twice, NaN); raises `fault` for any other."""
    try:
        _, stop = _lenient.scan_once(text, index)  # type: ignore[attr-defined]
    except (StopIteration, ValueError, RecursionError):
        behind = "no element behind it can be found, so it cannot be left out"
        raise BadDataError(f"{fault}; {behind}", fault.reason) from None
    return int(stop)


def _fault_of_texts(value: Any, content: str, where: str) -> BadDataError | None:
    """The fault of a value whose JSON text, `content`, was not UTF-8 or says half of a surrogate pair."""
    try:
        content.encode("utf-8", "surrogateescape").decode("utf-8")
        refuse_lone_surrogates(value, where)
    except UnicodeDecodeError as error:
        return BadDataError(f"{where}: not UTF-8: {error.reason}", "not_utf8")
    except BadDataError as fault:
        return fault
    return None


def _fault(error: Exception, index: int, where: str) -> BadDataError:
    """The fault of the element at `index`."""
    match error:
        case RecursionError():
            said = "JSON nested too deeply"
        case JSONDecodeError():
            said = f"not valid JSON (character {error.pos - index + 1} of the element): {error.msg}"
        case StopIteration():
            said = f"not valid JSON (character {error.value - index + 1} of the element)"
        case _:
            said = f"not valid JSON: {error}"
    return BadDataError(f"{where}: {said}", "not_json")


def _stop_of_blanks(text: str, index: int) -> int:
    match = _blanks(text, index)
    assert match is not None
    return match.end()


def _object(value: Any, columns: Sequence[str] | None, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    if not isinstance(value, list):
        raise BadDataError(f'{where}: a record is an object such as {{"text": ...}}, not {kind(value)}', "wrong_type")
    if columns is None:
        fault = f"{where}: is a list; name its parts in order, such as `columns: [text, label]`"
        raise BadDataError(fault, "wrong_type")
    if len(value) != len(columns):
        raise BadDataError(f"{where}: a list of {len(value)}, but `columns` names {len(columns)}", "wrong_columns")
    return dict(zip(columns, value, strict=True))


def read_jsonl(
    blocks: Iterable[bytes],
    path: str,
    first_line: int = 1,
    limit_bytes: int = LINE_LIMIT_BYTES,
    on_fault: OnFault = raise_fault,
) -> Iterator[Record]:
    """The records of whole lines. `on_fault` gets a line that is no record. Raises BadDataError naming file:line."""
    for lines, first in text_lines(blocks, path, first_line, limit_bytes, on_fault):
        for line, text in enumerate(lines, first):
            where = f"{path}:{line}"
            try:
                value = _value_of_line(text, where)
            except BadDataError as fault:
                on_fault(fault, line)
                continue
            if value is not None:
                yield Record(value, where, line, len(text), True)


def _value_of_line(text: str, where: str) -> dict[str, Any] | None:
    """The object in a line; None for a blank one. Raises BadDataError."""
    try:
        value, stop = scan_value(text, 0)
    except (StopIteration, ValueError, RecursionError):
        if not text.strip(_BLANK):
            return None
        value, stop = parse_value(text, where), len(text)  # an object after blanks, or it says what is wrong
    if stop < len(text) and text[stop:].strip(_BLANK):
        parse_value(text, where)
    if has_surrogate_escape(text):
        refuse_lone_surrogates(value, where)
    if not isinstance(value, dict):
        hint = " (of a JSON array: `format: json`)" if isinstance(value, list) else ""
        fault = f'{where}: a record is an object such as {{"text": ...}}, not {kind(value)}{hint}'
        raise BadDataError(fault, "wrong_type")
    return value


def questions(article: Record, on_fault: OnFault = raise_fault) -> Iterator[Record]:
    """Records {"id", "question", "context", "title", "answers": {"text": [...], "answer_start": [...]}}.

    An impossible question has no answers. `line` is the number of the article. `on_fault` gets a faulty question, or
    a paragraph or article without its parts, which counts as one record.
    """
    where = article.where.replace(": element ", ": article ")
    title = article.value.get("title", "")
    try:
        paragraphs = _list(article.value, "paragraphs", where)
    except BadDataError as fault:
        on_fault(fault, article.line)
        return
    for index, paragraph in enumerate(paragraphs):
        place = f"{where}, paragraph {index + 1}"
        try:
            context = _text(_mapping(paragraph, place), "context", place)
            asked = _list(paragraph, "qas", place)
        except BadDataError as fault:
            on_fault(fault, article.line)
            continue
        for number, question in enumerate(asked, 1):
            try:
                record = _question(question, context, title, f"{place}, question {number}", article.line)
            except BadDataError as fault:
                on_fault(fault, article.line)
            else:
                yield record


def _question(question: Any, context: str, title: Any, where: str, line: int) -> Record:
    value = {
        "id": _mapping(question, where).get("id"),
        "question": _text(question, "question", where),
        "context": context,
        "title": title,
        "answers": _answers(question, where),
    }
    return Record(value, where, line)


def _answers(question: dict[str, Any], where: str) -> dict[str, list[Any]]:
    if question.get("is_impossible") is True:
        return {"text": [], "answer_start": []}
    answers = [_mapping(answer, where) for answer in _list(question, "answers", where)]
    starts = [answer.get("answer_start") for answer in answers]
    for start in starts:
        if not isinstance(start, int) or isinstance(start, bool):
            raise BadDataError(f"{where}: answer_start must be a whole number, not {kind(start)}", "wrong_type")
    return {"text": [_text(answer, "text", where) for answer in answers], "answer_start": starts}


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadDataError(f"{where}: must be an object, not {kind(value)}", "wrong_type")
    return value


def _list(value: dict[str, Any], name: str, where: str) -> list[Any]:
    found = _field(value, name, where)
    if not isinstance(found, list):
        raise BadDataError(f"{where}: field {name!r} must be a list, not {kind(found)}", "wrong_type")
    return found


def _text(value: dict[str, Any], name: str, where: str) -> str:
    found = _field(value, name, where)
    if not isinstance(found, str):
        raise BadDataError(f"{where}: field {name!r} must be text, not {kind(found)}", "wrong_type")
    return found


def _field(value: dict[str, Any], name: str, where: str) -> Any:
    if name not in value:
        raise BadDataError(f"{where}: field {name!r} is missing", "missing_field")
    return value[name]
