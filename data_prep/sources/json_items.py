"""Finds the items of JSON arrays in a stream of bytes without parsing it: a vectorised scan for brackets outside texts.

What lies between two borders found here is parsed by read_json, strictly; this scan only needs to agree with it on
valid JSON, and to see that every bracket is closed.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.errors import BadDataError
from data_prep.sources.lines import BOM, LINE_LIMIT_BYTES, with_whole_mark
from data_prep.sources.strict_json import parse_value

_Offsets = npt.NDArray[np.int64]
_Flags = npt.NDArray[np.bool_]

_QUOTE, _BACKSLASH, _ARRAY = b'"\\['
_BLANKS = b" \t\r\n"
_MARKED = np.zeros(256, np.bool_)
_MARKED[list(b'"\\[]{}')] = True
_OPENING = 2  # the bit that is set in [ and {, but not in ] and }
_KEY = re.compile(rb'("(?:[^"\\]|\\.)*")[ \t\r\n]*:[ \t\r\n]*\[\Z', re.DOTALL)
_KEY_BYTES = 4096


@dataclass(frozen=True)
class Items:
    """What one block says about one array: `key` names it in the outer object (None: the outer value is the array).

    `stops` are the offsets behind items that end in the block, after `num_before` items in earlier ones. `opened` is
    the offset behind the array's [ if that is in the block, `closed` the offset of its ] if that is.
    """

    key: str | None
    num_before: int
    stops: _Offsets
    opened: int | None
    closed: int | None


class _Scan:
    """Where a scan stands between two blocks."""

    def __init__(self) -> None:
        self.in_text = False
        self.escaped = False  # the next byte follows an active backslash
        self.depth = 0

    def brackets(self, block: bytes) -> tuple[_Offsets, _Flags, _Offsets]:
        """Of each bracket outside texts: its position in the block, whether it opens, and the depth behind it."""
        values = np.frombuffer(block, np.uint8)
        positions = np.flatnonzero(_MARKED[values])
        marks = values[positions]
        if self.escaped and len(positions) and positions[0] == 0:
            positions, marks = positions[1:], marks[1:]
        self.escaped = False
        slashes = positions[marks == _BACKSLASH]
        if len(slashes):
            positions, marks = self._without_escaped(slashes, positions, marks, len(block))
        quotes = marks == _QUOTE
        inside = (np.cumsum(quotes) + self.in_text) & 1
        self.in_text = bool(inside[-1]) if len(inside) else self.in_text
        outside = ~(quotes | (inside == 1))
        opens = (marks[outside] & _OPENING) != 0
        depths = self.depth + np.cumsum(np.where(opens, 1, -1))
        self.depth = int(depths[-1]) if len(depths) else self.depth
        return positions[outside], opens, depths

    def _without_escaped(
        self, slashes: _Offsets, positions: _Offsets, marks: npt.NDArray[np.uint8], size: int
    ) -> tuple[_Offsets, npt.NDArray[np.uint8]]:
        """Marks without backslashes and what they escape. In a run of them, every second one is itself escaped."""
        begins = np.ones(len(slashes), np.bool_)
        begins[1:] = np.diff(slashes) != 1
        index = np.arange(len(slashes))
        in_run = index - np.maximum.accumulate(np.where(begins, index, 0))
        escaped = slashes[in_run % 2 == 0] + 1
        self.escaped = bool(len(escaped) and escaped[-1] == size)
        keep = marks != _BACKSLASH
        at = np.searchsorted(positions, escaped)
        marked = at < len(positions)
        at, escaped = at[marked], escaped[marked]
        keep[at[positions[at] == escaped]] = False
        return positions[keep], marks[keep]


def find_items(blocks: Iterable[bytes], path: str, limit_bytes: int = LINE_LIMIT_BYTES) -> Iterator[Items]:
    """The items of a top-level array, or of each array directly inside a top-level object, block by block.

    Raises BadDataError for anything else at the top, for brackets that are not closed, for more text behind the end,
    for an item of more than `limit_bytes`, and, when all items are given, for an outer object that is not strict JSON.
    """
    outer = None  # depth of the brackets around the arrays that hold items: 0, or 1 inside an object
    frame = bytearray()  # the outer value with its arrays left empty
    in_array = False
    num_items = begun = 0  # of the array that is open: finished items, and where the one that may be open began
    key: str | None = None
    for offset, block, positions, opens, depths in _value_blocks(blocks, path):
        if outer is None and len(positions):
            outer = 0 if block[positions[0]] == _ARRAY else 1
        item_depth = (outer or 0) + 1
        borders = [] if outer is None else np.flatnonzero(depths - opens == outer).tolist()
        opened: int | None = None
        begin = taken = 0
        for border in [*borders, len(positions)]:
            in_block = border < len(positions)
            position = int(positions[border]) if in_block else len(block)
            if in_array:
                of_items = (depths[begin:border] == item_depth) & ~opens[begin:border]
                stops = positions[begin:border][of_items] + offset + 1
                _refuse_long(stops, begun, offset + position, limit_bytes, f"{path}: element", num_items)
                yield Items(key, num_items, stops, opened, offset + position if in_block else None)
                num_items += len(stops)
                begun = int(stops[-1]) if len(stops) else begun
                taken = position
            in_array = in_array if not in_block else bool(opens[border]) and block[position] == _ARRAY
            if in_array and in_block:
                frame += block[taken : position + 1]
                key = _last_key(frame, path) if outer else None
                opened = begun = offset + position + 1
                num_items, begin = 0, border + 1
        if not in_array:
            frame += block[taken:]
        if len(frame) > limit_bytes:
            raise BadDataError(f"{path}: more than {limit_bytes} bytes outside the arrays of records")
    parse_value(_decoded(frame.removeprefix(BOM), path), f"{path}: outside the arrays of records")


def _value_blocks(blocks: Iterable[bytes], path: str) -> Iterator[tuple[int, bytes, _Offsets, _Flags, _Offsets]]:
    """Each block with its offset and the brackets in it, up to the end of an array or object that stands alone."""
    scan = _Scan()
    offset = 0
    first = b""  # bracket
    ended = False
    for block in with_whole_mark(blocks):
        if ended:
            _refuse_more(block, path, offset)
            continue
        first = first or block.removeprefix(BOM if not offset else b"").lstrip(_BLANKS)[:1]
        if first not in (b"", b"[", b"{"):
            raise BadDataError(f"{path}: not a JSON array, nor an object that holds arrays")
        positions, opens, depths = scan.brackets(block)
        ends = np.flatnonzero(depths == 0)
        if len(ends):
            ended = True
            end = int(positions[ends[0]]) + 1
            if block[end - 1] != (b"]" if first == b"[" else b"}")[0]:
                raise BadDataError(f"{path}: brackets do not match somewhere before byte {offset + end}")
            _refuse_more(block[end:], path, offset + end)
        yield offset, block, positions, opens, depths
        offset += len(block)
    if not ended:
        what = "cut off inside its outer array or object" if first else "empty, not JSON"
        raise BadDataError(f"{path}: {what} (after {offset} bytes)")


def _refuse_long(stops: _Offsets, begun: int, end: int, limit_bytes: int, what: str, num_before: int) -> None:
    """Items lie between `begun`, their stops, and `end`, where one may still be open."""
    sizes = np.diff(stops, prepend=begun, append=end)
    if (sizes > limit_bytes).any():
        number = num_before + 1 + int(np.argmax(sizes > limit_bytes))
        raise BadDataError(f"{what} {number}: more than {limit_bytes} bytes are not one record")


def _refuse_more(rest: bytes, path: str, offset: int) -> None:
    more = rest.lstrip(_BLANKS)
    if more:
        raise BadDataError(
            f"{path}: more text behind the end of the JSON value (byte {offset + len(rest) - len(more)});"
            " of one object a line: `format: jsonl`"
        )


def _last_key(frame: bytearray, path: str) -> str:
    """The key of the array that opens at the end of `frame`."""
    match = _KEY.search(bytes(frame[-_KEY_BYTES:]))
    if match is None:
        raise BadDataError(f"{path}: not valid JSON: an array in an object without a key before it")
    return str(parse_value(_decoded(match[1], path), path))


def _decoded(content: bytes | bytearray, path: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path}: not UTF-8 outside the arrays of records: {error.reason}") from error
