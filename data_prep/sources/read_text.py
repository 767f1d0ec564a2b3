"""Text: documents that are lines, files or paragraphs."""

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from data_prep.errors import BadDataError
from data_prep.sources.lines import (
    BOM,
    LINE_LIMIT_BYTES,
    OnFault,
    decode,
    raise_fault,
    text_lines,
    whole_lines,
)
from data_prep.sources.records import Record

_MAY_BE_BLANK = np.array([byte >= 0x80 or chr(byte).isspace() for byte in range(256)])


def read_text(
    blocks: Iterable[bytes],
    path: str,
    document: Literal["line", "file", "blank_line"],
    first_line: int = 1,
    limit_bytes: int = LINE_LIMIT_BYTES,
    on_fault: OnFault = raise_fault,
) -> Iterator[Record]:
    """Records {"text": ...}. Lines that hold only white space are no documents.

    `on_fault` gets documents that are not UTF-8. Raises BadDataError with file:line.
    """
    match document:
        case "line":
            return _lines(blocks, path, first_line, limit_bytes, on_fault)
        case "blank_line":
            return _paragraphs(blocks, path, first_line, limit_bytes, on_fault)
        case "file":
            return _file(blocks, path, limit_bytes, on_fault)


def _lines(
    blocks: Iterable[bytes], path: str, first_line: int, limit_bytes: int, on_fault: OnFault
) -> Iterator[Record]:
    for lines, first in text_lines(blocks, path, first_line, limit_bytes, on_fault):
        for line, text in enumerate(lines, first):
            if text and not text.isspace():
                yield Record({"text": text[:-1] if text[-1] == "\r" else text}, f"{path}:{line}", line, len(text), True)


def _paragraphs(
    blocks: Iterable[bytes], path: str, first_line: int, limit_bytes: int, on_fault: OnFault
) -> Iterator[Record]:
    held: list[bytes] = []  # a paragraph that has begun in earlier chunks
    begin = size = 0
    for chunk, newlines, first in whole_lines(blocks, path, first_line, limit_bytes):
        if first == 1 and chunk.startswith(BOM):
            chunk, newlines = chunk.removeprefix(BOM), newlines - len(BOM)
        if not chunk:
            continue
        ends = newlines if len(newlines) and newlines[-1] == len(chunk) - 1 else np.append(newlines, len(chunk))
        blank = _blank_lines(chunk, ends)
        if held and len(blank) and blank[0] == 0:
            yield from _paragraph(held, path, begin, on_fault)
            held = []
        for run_start, run_stop, start, stop in _runs(ends, blank):
            piece = chunk[start:stop]
            if not held:
                begin, size = first + run_start, 0
            held.append(piece)
            size += len(piece)
            if size > limit_bytes:
                raise BadDataError(f"{path}:{begin}: no blank line within {limit_bytes} bytes")
            if run_stop < len(ends):
                yield from _paragraph(held, path, begin, on_fault)
                held = []
    if held:
        yield from _paragraph(held, path, begin, on_fault)


def _blank_lines(chunk: bytes, ends: np.ndarray) -> np.ndarray:
    """The numbers, ascending from 0, of the lines that hold only white space. `ends`: where each line ends."""
    data = np.frombuffer(chunk, dtype=np.uint8)
    # Only a line whose last byte is white space, or part of a wider character, can be blank; so of its first.
    odd = np.flatnonzero(_MAY_BE_BLANK[data[ends - 1]])  # before an empty line stands a newline; at a chunk's end too
    starts = np.where(odd > 0, ends[odd - 1] + 1, 0)
    empty = starts == ends[odd]
    odd, starts, empty = (values[empty | _MAY_BE_BLANK[data[starts]]] for values in (odd, starts, empty))
    for place in np.flatnonzero(~empty).tolist():
        line = chunk[int(starts[place]) : int(ends[odd[place]])]
        empty[place] = line.isspace() or line.decode(errors="replace").isspace()
    blank: np.ndarray = odd[empty]
    return blank


def _runs(ends: np.ndarray, blank: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """The runs of lines that are not blank: lines [start, stop) from 0, and their bytes [start, stop)."""
    starts = np.concatenate(([0], blank + 1))
    stops = np.append(blank, len(ends))
    some = starts < stops
    starts, stops = starts[some], stops[some]
    first_bytes = np.where(starts > 0, ends[starts - 1] + 1, 0)
    return zip(starts.tolist(), stops.tolist(), first_bytes.tolist(), ends[stops - 1].tolist(), strict=True)


def _paragraph(pieces: list[bytes], path: str, line: int, on_fault: OnFault) -> Iterator[Record]:
    content = pieces[0] if len(pieces) == 1 else b"\n".join(pieces)
    if b"\r" in content:
        content = content.replace(b"\r\n", b"\n").removesuffix(b"\r")
    text, fault = decode(content, path, line)
    if fault is not None:
        on_fault(fault, line)
    else:
        yield Record({"text": text}, f"{path}:{line}", line, len(text), True)


def _file(blocks: Iterable[bytes], path: str, limit_bytes: int, on_fault: OnFault) -> Iterator[Record]:
    pieces: list[bytes] = []
    size = 0
    for block in blocks:
        pieces.append(block)
        size += len(block)
        if size > limit_bytes:
            raise BadDataError(f"{path}:1: more than {limit_bytes} bytes for one document; set `document: line`")
    text, fault = decode(b"".join(pieces).removeprefix(BOM), path, 1)
    if fault is not None:
        on_fault(fault, 1)
    elif text and not text.isspace():
        yield Record({"text": text}, f"{path}:1", 1, len(text), True)
