"""Plain text: a document is a line, a whole file, or what stands between blank lines."""

from collections.abc import Iterable, Iterator
from typing import Literal

from data_prep.errors import BadDataError
from data_prep.lines import BOM, LINE_LIMIT_BYTES, decode, text_lines
from data_prep.records import Record


def read_text(
    blocks: Iterable[bytes],
    path: str,
    document: Literal["line", "file", "blank_line"],
    first_line: int = 1,
    limit_bytes: int = LINE_LIMIT_BYTES,
) -> Iterator[Record]:
    """Records {"text": ...}. Lines that hold only white space are no documents. Raises BadDataError with file:line."""
    match document:
        case "line":
            return _lines(blocks, path, first_line, limit_bytes)
        case "blank_line":
            return _paragraphs(blocks, path, first_line, limit_bytes)
        case "file":
            return _file(blocks, path, limit_bytes)


def _lines(blocks: Iterable[bytes], path: str, first_line: int, limit_bytes: int) -> Iterator[Record]:
    for lines, first in text_lines(blocks, path, first_line, limit_bytes):
        for line, text in enumerate(lines, first):
            if text and not text.isspace():
                yield Record({"text": text[:-1] if text[-1] == "\r" else text}, f"{path}:{line}", line)


def _paragraphs(blocks: Iterable[bytes], path: str, first_line: int, limit_bytes: int) -> Iterator[Record]:
    paragraph: list[str] = []
    begin = size = 0
    for lines, first in text_lines(blocks, path, first_line, limit_bytes):
        for line, text in enumerate(lines, first):
            if text and not text.isspace():
                if not paragraph:
                    begin, size = line, 0
                paragraph.append(text[:-1] if text[-1] == "\r" else text)
                size += len(text)
                if size > limit_bytes:
                    raise BadDataError(f"{path}:{begin}: no blank line within {limit_bytes} characters")
            elif paragraph:
                yield Record({"text": "\n".join(paragraph)}, f"{path}:{begin}", begin)
                paragraph = []
    if paragraph:
        yield Record({"text": "\n".join(paragraph)}, f"{path}:{begin}", begin)


def _file(blocks: Iterable[bytes], path: str, limit_bytes: int) -> Iterator[Record]:
    pieces: list[bytes] = []
    size = 0
    for block in blocks:
        pieces.append(block)
        size += len(block)
        if size > limit_bytes:
            raise BadDataError(f"{path}:1: more than {limit_bytes} bytes for one document; set `document: line`")
    text, fault = decode(b"".join(pieces).removeprefix(BOM), path, 1)
    if fault is not None:
        raise fault
    if text and not text.isspace():
        yield Record({"text": text}, f"{path}:1", 1)
