"""Cuts a stream of bytes into spans at borders of lines or of blank lines, in one pass with constant memory."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from data_prep.lines import LINE_LIMIT_BYTES, count_newlines, whole_lines
from data_prep.records import Span

SPAN_BYTES = 4 << 20

_BLANK_LINES = re.compile(rb"^(?:[ \t\r]*\n)+", re.MULTILINE)


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


def cut_at_blank_lines(
    blocks: Iterable[bytes], path: str, span_bytes: int = SPAN_BYTES, limit_bytes: int = LINE_LIMIT_BYTES
) -> list[Span]:
    """Spans that begin behind a blank line. Raises BadDataError for a line of more than `limit_bytes`."""
    offset, cut = 0, span_bytes
    borders = [(0, 1)]
    for chunk, line in whole_lines(blocks, path, 1, limit_bytes):
        seen, number = 0, line
        while cut < offset + len(chunk):
            # A chunk begins at a line, and so does what MULTILINE's ^ finds.
            found = _BLANK_LINES.search(chunk, _line_start(chunk, max(0, cut - offset)))
            if found is None:
                break
            number += count_newlines(chunk, seen, found.end())
            seen = found.end()
            borders.append((offset + seen, number))
            cut = offset + seen + span_bytes
        offset += len(chunk)
    return spans_between(borders, offset)


def _line_start(chunk: bytes, position: int) -> int:
    return chunk.rfind(b"\n", 0, position) + 1


def spans_between(borders: list[tuple[int, int]], stop: int) -> list[Span]:
    """Spans from borders (offset, number of the first line or item), the last of them ending at `stop`."""
    stops = [offset for offset, _ in borders[1:]] + [stop]
    return [Span(begin, end, number) for (begin, number), end in zip(borders, stops, strict=True) if begin < end]
