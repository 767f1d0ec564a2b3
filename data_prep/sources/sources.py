"""From the sources of a run file to hashed files cut into spans, and from a span to its records."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Lock

from data_prep.config import SourceConfig
from data_prep.errors import BadDataError
from data_prep.progress import Progress
from data_prep.sources.decompress import all_blocks, file_blocks, stat_file
from data_prep.sources.read_aligned import read_aligned
from data_prep.sources.read_conll import read_conll, read_conllu
from data_prep.sources.read_csv import read_csv, read_header
from data_prep.sources.read_hub import spool_hub
from data_prep.sources.read_json import read_json, stream_json
from data_prep.sources.read_jsonl import read_jsonl
from data_prep.sources.read_squad import questions
from data_prep.sources.read_tables import read_arrow, read_parquet
from data_prep.sources.read_text import read_text
from data_prep.sources.records import WHOLE_FILE, Record, SourceFile, Span
from data_prep.sources.scan import aligned_paths, dialect_of, scan_aligned, scan_file
from data_prep.sources.source_files import check_keys, find_files, find_formats
from data_prep.sources.spans import SPAN_BYTES

_HEADER_BLOCK_BYTES = 64 << 10

_Scan = Callable[[Callable[[int], None]], SourceFile]


def find_sources(
    configs: tuple[SourceConfig, ...], dotted_key: str, cache_dir: Path, progress: bool = False
) -> list[list[SourceFile]]:
    """The files of each source in a fixed order, hashed and cut into spans; the same for any number of workers.

    A data set from the Hub is spooled into `cache_dir` first. `dotted_key` (data.train) is for errors:
    MissingInputError, BadDataError, DataConfigError, StorageError, CannotWriteError.
    """
    keys = [f"{dotted_key}[{index}]" if len(configs) > 1 else dotted_key for index in range(len(configs))]
    scans = [_scans(config, key, cache_dir, progress) for config, key in zip(configs, keys, strict=True)]
    total = sum(size for some in scans for _, size in some)
    lock, failed = Lock(), Event()
    with Progress("hashing", total, progress) as bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:

        def advance(num_bytes: int) -> None:
            if failed.is_set():
                raise CancelledError
            with lock:
                bar.advance(num_bytes)

        def scan_all(some: list[_Scan]) -> list[SourceFile]:
            return [scan(advance) for scan in some]

        started = [[threads.submit(scan_all, few) for few in _shared_out(some)] for some in scans]
        try:
            return [[file for future in some for file in future.result()] for some in started]
        except BaseException:  # an interrupt too: nobody waits for the rest of large files
            failed.set()
            raise


def _scans(config: SourceConfig, key: str, cache_dir: Path, progress: bool) -> list[tuple[_Scan, int]]:
    """What is left to do for each file of a source, and its bytes."""
    if config.aligned is not None:
        check_keys(config, "aligned", key)
        paths = aligned_paths(config.aligned, key)
        sizes = [stat_file(path).st_size for path in paths.values()]
        return [(partial(scan_aligned, config, paths), sum(sizes))]
    if config.hub is not None:
        check_keys(config, "hub", key)
        path = str(spool_hub(config, key, cache_dir, progress))
        label = f"{config.hub}[{config.split or 'train'}]"
        return [(partial(scan_file, path, label, "jsonl", "none", config), stat_file(path).st_size)]
    files = find_formats(find_files(config, key), config, key)
    return [(partial(scan_file, path, path, name, how, config), stat_file(path).st_size) for path, name, how in files]


def _shared_out(scans: list[tuple[_Scan, int]]) -> Iterator[list[_Scan]]:
    """The scans in portions that are worth a thread: hashing frees Python's lock, small files do little else."""
    portion: list[_Scan] = []
    total = 0
    for number, (scan, size) in enumerate(scans, 1):
        portion.append(scan)
        total += size
        if total >= SPAN_BYTES or number == len(scans):
            yield portion
            portion, total = [], 0


def read_records(source: SourceFile, span: Span | None = None) -> Iterator[Record]:
    """The records of a file, or of one of its spans, in order. Raises BadDataError naming the place."""
    for piece in source.spans if span is None else (span,):
        yield from _read(source, piece)


def check_unchanged(source: SourceFile) -> None:
    """Raise BadDataError if a file of `source` is not what was hashed, by its size and time of change."""
    parts = source.aligned or (source,)
    for part in parts:
        status = stat_file(part.path)
        if (status.st_size, status.st_mtime_ns) != (part.size_bytes, part.modified_ns):
            raise BadDataError(f"{part.path}: changed while it was being read; prepare again when it is at rest")


def _read(source: SourceFile, span: Span) -> Iterator[Record]:
    path, label, config = source.path, source.label, source.config
    match source.format:
        case "jsonl":
            return read_jsonl(_blocks(source, span), label, span.first_line)
        case "csv" | "tsv":
            return _read_csv(source, span)
        case "json":
            return _read_items(source, span, config.split)
        case "squad":
            return _read_squad(source, span)
        case "parquet":
            return read_parquet(path, source.compression, span, config.columns)
        case "arrow":
            return read_arrow(path, source.compression, span, config.columns)
        case "text":
            return read_text(_blocks(source, span), label, config.document or "line", span.first_line)
        case "conll":
            return read_conll(_blocks(source, span), label, config.columns, span.first_line)
        case "conllu":
            return read_conllu(_blocks(source, span), label, span.first_line)
        case "aligned":
            return read_aligned(source.aligned, span, label, config.encoding)


def _blocks(source: SourceFile, span: Span) -> Iterator[bytes]:
    if span == WHOLE_FILE:
        return all_blocks(source.path, source.compression, source.config.encoding)
    return file_blocks(source.path, span.start, span.stop)


def _read_squad(source: SourceFile, span: Span) -> Iterator[Record]:
    for article in _read_items(source, span, "data"):
        yield from questions(article)


def _read_csv(source: SourceFile, span: Span) -> Iterator[Record]:
    config = source.config
    dialect = dialect_of(source.format, config.quoting)
    has_header = config.header if config.header is not None else config.columns is None
    if config.columns is not None:
        columns = config.columns
    else:
        whole = span == WHOLE_FILE
        head = _blocks(source, span) if whole else file_blocks(source.path, 0, source.size_bytes, _HEADER_BLOCK_BYTES)
        columns = read_header(head, source.label, dialect)
    skip_header = has_header and span.first_line == 1
    return read_csv(_blocks(source, span), source.label, dialect, columns, skip_header, span.first_line)


def _read_items(source: SourceFile, span: Span, key: str | None) -> Iterator[Record]:
    columns = source.config.columns
    if span == WHOLE_FILE:
        return stream_json(_blocks(source, span), source.label, key, columns)
    before = b"".join(file_blocks(source.path, span.start - 1, span.start))
    blocks = file_blocks(source.path, span.start, span.stop)
    return read_json(blocks, source.label, span.first_line, columns, begins_array=before == b"[")
