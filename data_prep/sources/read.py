"""From a file, or a span of it, to its records, whatever the format."""

from collections.abc import Iterator

from data_prep.errors import BadDataError
from data_prep.sources.decompress import all_blocks, file_blocks, stat_file
from data_prep.sources.filled_nulls import without_filled_nulls
from data_prep.sources.lines import OnFault, raise_fault
from data_prep.sources.read_aligned import read_aligned
from data_prep.sources.read_conll import read_conll, read_conllu, read_conllup
from data_prep.sources.read_csv import dialect_of, read_csv, read_header
from data_prep.sources.read_json import questions, read_json, read_jsonl, stream_json
from data_prep.sources.read_tables import read_arrow, read_parquet
from data_prep.sources.read_text import read_text
from data_prep.sources.records import LABEL_FIELD, WHOLE_FILE, Record, SourceFile, Span

_HEADER_BLOCK_BYTES = 64 << 10


def read_records(source: SourceFile, span: Span | None = None, on_fault: OnFault = raise_fault) -> Iterator[Record]:
    """The records of a file, or of one of its spans, in order.

    `on_fault` gets each record that cannot be read and behind which reading can go on. Raises BadDataError, naming
    the place, where it cannot.
    """
    for piece in source.spans if span is None else (span,):
        records = _read(source, piece, on_fault)
        yield from records if source.folder_label is None else _labelled(records, source.folder_label, on_fault)


def _labelled(records: Iterator[Record], label: str, on_fault: OnFault) -> Iterator[Record]:
    """The same records with the label that their file's place gives them."""
    for record in records:
        if LABEL_FIELD in record.value:
            fault = f"{record.where}: the record has a field {LABEL_FIELD!r} already; leave `label_from` out"
            on_fault(BadDataError(fault, "wrong_columns"), record.line)
            continue
        yield record._replace(value={**record.value, LABEL_FIELD: label})


def check_unchanged(source: SourceFile) -> None:
    """Raise BadDataError if a file of `source` is not what was hashed, by its size and time of change."""
    parts = source.aligned or (source,)
    for part in parts:
        status = stat_file(part.path)
        if (status.size_bytes, status.modified_ns) != (part.size_bytes, part.modified_ns):
            raise BadDataError(f"{part.path}: changed while it was being read; prepare again when it is at rest")


def _read(source: SourceFile, span: Span, on_fault: OnFault) -> Iterator[Record]:
    path, label, config = source.path, source.label, source.config
    match source.format:
        case "jsonl":
            records = read_jsonl(_blocks(source, span), label, span.first_line, on_fault=on_fault)
            return records if config.hub is None else map(without_filled_nulls, records)
        case "csv" | "tsv":
            return _read_csv(source, span, on_fault)
        case "json":
            return _read_items(source, span, config.split, on_fault)
        case "squad":
            return _read_squad(source, span, on_fault)
        case "parquet":
            return read_parquet(path, source.compression, span, config.columns, on_fault)
        case "arrow":
            return read_arrow(path, source.compression, span, config.columns, on_fault)
        case "text":
            document = config.document or "line"
            return read_text(_blocks(source, span), label, document, span.first_line, on_fault=on_fault)
        case "conll":
            return read_conll(_blocks(source, span), label, config.columns, span.first_line, on_fault=on_fault)
        case "conllu":
            return read_conllu(_blocks(source, span), label, span.first_line, on_fault=on_fault)
        case "conllup":
            return read_conllup(_blocks(source, span), label, span.first_line, on_fault=on_fault)
        case "aligned":
            return read_aligned(source.aligned, span, label, config.encoding, on_fault=on_fault)


def _blocks(source: SourceFile, span: Span) -> Iterator[bytes]:
    if span == WHOLE_FILE:
        return all_blocks(source.path, source.compression, source.config.encoding)
    return file_blocks(source.path, span.start, span.stop)


def _read_squad(source: SourceFile, span: Span, on_fault: OnFault) -> Iterator[Record]:
    for article in _read_items(source, span, "data", on_fault):
        yield from questions(article, on_fault)


def _read_csv(source: SourceFile, span: Span, on_fault: OnFault) -> Iterator[Record]:
    config = source.config
    dialect = dialect_of(source.format, config)
    has_header = config.header if config.header is not None else config.columns is None
    if config.columns is not None:
        columns = config.columns
    else:
        whole = span == WHOLE_FILE
        head = _blocks(source, span) if whole else file_blocks(source.path, 0, source.size_bytes, _HEADER_BLOCK_BYTES)
        columns = read_header(head, source.label, dialect)
    skip_header = has_header and span.first_line == 1
    blocks = _blocks(source, span)
    return read_csv(blocks, source.label, dialect, columns, skip_header, span.first_line, on_fault=on_fault)


def _read_items(source: SourceFile, span: Span, key: str | None, on_fault: OnFault) -> Iterator[Record]:
    columns = source.config.columns
    if span == WHOLE_FILE:
        return stream_json(_blocks(source, span), source.label, key, columns, on_fault=on_fault)
    before = b"".join(file_blocks(source.path, span.start - 1, span.start))
    blocks = file_blocks(source.path, span.start, span.stop)
    begins = before == b"["
    return read_json(blocks, source.label, span.first_line, columns, begins_array=begins, on_fault=on_fault)
