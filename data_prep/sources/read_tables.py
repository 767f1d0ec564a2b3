"""Parquet by row groups, and Arrow IPC (file and stream) by record batches, a few rows as Python values at a time."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, time
from math import isfinite
from typing import IO, Any

from data_prep.errors import BadDataError, StorageError
from data_prep.sources.archives import split_member
from data_prep.sources.decompress import Compression, all_blocks, open_binary, stat_file
from data_prep.sources.filled_nulls import has_filled_nulls, without_nulls
from data_prep.sources.inflate import RATIO_FREE_BYTES, RATIO_LIMIT
from data_prep.sources.lines import LINE_LIMIT_BYTES, OnFault, raise_fault
from data_prep.sources.records import WHOLE_FILE, Record, Span

#: Row groups and batches are joined to spans of at least this many uncompressed bytes.
SPAN_BYTES = 16 << 20
_ROWS = 256
_ARROW_FILE_MAGIC = b"ARROW1"


@contextmanager
def _opened(path: str, compression: Compression) -> Iterator[IO[bytes]]:
    """A file that can be sought in: of a compressed one, or of a member of an archive, the content in a temporary file.

    Arrow's errors are ours.
    """
    import pyarrow

    try:
        if compression == "none" and split_member(path) is None:
            with open_binary(path) as file:
                yield file
        else:
            with tempfile.TemporaryFile() as file:
                for block in all_blocks(path, compression):
                    file.write(block)
                file.seek(0)
                yield file
    except OSError as error:
        if error.errno is not None:
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
        raise _broken(path, error) from error
    except (pyarrow.ArrowException, EOFError, MemoryError, OverflowError, UnicodeDecodeError) as error:
        raise _broken(path, error) from error


def _broken(path: str, error: BaseException) -> BadDataError:
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return BadDataError(f"{path}: broken, cut off, or not what its format says: {reason}")


def cut_parquet(path: str) -> list[Span]:
    """Spans of row groups. Raises BadDataError."""
    from pyarrow.parquet import ParquetFile

    with _opened(path, "none") as file:
        metadata = ParquetFile(file).metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        return _spans([(group.num_rows, group.total_byte_size) for group in groups])


def read_parquet(
    path: str,
    compression: Compression,
    span: Span,
    columns: Sequence[str] | None,
    on_fault: OnFault = raise_fault,
) -> Iterator[Record]:
    """A record for each row of the row groups of `span`; `columns` are those to read, None for all.

    `line` is the number of the row from 1. `on_fault` gets rows with bytes that are not text. Raises BadDataError.
    """
    from pyarrow.parquet import ParquetFile

    with _opened(path, compression) as file:
        table = ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        names = _names(table.schema_arrow, columns, path)
        stop = table.metadata.num_row_groups if span == WHOLE_FILE else span.stop
        groups = list(range(span.start, stop))
        batches = table.iter_batches(_ROWS, row_groups=groups, columns=names, use_threads=False)
        yield from _records(batches, names, path, span.first_line, on_fault)


def cut_arrow(path: str) -> list[Span]:
    """Spans of record batches: of the file format by number, of the stream format by bytes. Raises BadDataError."""
    from pyarrow import PythonFile, ipc

    with _opened(path, "none") as file:
        if _is_file_format(file):
            reader = ipc.open_file(file)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            return _spans([(batch.num_rows, batch.nbytes) for batch in batches])
        stream = PythonFile(file, mode="r")
        schema = ipc.read_schema(ipc.read_message(stream))
        sizes: list[tuple[int, int]] = []
        offsets = [file.tell()]
        for message in _messages(stream, file):
            if message.type != "record batch":  # dictionaries: a batch cannot be read without what came before
                return [WHOLE_FILE]
            sizes.append((ipc.read_record_batch(message, schema).num_rows, file.tell() - offsets[-1]))
            offsets.append(file.tell())
        return [Span(offsets[span.start], offsets[span.stop], span.first_line) for span in _spans(sizes)]


def read_arrow(
    path: str,
    compression: Compression,
    span: Span,
    columns: Sequence[str] | None,
    on_fault: OnFault = raise_fault,
) -> Iterator[Record]:
    """As `read_parquet`, of record batches."""
    from pyarrow import PythonFile, ipc

    with _opened(path, compression) as file:
        batches: Iterator[Any]
        if _is_file_format(file):
            reader = ipc.open_file(file)
            stop = reader.num_record_batches if span == WHOLE_FILE else span.stop
            schema, batches = reader.schema, (reader.get_batch(index) for index in range(span.start, stop))
        elif span == WHOLE_FILE:
            reader = ipc.open_stream(file)
            schema, batches = reader.schema, iter(reader)
        else:
            stream = PythonFile(file, mode="r")
            schema = ipc.read_schema(ipc.read_message(stream))
            file.seek(span.start)
            batches = (ipc.read_record_batch(message, schema) for message in _messages(stream, file, span.stop))
        names = _names(schema, columns, path)
        pieces = (batch.slice(at, _ROWS) for batch in batches for at in range(0, batch.num_rows, _ROWS))
        yield from _records((piece.select(names) for piece in pieces), names, path, span.first_line, on_fault)


def schema_metadata(path: str, compression: Compression) -> str:
    """The JSON that `datasets` wrote into the schema of a table about its columns; empty where it wrote nothing."""
    from pyarrow import ipc
    from pyarrow.parquet import read_schema

    with _opened(path, compression) as file:
        if file.read(4) == b"PAR1":
            schema = read_schema(file)
        else:
            file.seek(0)
            schema = ipc.open_file(file).schema if _is_file_format(file) else ipc.open_stream(file).schema
    return bytes((schema.metadata or {}).get(b"huggingface", b"")).decode("utf-8", errors="replace")


def _is_file_format(file: IO[bytes]) -> bool:
    magic = file.read(len(_ARROW_FILE_MAGIC))
    file.seek(0)
    return magic == _ARROW_FILE_MAGIC


def _messages(stream: Any, file: IO[bytes], stop: int | None = None) -> Iterator[Any]:
    """The messages of an IPC stream up to byte `stop`; None: up to its end, whether or not that is marked."""
    from pyarrow import ipc

    while stop is None or file.tell() < stop:
        try:
            message = ipc.read_message(stream)
        except EOFError:
            if stop is not None:
                raise
            return
        yield message


def _spans(sizes: list[tuple[int, int]]) -> list[Span]:
    """Joins neighbours, given as (rows, bytes), to spans of [first, last + 1) and the row they begin with."""
    spans: list[Span] = []
    begin = 0
    row = first_row = 1
    size = 0
    for index, (num_rows, num_bytes) in enumerate(sizes, 1):
        row, size = row + num_rows, size + num_bytes
        if size >= SPAN_BYTES or index == len(sizes):
            spans.append(Span(begin, index, first_row))
            begin, first_row, size = index, row, 0
    return spans


def _names(schema: Any, columns: Sequence[str] | None, path: str) -> list[str]:
    """The columns to read, checked."""
    names = list(schema.names)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise BadDataError(f"{path}: two columns are named {twice[0]!r}")
    missing = [name for name in columns or () if name not in names]
    if missing:
        raise BadDataError(f"{path}: no column {missing[0]!r} (columns: {', '.join(map(repr, names[:8]))})")
    return list(columns or names)


def _records(batches: Iterator[Any], names: list[str], path: str, row: int, on_fault: OnFault) -> Iterator[Record]:
    for batch in _bounded(batches, path, row):
        plain = all(_is_plain(field.type) for field in batch.schema)
        filled = [name for name, column in zip(names, batch.columns, strict=True) if has_filled_nulls(column)]
        for values in _rows(batch):
            where = f"{path}: row {row}"
            num_nulls = 0
            try:
                if isinstance(values, UnicodeDecodeError):
                    raise BadDataError(f"{where}: not UTF-8: {values.reason}", "not_utf8")
                value = dict(zip(names, values, strict=True))
                value = value if plain else {name: json_value(value[name], name, where) for name in names}
                for name in filled:
                    value[name], num_left_out = without_nulls(value[name])
                    num_nulls += num_left_out
            except BadDataError as fault:
                on_fault(fault, row)
            else:
                yield Record(value, where, row, num_nulls=num_nulls)
            row += 1


def _rows(batch: Any) -> Iterator[tuple[Any, ...] | UnicodeDecodeError]:
    """The Python values of each row, or the fault of a row with a text that is not UTF-8."""
    try:
        columns = [column.to_pylist(maps_as_pydicts="strict") for column in batch.columns]
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield error
        else:
            for index in range(batch.num_rows):
                yield from _rows(batch.slice(index, 1))
        return
    yield from zip(*columns, strict=True)


def _bounded(batches: Iterator[Any], path: str, row: int) -> Iterator[Any]:
    """The same rows, of which no more come together than what one record may hold.

    BadDataError for a larger one, and for a file that grows as only bombs do: a text may be stored once for many rows.
    """
    size = total = 0
    for batch in batches:
        num_bytes = _num_bytes(batch)
        total += num_bytes
        if total > RATIO_FREE_BYTES and total > RATIO_LIMIT * (size := size or stat_file(path).size_bytes):
            raise BadDataError(
                f"{path}: its rows grow to more than {RATIO_LIMIT} times the file; if that is meant, write"
                " them as JSON lines"
            )
        if num_bytes <= LINE_LIMIT_BYTES:
            yield batch
        else:
            for index in range(batch.num_rows):
                one = batch.slice(index, 1)
                if _num_bytes(one) > LINE_LIMIT_BYTES:
                    limit = LINE_LIMIT_BYTES >> 20
                    raise BadDataError(f"{path}: row {row + index}: more than {limit} MiB is not one record")
                yield one
        row += batch.num_rows


def _num_bytes(batch: Any) -> int:
    """The memory of a batch, texts of dictionaries counted in every row that refers to them."""
    from pyarrow import compute, types

    total = int(batch.nbytes)
    for column in batch.columns:
        if types.is_dictionary(column.type) and types.is_string(column.type.value_type):
            lengths = compute.take(compute.binary_length(column.dictionary), column.indices)
            total += compute.sum(lengths).as_py() or 0
    return total


def _is_plain(kind: Any) -> bool:
    """True if Python values of an Arrow type are always JSON values; a float may be NaN."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(_is_plain(kind.field(index).type) for index in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_integer(kind)
        or types.is_boolean(kind)
        or types.is_null(kind)
    )


def json_value(value: Any, name: str, where: str) -> Any:
    """The nearest JSON value: NaN and infinity as null, times and decimals as text, bytes as the UTF-8 they must hold.

    Raises BadDataError beginning with `where` for other bytes.
    """
    match value:
        case float() if not isfinite(value):
            return None
        case None | str() | int() | float():
            return value
        case dict():
            return {key: json_value(item, name, where) for key, item in value.items()}
        case list() | tuple():
            return [json_value(item, name, where) for item in value]
        case bytes():
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError as error:
                hint = "leave it out by naming the others in `columns`"
                fault = f"{where}: column {name!r} holds bytes that are not text; {hint}"
                raise BadDataError(fault, "not_utf8") from error
        case date() | time():
            return value.isoformat()
    return str(value)
