"""Cuts a stream of bytes into spans at borders of lines or of blank lines, in one pass with constant memory."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from data_prep.sources.lines import count_newlines
from data_prep.sources.records import Span

SPAN_BYTES = 4 << 20

_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
_BLANK_SO_FAR = re.compile(rb"\n[ \t\r]*\Z")
_TAIL_BYTES = 4096  # a longer line of white space is no border, which changes no record


def cut_at_lines(blocks: Iterable[bytes], span_bytes: int = SPAN_BYTES) -> tuple[list[Span], int]:
    """Spans of whole lines of at least `span_bytes` each (but the last), and the number of lines in all."""
    offset, line, cut = 0, 1, span_bytes
    borders = [(0, 1)]
    last = b"\n"
    for block in blocks:
        seen = 0  # bytes of this block whose newlines are in `line`
        while cut < offset + len(block) and (newline := block.find(b"\n", max(0, cut - offset - 1))) >= 0:
            line += count_newlines(block, seen, newline + 1)
            seen = newline + 1
            borders.append((offset + seen, line))
            cut = offset + seen + span_bytes
        line += count_newlines(block, seen)
        offset += len(block)
        last = block[-1:]
    return spans_between(borders, offset), line - (last == b"\n")


def find_lines(blocks: Iterable[bytes], wanted: Sequence[int]) -> tuple[list[int], int]:
    """The offsets where the lines numbered `wanted` (ascending, from 1) begin, and the number of lines in all.

    A line that is not there is left out.
    """
    offset, line = 0, 1
    found: list[int] = []
    last = b"\n"
    for block in blocks:
        newlines: npt.NDArray[np.int64] | None = None
        before, line = line, line + count_newlines(block)
        while len(found) < len(wanted) and wanted[len(found)] <= line:
            if newlines is None:
                newlines = np.flatnonzero(np.frombuffer(block, np.uint8) == 10)
            index = wanted[len(found)] - before
            found.append(offset + (int(newlines[index - 1]) + 1 if index else 0))
        offset += len(block)
        last = block[-1:]
    return found, line - (last == b"\n")


def cut_at_blank_lines(blocks: Iterable[bytes], span_bytes: int = SPAN_BYTES) -> list[Span]:
    """Spans of at least `span_bytes` each (but the last) that begin behind a blank line."""
    offset, line, cut = 0, 1, span_bytes
    borders = [(0, 1)]
    tail = b""  # the newline before a line that is blank as far as it has come
    for block in blocks:
        data = tail + block if tail else block
        base, seen = offset - len(tail), len(tail)
        while cut < base + len(data) and (found := _BLANK_LINE.search(data, max(0, cut - base - 1))):
            line += count_newlines(data, seen, found.end())
            seen = found.end()
            borders.append((base + seen, line))
            cut = base + seen + span_bytes
        line += count_newlines(data, seen)
        offset += len(block)
        begun = _BLANK_SO_FAR.search(data[-_TAIL_BYTES:])
        tail = begun.group() if begun else b""
    return spans_between(borders, offset)


def spans_between(borders: list[tuple[int, int]], stop: int) -> list[Span]:
    """Spans from borders (offset, number of the first line or item), the last of them ending at `stop`."""
    stops = [offset for offset, _ in borders[1:]] + [stop]
    return [Span(begin, end, number) for (begin, number), end in zip(borders, stops, strict=True) if begin < end]
