"""Plain text: a document is a line, a whole file, or what stands between blank lines."""

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from data_prep.errors import BadDataError
from data_prep.lines import BOM, LINE_LIMIT_BYTES, decode, text_lines, whole_lines
from data_prep.records import Record

_NEWLINE = ord("\n")
_MAY_END_BLANK = np.array([byte >= 0x80 or chr(byte).isspace() for byte in range(256)])


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
                yield Record({"text": text[:-1] if text[-1] == "\r" else text}, f"{path}:{line}", line, len(text))


def _paragraphs(blocks: Iterable[bytes], path: str, first_line: int, limit_bytes: int) -> Iterator[Record]:
    held: list[bytes] = []  # a paragraph that has begun in earlier chunks
    begin = size = 0
    for chunk, first in whole_lines(blocks, path, first_line, limit_bytes):
        if first == 1:
            chunk = chunk.removeprefix(BOM)
        if not chunk:
            continue
        ends, blank = _line_ends(chunk)
        starts = np.concatenate(([0], ends[:-1] + 1))
        # Runs of lines that are not blank: [run_starts, run_stops) of the chunk's lines.
        change = np.diff(np.concatenate(([1], blank, [1])).astype(np.int8))
        for run_start, run_stop in zip(
            np.flatnonzero(change < 0).tolist(), np.flatnonzero(change > 0).tolist(), strict=True
        ):
            piece = chunk[int(starts[run_start]) : int(ends[run_stop - 1])]
            if held and run_start:  # a blank line came first
                yield _paragraph(held, path, begin)
                held = []
            if not held:
                begin, size = first + run_start, 0
            held.append(piece)
            size += len(piece)
            if size > limit_bytes:
                raise BadDataError(f"{path}:{begin}: no blank line within {limit_bytes} bytes")
            if run_stop < len(ends):
                yield _paragraph(held, path, begin)
                held = []
        if held and len(blank) and blank.all():
            yield _paragraph(held, path, begin)
            held = []
    if held:
        yield _paragraph(held, path, begin)


def _line_ends(chunk: bytes) -> tuple[np.ndarray, np.ndarray]:
    r"""Where each line of a chunk ends (at its ``\n``, or the chunk's end), and which hold only white space."""
    data = np.frombuffer(chunk, dtype=np.uint8)
    ends = np.flatnonzero(data == _NEWLINE)
    if not len(ends) or ends[-1] != len(data) - 1:
        ends = np.append(ends, len(data))
    # Only a line whose last byte is white space, or part of a wider character, can be blank.
    before = data[np.maximum(ends - 1, 0)]
    starts = np.concatenate(([0], ends[:-1] + 1))
    blank = ends == starts
    for line in np.flatnonzero(_MAY_END_BLANK[before] & ~blank).tolist():
        blank[line] = chunk[int(starts[line]) : int(ends[line])].decode(errors="replace").isspace()
    return ends, blank


def _paragraph(pieces: list[bytes], path: str, line: int) -> Record:
    content = b"\n".join(pieces)
    if b"\r" in content:
        content = content.replace(b"\r\n", b"\n").removesuffix(b"\r")
    text, fault = decode(content, path, line)
    if fault is not None:
        raise fault
    return Record({"text": text}, f"{path}:{line}", line, len(text))


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
        yield Record({"text": text}, f"{path}:1", 1, len(text))
