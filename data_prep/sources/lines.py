r"""Whole lines out of blocks of bytes. Only ``\n`` ends a line; memory is bounded by the longest line."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from data_prep.errors import BadDataError

#: Takes the fault of one record and its line, row or element. If it returns, reading goes on behind the record.
OnFault = Callable[[BadDataError, int], None]

LINE_LIMIT_BYTES = 64 << 20
BOM = b"\xef\xbb\xbf"
_NEWLINE = ord("\n")
_SEARCH_BYTES = 1 << 18  # what is compared at once stays in the cache


def raise_fault(fault: BadDataError, _line: int) -> None:
    """The `OnFault` that ends the reading."""
    raise fault


def count_newlines(data: bytes, start: int = 0, stop: int | None = None) -> int:
    """The newlines in ``data[start:stop]``; several times as fast as `bytes.count` where lines are short."""
    return int(np.count_nonzero(np.frombuffer(data, dtype=np.uint8)[start:stop] == _NEWLINE))


def find_newlines(data: bytes) -> np.ndarray:
    """int64: the places of all newlines."""
    values = np.frombuffer(data, dtype=np.uint8)
    pieces = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(values), _SEARCH_BYTES):
        places = np.flatnonzero(values[start : start + _SEARCH_BYTES] == _NEWLINE)
        places += start
        pieces.append(places)
    return np.concatenate(pieces)


def whole_lines(
    blocks: Iterable[bytes], path: str, first_line: int = 1, limit_bytes: int = LINE_LIMIT_BYTES
) -> Iterator[tuple[bytes, np.ndarray, int]]:
    """Chunks of whole lines, each with the places of its newlines and the number of its first line.

    Only the last may lack its final newline.

    Raises BadDataError for a line of more than `limit_bytes`.
    """
    pending: list[bytes] = []
    pending_bytes = 0
    line = first_line
    for block in blocks:
        stop = block.rfind(b"\n") + 1
        if pending_bytes + (block.find(b"\n") if stop else len(block)) > limit_bytes:
            raise _too_long(path, line, limit_bytes)
        if not stop:
            pending.append(block)
            pending_bytes += len(block)
            continue
        whole = block if stop == len(block) else memoryview(block)[:stop]
        chunk = b"".join((*pending, whole)) if pending or whole is not block else block
        pending = [block[stop:]] if stop < len(block) else []
        pending_bytes = len(block) - stop
        newlines = find_newlines(chunk)
        yield chunk, newlines, line
        line += len(newlines)
    if pending:
        yield b"".join(pending), np.zeros(0, dtype=np.int64), line


def with_whole_mark(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks of which the first is long enough to hold a byte-order mark."""
    head = b""
    stream = iter(blocks)
    for block in stream:
        head += block
        if len(head) >= len(BOM):
            break
    if head:
        yield head
    yield from stream


def text_lines(
    blocks: Iterable[bytes],
    path: str,
    first_line: int = 1,
    limit_bytes: int = LINE_LIMIT_BYTES,
    on_fault: OnFault = raise_fault,
) -> Iterator[tuple[list[str], int]]:
    r"""Lists of lines without their ``\n``, each with the number of its first line.

    A byte-order mark before line 1 is left out. `on_fault` gets each line that is not UTF-8, after all lines before
    it; no list holds it. Raises BadDataError for a line of more than `limit_bytes`.
    """
    pending: list[bytes] = []  # the beginning of a line
    pending_bytes = 0
    line = first_line
    for block in blocks:
        lines = block.split(b"\n")
        pending.append(lines[0])
        pending_bytes += len(lines[0])
        if pending_bytes > limit_bytes:
            raise _too_long(path, line, limit_bytes)
        if len(lines) > 1:
            lines[0] = b"".join(pending)
            pending = [lines.pop()]
            pending_bytes = len(pending[0])
            yield from _decoded(lines, path, line, on_fault)
            line += len(lines)
    if pending_bytes:
        yield from _decoded([b"".join(pending)], path, line, on_fault)


def _decoded(lines: list[bytes], path: str, first_line: int, on_fault: OnFault) -> Iterator[tuple[list[str], int]]:
    """Line by line: a whole block would be as wide in memory as its widest character, and slower to split."""
    if first_line == 1:
        lines[0] = lines[0].removeprefix(BOM)
    try:
        yield list(map(bytes.decode, lines)), first_line
    except UnicodeDecodeError:
        begin = 0
        for index, content in enumerate(lines):
            _, fault = decode(content, path, first_line + index)
            if fault is not None:
                yield list(map(bytes.decode, lines[begin:index])), first_line + begin
                on_fault(fault, first_line + index)
                begin = index + 1
        yield list(map(bytes.decode, lines[begin:])), first_line + begin


def decode(chunk: bytes, path: str, line: int) -> tuple[str, BadDataError | None]:
    """The text of whole lines; of a chunk that is not UTF-8, the lines before the fault, and the fault."""
    try:
        return chunk.decode("utf-8"), None
    except UnicodeDecodeError as error:
        begin = chunk.rfind(b"\n", 0, error.start) + 1
        number = line + count_newlines(chunk, 0, begin)
        hint = "set `encoding: utf-16`" if chunk[:2] in (b"\xff\xfe", b"\xfe\xff") else "or set `encoding`"
        place = f"byte {error.start - begin + 1} of the line"
        message = f"{path}:{number}: not UTF-8 ({place}: {error.reason}); repair it, {hint}"
        return chunk[:begin].decode("utf-8"), BadDataError(message, "not_utf8")


def _too_long(path: str, line: int, limit_bytes: int) -> BadDataError:
    limit = f"{limit_bytes >> 20} MiB" if limit_bytes >= 1 << 20 else f"{limit_bytes} bytes"
    return BadDataError(f"{path}:{line}: a line of more than {limit} is not one record")
