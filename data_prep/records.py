r"""Reads JSONL records strictly: every fault names file and line, memory is bounded by the longest line.

Only ``\n`` ends a record (U+2028 and its kin may stand inside text). A byte-order mark at the start
of a file and blank lines are passed over. Keys given twice, NaN and lone surrogates are errors.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from data_prep.config import Format, SourceConfig
from data_prep.decompress import Compression
from data_prep.errors import BadDataError, MissingInputError, StorageError

LINE_LIMIT_BYTES = 64 << 20
SPAN_BYTES = 4 << 20
_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """One input object, where it stands for people (``file:line``), and the line, row or item as a number from 1."""

    value: dict[str, Any]
    where: str
    line: int


@dataclass(frozen=True)
class Span:
    """A piece of one source: [start, stop) in bytes, row groups, batches or lines, whatever its format counts in.

    `first_line` is the number (from 1) of its first line, row or item.
    """

    start: int
    stop: int
    first_line: int


#: The span of what cannot be cut: compressed, not in UTF-8, or a stream whose batches need those before them.
WHOLE_FILE = Span(0, 0, 1)


@dataclass(frozen=True)
class Source:
    """One input file, its identity, and the spans it is worked on in (the same for any number of workers)."""

    path: str
    size_bytes: int
    modified_ns: int
    sha256: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class AlignedFile:
    """One of the text files whose equal lines belong together."""

    field: str
    path: str
    compression: Compression
    size_bytes: int
    modified_ns: int
    sha256: str
    offsets: tuple[int, ...]  # byte where each span begins; none for WHOLE_FILE


@dataclass(frozen=True)
class SourceFile:
    """One input file: what it is, its identity, and the spans it is worked on in, the same for any number of workers.

    Of aligned files `path` is the first, `size_bytes` the sum, `sha256` a hash of all and their field names.
    """

    path: str  # what is opened; of a data set on the Hub, where its records lie on this machine
    label: str  # what people are shown
    format: Format | Literal["aligned"]
    compression: Compression
    config: SourceConfig
    size_bytes: int
    modified_ns: int
    sha256: str
    spans: tuple[Span, ...]
    aligned: tuple[AlignedFile, ...] = ()


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


def find_files(entries: tuple[str, ...], dotted_key: str) -> list[str]:
    """The files that paths, globs and folders (of .jsonl files) name, each once, in a fixed order.

    Raises MissingInputError naming `dotted_key` for an entry that names nothing.
    """
    files: dict[str, None] = {}
    for entry in entries:
        path = Path(entry).expanduser()
        if path.is_dir():
            found = sorted(str(child) for child in path.glob("*.jsonl") if child.is_file())
        elif path.exists():
            found = [str(path)]
        else:
            root = Path(path.anchor) if path.is_absolute() else Path()
            pattern = str(path.relative_to(path.anchor))
            found = (
                sorted(str(child) for child in root.glob(pattern) if child.is_file()) if set("*?[") & set(entry) else []
            )
        if not found:
            what = "holds no .jsonl file" if path.is_dir() else "no such file"
            raise MissingInputError(f"{entry}: {what} (data.{dotted_key})")
        files.update(dict.fromkeys(found))
    return list(files)


def scan_source(path: str, span_bytes: int = SPAN_BYTES) -> Source:
    """Hash a file and cut it into spans at line ends, in one pass with constant memory."""
    digest, offset, line, cut = hashlib.sha256(), 0, 1, span_bytes
    borders = [(0, 1)]
    try:
        status = Path(path).stat()
        with Path(path).open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                while (newline := block.find(b"\n", max(0, cut - offset))) >= 0 and cut < offset + len(block):
                    begin = offset + newline + 1
                    borders.append((begin, line + block.count(b"\n", 0, newline + 1)))
                    cut = begin + span_bytes
                line += block.count(b"\n")
                offset += len(block)
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    stops = [begin for begin, _ in borders[1:]] + [offset]
    spans = tuple(Span(b, stop, n) for (b, n), stop in zip(borders, stops, strict=True) if b < stop)
    return Source(path, offset, status.st_mtime_ns, digest.hexdigest(), spans)


def read_records(path: str, span: Span | None = None) -> Iterator[Record]:
    """The records of a file, or of one span of it, in order. Raises BadDataError naming file:line."""
    start, line = (span.start, span.first_line) if span else (0, 1)
    with Path(path).open("rb") as file:
        file.seek(start)
        position = start
        while span is None or position < span.stop:
            raw = file.readline(LINE_LIMIT_BYTES + 1)
            if not raw:
                return
            if len(raw) > LINE_LIMIT_BYTES:
                raise BadDataError(f"{path}:{line}: a line of more than {LINE_LIMIT_BYTES >> 20} MiB is not one record")
            text = raw.removeprefix(_BOM) if position == 0 else raw
            if text.strip():
                where = f"{path}:{line}"
                yield Record(_parse(text, where), where, line)
            position += len(raw)
            line += 1


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line): {error.reason}") from error
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError:
        raise BadDataError(f"{where}: JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        raise BadDataError(f"{where}: not valid JSON (column {error.colno}): {error.msg}") from error
    except ValueError as error:
        raise BadDataError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadDataError(f'{where}: a record is an object such as {{"text": ...}}, not {kind(value)}')
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} is given twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object")


def text_field(record: Record, name: str) -> str:
    """The text in field `name`; BadDataError if it is missing, not text, or holds half a character."""
    if name not in record.value:
        have = ", ".join(list(record.value)[:8]) or "none"
        raise BadDataError(f"{record.where}: field {name!r} is missing (fields: {have})")
    return checked_text(record.value[name], f"field {name!r}", record.where)


def checked_text(value: Any, what: str, where: str) -> str:
    """`value` if it is a text that UTF-8 can hold; else a BadDataError beginning with `where` and `what`."""
    if not isinstance(value, str):
        raise BadDataError(f"{where}: {what} must be text, not {kind(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadDataError(f"{where}: {what} holds half of a surrogate pair at character {error.start}") from error
    return value


def label_field(record: Record) -> str:
    """The label's name: text as it is; a whole number or boolean as JSON writes it."""
    value = record.value.get("label")
    if isinstance(value, bool | int):
        return json.dumps(value)
    return text_field(record, "label")


def messages_field(record: Record) -> tuple[Message, ...]:
    """The turns of a conversation: objects with exactly role and content, both text."""
    value = record.value["messages"]
    if not isinstance(value, list) or not value:
        raise BadDataError(f"{record.where}: field 'messages' must be a list of turns, not {kind(value)}")
    messages = []
    for index, turn in enumerate(value):
        what = f"messages[{index}]"
        if not isinstance(turn, dict):
            raise BadDataError(f"{record.where}: {what} must be an object, not {kind(turn)}")
        missing = [name for name in ("role", "content") if name not in turn]
        extra = [name for name in turn if name not in ("role", "content") and turn[name] is not None]
        if missing:
            raise BadDataError(f"{record.where}: {what} lacks {missing[0]!r}")
        if extra:
            raise BadDataError(f"{record.where}: {what} has {extra[0]!r}; only role and content are understood")
        role = checked_text(turn["role"], f"{what}.role", record.where)
        messages.append(Message(role, checked_text(turn["content"], f"{what}.content", record.where)))
    return tuple(messages)


def shape_of(record: Record) -> str:
    """Which of the shapes ``text``, ``prompt`` or ``messages`` a record for a language model has."""
    shapes = [name for name in ("text", "prompt", "messages") if name in record.value]
    if len(shapes) == 1:
        return shapes[0]
    have = ", ".join(list(record.value)[:8]) or "none"
    fault = f"mixes {' and '.join(shapes)}" if shapes else f"has none of the known shapes (fields: {have})"
    known = '{"text"}, {"prompt", "response"} or {"messages": [{"role", "content"}, ...]}'
    raise BadDataError(f"{record.where}: {fault}; write {known}")
