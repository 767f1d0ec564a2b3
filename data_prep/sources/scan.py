"""From the sources of a run file to hashed files cut into spans, in one pass with constant memory.

Spans depend on the bytes alone.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Lock

import xxhash

from data_prep.config import Format, SourceConfig
from data_prep.errors import DataConfigError, MissingInputError
from data_prep.progress import Progress
from data_prep.sources.archives import split_member
from data_prep.sources.decompress import Compression, file_blocks, find_compression, stat_file
from data_prep.sources.hub import Check, spool_hub
from data_prep.sources.read_aligned import unequal
from data_prep.sources.read_csv import cut_csv, dialect_of
from data_prep.sources.read_json import cut_json
from data_prep.sources.read_tables import cut_arrow, cut_parquet
from data_prep.sources.records import WHOLE_FILE, AlignedFile, SourceFile, Span
from data_prep.sources.source_files import check_keys, find_files, find_formats, label_of
from data_prep.sources.spans import SPAN_BYTES, cut_at_blank_lines, cut_at_lines, find_lines

Advance = Callable[[int], None]
_Scan = Callable[[Advance], SourceFile]


def find_sources(
    configs: tuple[SourceConfig, ...],
    dotted_key: str,
    cache_dir: Path,
    progress: bool = False,
    check: Check | None = None,
) -> list[list[SourceFile]]:
    """The files of each source in a fixed order, hashed and cut into spans; the same for any number of workers.

    A data set from the Hub is spooled into `cache_dir` first, after `check` has seen its first records.
    `dotted_key` (data.train) is for errors: MissingInputError, BadDataError, DataConfigError, StorageError,
    CannotWriteError.
    """
    keys = [f"{dotted_key}[{index}]" if len(configs) > 1 else dotted_key for index in range(len(configs))]
    scans = [_scans(config, key, cache_dir, progress, check) for config, key in zip(configs, keys, strict=True)]
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


def _scans(
    config: SourceConfig, key: str, cache_dir: Path, progress: bool, check: Check | None
) -> list[tuple[_Scan, int]]:
    """The work that is left for each file of a source, and its bytes."""
    if config.aligned is not None:
        check_keys(config, "aligned", key)
        paths = aligned_paths(config.aligned, key)
        sizes = [stat_file(path).size_bytes for path in paths.values()]
        return [(partial(scan_aligned, config, paths), sum(sizes))]
    if config.hub is not None:
        check_keys(config, "hub", key)
        path = str(spool_hub(config, key, cache_dir, progress, check))
        label = f"{config.hub}[{config.split or 'train'}]"
        return [(partial(scan_file, path, label, "jsonl", "none", config), stat_file(path).size_bytes)]
    files = find_formats(find_files(config, key), config, key)
    return [
        (partial(scan_file, path, path, name, how, config), stat_file(path).size_bytes) for path, name, how in files
    ]


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


class HashedBlocks:
    """The blocks of a whole file, hashed and counted as they are taken."""

    def __init__(self, path: str, advance: Advance):
        self.path = path
        self.advance = advance
        self.status = stat_file(path)
        self.digest = xxhash.xxh3_128()

    def __iter__(self) -> Iterator[bytes]:
        for block in file_blocks(self.path, 0, self.status.size_bytes):
            self.digest.update(block)
            self.advance(len(block))
            yield block

    def hash_all(self) -> None:
        """Take all blocks, for nothing but their hash."""
        for _ in self:
            pass


def scan_file(
    path: str, label: str, name: Format, compression: Compression, config: SourceConfig, advance: Advance
) -> SourceFile:
    """Hash a file and cut it, in one pass with constant memory. `advance` gets the number of bytes read."""
    hashed = HashedBlocks(path, advance)
    is_stream = compression != "none" or split_member(path) is not None
    if name in ("parquet", "arrow"):
        hashed.hash_all()
        cut = cut_parquet if name == "parquet" else cut_arrow
        spans = (WHOLE_FILE,) if is_stream else tuple(cut(path))
    elif is_stream or config.encoding is not None:
        hashed.hash_all()
        spans = (WHOLE_FILE,)
    else:
        spans = tuple(_cut(hashed, name, config))
    size, modified = hashed.status.size_bytes, hashed.status.modified_ns
    digest = hashed.digest.hexdigest()
    folder_label = label_of(path, config)
    return SourceFile(path, label, name, compression, config, size, modified, digest, spans, folder_label=folder_label)


def _cut(hashed: HashedBlocks, name: Format, config: SourceConfig) -> list[Span]:
    path, size = hashed.path, hashed.status.size_bytes
    match name:
        case "csv" | "tsv":
            return cut_csv(hashed, path, dialect_of(name, config))
        case "json" | "squad":
            return cut_json(hashed, path, "data" if name == "squad" else config.split)
        case "conll" | "conllu" | "conllup":
            return cut_at_blank_lines(hashed)
        case "text" if config.document == "blank_line":
            return cut_at_blank_lines(hashed)
        case "text" if config.document == "file":
            hashed.hash_all()
            return [Span(0, size, 1)] if size else []
    return cut_at_lines(hashed)[0]


def aligned_paths(paths: dict[str, str], dotted_key: str) -> dict[str, str]:
    """The file of each field. Raises MissingInputError, DataConfigError."""
    if len(paths) < 2:
        raise DataConfigError(f"{dotted_key}.aligned needs at least two files")
    names = {field: str(Path(path).expanduser()) for field, path in paths.items()}
    for path in names.values():
        if split_member(path) is None and not Path(path).is_file():
            raise MissingInputError(f"{path}: no such file ({dotted_key}.aligned)")
    return names


def scan_aligned(config: SourceConfig, names: dict[str, str], advance: Advance) -> SourceFile:
    """Hash aligned files and cut them at the same lines. A compressed file cannot be cut, nor can its companions."""
    compressions = [find_compression(path) for path in names.values()]
    hashes = [HashedBlocks(path, advance) for path in names.values()]
    cut: tuple[Span, ...]
    offsets: list[tuple[int, ...]]
    streams = [split_member(path) is not None for path in names.values()]
    if config.encoding is not None or any(streams) or any(compression != "none" for compression in compressions):
        for hashed in hashes:
            hashed.hash_all()
        cut, offsets = (WHOLE_FILE,), [() for _ in hashes]
    else:
        cut, offsets = _cut_aligned(hashes)
    files = tuple(
        AlignedFile(
            field, hashed.path, compression, hashed.status.size_bytes, hashed.status.modified_ns, digest, starts
        )
        for field, hashed, compression, starts in zip(names, hashes, compressions, offsets, strict=True)
        for digest in [hashed.digest.hexdigest()]
    )
    identity = xxhash.xxh3_128("".join(f"{file.field}\0{file.xxh3_128}\0" for file in files).encode()).hexdigest()
    size, modified = sum(file.size_bytes for file in files), max(file.modified_ns for file in files)
    return SourceFile(files[0].path, files[0].path, "aligned", "none", config, size, modified, identity, cut, files)


def _cut_aligned(hashes: list[HashedBlocks]) -> tuple[tuple[Span, ...], list[tuple[int, ...]]]:
    """Numbered spans, and for each file the offsets where they begin. Raises BadDataError for unequal lengths."""
    spans, num_lines = cut_at_lines(hashes[0])
    first_lines = [span.first_line for span in spans]
    counts = {hashes[0].path: num_lines}
    offsets = [tuple(span.start for span in spans)]
    for hashed in hashes[1:]:
        found, counts[hashed.path] = find_lines(hashed, first_lines)
        offsets.append(tuple(found))
    if len(set(counts.values())) > 1:
        raise unequal(counts)
    return tuple(Span(index, index + 1, line) for index, line in enumerate(first_lines)), offsets
