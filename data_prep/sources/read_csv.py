r"""CSV and TSV. Records end at ``\n`` outside quoted fields; every row has as many fields as there are columns."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.config import SourceConfig
from data_prep.errors import BadDataError
from data_prep.sources.lines import BOM, LINE_LIMIT_BYTES, OnFault, decode, raise_fault, with_whole_mark
from data_prep.sources.records import Record, Span
from data_prep.sources.spans import SPAN_BYTES, spans_between

_NEWLINE, _QUOTE = 10, 34


@dataclass(frozen=True)
class Dialect:
    """The characters that part fields."""

    delimiter: str
    quoting: bool  # a double quote at the start of a field quotes it


def dialect_of(name: str, config: SourceConfig) -> Dialect:
    """The characters that part the fields of a csv or tsv file."""
    return Dialect(config.delimiter or ("," if name == "csv" else "\t"), config.quoting)


def other_delimiter(row: Sequence[str], dialect: Dialect) -> str:
    """Advice for a row that is a single field although another usual delimiter stands in it; else nothing."""
    if len(row) != 1:
        return ""
    counts = {mark: row[0].count(mark) for mark in ";|\t," if mark != dialect.delimiter}
    mark = max(counts, key=lambda one: counts[one])
    return f"; it looks like `delimiter: {json.dumps(mark)}`" if counts[mark] else ""


class _Quotes:
    """Where a scan stands between two blocks: inside a quoted field or not."""

    def __init__(self, delimiter: str):
        self.before_field = (ord(delimiter), _NEWLINE)
        self.at_start = True
        self.inside = False
        self.previous = _NEWLINE  # the byte before the block
        self.just_closed = False  # and whether it is a quote that ended a field, or is half of a doubled one

    def newlines_outside(self, block: bytes) -> npt.NDArray[np.int64]:
        """Positions of newlines that end a record."""
        values = np.frombuffer(block, np.uint8)
        newlines: npt.NDArray[np.int64] = np.flatnonzero(values == _NEWLINE)
        quotes = np.flatnonzero(values == _QUOTE)
        began_inside = self.inside
        if len(quotes):
            before = values[quotes - 1]
            if quotes[0] == 0:
                before[0] = self.previous
            elif self.at_start and block[: quotes[0]] == BOM:
                before[0] = _NEWLINE
            if not self._all_count(quotes, before):
                quotes = self._counting(quotes, before)
        newlines = newlines[(np.searchsorted(quotes, newlines) + began_inside) % 2 == 0]
        self.inside = (len(quotes) + began_inside) % 2 == 1
        self.just_closed = not self.inside and len(quotes) > 0 and int(quotes[-1]) == len(block) - 1
        self.previous = _NEWLINE if self.at_start and block == BOM else block[-1]
        self.at_start = False
        return newlines

    def _all_count(self, quotes: npt.NDArray[np.int64], before: npt.NDArray[np.uint8]) -> bool:
        """True if every quote opens or closes a field or is half of a doubled one, so that counting them is enough."""
        opening = slice(int(self.inside), None, 2)
        doubled = np.diff(quotes, prepend=-1 if self.just_closed else -2)[opening] == 1
        return bool((doubled | np.isin(before[opening], self.before_field)).all())

    def _counting(self, quotes: npt.NDArray[np.int64], before: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """The quotes that open or close: one in the middle of an unquoted field is an ordinary character."""
        inside = self.inside
        closed_at = -1 if self.just_closed else -2
        kept = []
        for position, previous in zip(quotes.tolist(), before.tolist(), strict=True):
            if inside or previous in self.before_field or closed_at == position - 1:
                inside = not inside
                closed_at = -2 if inside else position
                kept.append(position)
        return np.array(kept, np.int64)


def cut_csv(
    blocks: Iterable[bytes],
    path: str,
    dialect: Dialect,
    span_bytes: int = SPAN_BYTES,
    limit_bytes: int = LINE_LIMIT_BYTES,
) -> list[Span]:
    """Spans of whole records, in bytes; the first begins with the header if there is one. Raises BadDataError."""
    borders = [(0, 1)]
    offset = 0
    for chunk, line in _record_chunks(blocks, path, dialect, 1, limit_bytes):
        offset += len(chunk)
        if offset >= borders[-1][0] + span_bytes:
            borders.append((offset, line + chunk.count(b"\n")))
    return spans_between(borders, offset)


def _record_chunks(
    blocks: Iterable[bytes], path: str, dialect: Dialect, first_line: int, limit_bytes: int
) -> Iterator[tuple[bytes, int]]:
    """Chunks of whole records, about a block each, with the number of their first line."""
    quotes = _Quotes(dialect.delimiter)
    pending: list[bytes] = []
    pending_bytes = 0
    line = first_line
    for block in with_whole_mark(blocks):
        if dialect.quoting:
            newlines = quotes.newlines_outside(block)
            stop = int(newlines[-1]) + 1 if len(newlines) else 0
        else:
            stop = block.rfind(b"\n") + 1
        pending.append(block[:stop] if stop else block)
        pending_bytes += len(pending[-1])
        if pending_bytes > limit_bytes + len(block):
            hint = "; a quote without its end? (`quoting: false` makes quotes ordinary characters)"
            raise BadDataError(
                f"{path}:{line}: a row of more than {limit_bytes} bytes{hint if dialect.quoting else ''}"
            )
        if stop:
            chunk = b"".join(pending)
            yield chunk, line
            line += chunk.count(b"\n")
            pending = [block[stop:]] if stop < len(block) else []
            pending_bytes = len(block) - stop
    if pending:
        yield b"".join(pending), line


def read_rows(
    blocks: Iterable[bytes],
    path: str,
    dialect: Dialect,
    first_line: int = 1,
    limit_bytes: int = LINE_LIMIT_BYTES,
    on_fault: OnFault = raise_fault,
) -> Iterator[tuple[list[str], int]]:
    """The fields of each row that is not an empty line, and its line. `on_fault` gets rows that are not UTF-8.

    Raises BadDataError with file:line.
    """
    csv.field_size_limit(2**31 - 1)  # of the process; the limit here is that of a row
    for chunk, line in _record_chunks(blocks, path, dialect, first_line, limit_bytes):
        content = chunk.removeprefix(BOM) if line == 1 else chunk
        text, fault = decode(content, path, line)
        if fault is not None:
            yield from _damaged_rows(content, path, dialect, line, on_fault)
        else:
            yield from _rows(text, path, dialect, line)


def _rows(text: str, path: str, dialect: Dialect, line: int) -> Iterator[tuple[list[str], int]]:
    return _quoted_rows(text, path, dialect, line) if dialect.quoting else _plain_rows(text, dialect, line)


def _damaged_rows(
    content: bytes, path: str, dialect: Dialect, line: int, on_fault: OnFault
) -> Iterator[tuple[list[str], int]]:
    """The rows of a chunk that is not all UTF-8, those that are. Bytes of no character split no row."""
    lines = content.split(b"\n")
    for row, first in _rows(content.decode("utf-8", "surrogateescape"), path, dialect, line):
        if "".join(row).isascii() or not any(map(_is_escaped, row)):
            yield row, first
        else:
            _, fault = decode(b"\n".join(lines[first - line :]), path, first)  # its first one stands in this row
            assert fault is not None
            on_fault(fault, first)


def _is_escaped(cell: str) -> bool:
    """True if a cell holds bytes that are no UTF-8, as `surrogateescape` writes them."""
    return any("\udc80" <= character <= "\udcff" for character in cell)


def _quoted_rows(text: str, path: str, dialect: Dialect, line: int) -> Iterator[tuple[list[str], int]]:
    rows = csv.reader(io.StringIO(text, newline="\n"), delimiter=dialect.delimiter, strict=True)
    begin = 0
    try:
        for row in rows:
            if row:
                yield row, line + begin
            begin = rows.line_num
    except csv.Error as error:
        of_quotes = '"' in str(error) or "unexpected end" in str(error)
        hint = "; where quotes are ordinary characters, set `quoting: false`" if of_quotes else ""
        behind = "; no row behind it can be found, so it cannot be left out"
        raise BadDataError(f"{path}:{line + begin}: not a valid row: {error}{hint}{behind}", "not_csv") from error


def _plain_rows(text: str, dialect: Dialect, line: int) -> Iterator[tuple[list[str], int]]:
    for number, row in enumerate(text.split("\n"), line):
        row = row.removesuffix("\r")
        if row:
            yield row.split(dialect.delimiter), number


def read_header(blocks: Iterable[bytes], path: str, dialect: Dialect) -> tuple[str, ...]:
    """The names in the first row. Raises BadDataError for an empty or repeated name, or if there is no row."""
    for names, line in read_rows(blocks, path, dialect):
        if not all(names) or len(set(names)) != len(names):
            raise BadDataError(
                f"{path}:{line}: a header of different names, please, not {names}; without one, set `columns`"
            )
        return tuple(names)
    raise BadDataError(f"{path}:1: no header; without one, set `columns`")


def read_csv(
    blocks: Iterable[bytes],
    path: str,
    dialect: Dialect,
    columns: Sequence[str],
    skip_header: bool,
    first_line: int = 1,
    limit_bytes: int = LINE_LIMIT_BYTES,
    on_fault: OnFault = raise_fault,
) -> Iterator[Record]:
    """A record of texts for each row. `line` is where the row begins.

    `on_fault` gets rows with too few or too many fields, or that are not UTF-8. Raises BadDataError with file:line.
    """
    rows = read_rows(blocks, path, dialect, first_line, limit_bytes, on_fault)
    if skip_header:
        next(rows, None)
    count = len(columns)
    for row, line in rows:
        where = f"{path}:{line}"
        if len(row) != count:
            hint = other_delimiter(row if len(row) < count else columns, dialect)
            wanted = f"{_counted(count)} in the header or `columns`{hint}"
            on_fault(BadDataError(f"{where}: {_counted(len(row))}, but {wanted}", "wrong_columns"), line)
            continue
        yield Record(dict(zip(columns, row, strict=True)), where, line)


def _counted(number: int) -> str:
    return "1 field" if number == 1 else f"{number} fields"
