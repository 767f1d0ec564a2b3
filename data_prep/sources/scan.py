"""From the sources of a run file to hashed files cut into spans, in one pass with constant memory.

Spans depend on the bytes alone.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any

import xxhash

from data_prep.config import Format, SourceConfig
from data_prep.errors import CannotWriteError, DataConfigError, MissingInputError
from data_prep.progress import Progress
from data_prep.sources.decompress import Compression, file_blocks, find_compression, stat_file
from data_prep.sources.filled_nulls import without_nulls
from data_prep.sources.read_aligned import unequal
from data_prep.sources.read_csv import Dialect, cut_csv
from data_prep.sources.read_json import cut_json
from data_prep.sources.read_tables import cut_arrow, cut_parquet, json_value
from data_prep.sources.records import WHOLE_FILE, AlignedFile, SourceFile, Span
from data_prep.sources.source_files import check_keys, find_files, find_formats
from data_prep.sources.spans import SPAN_BYTES, cut_at_blank_lines, cut_at_lines, find_lines

Advance = Callable[[int], None]
_Scan = Callable[[Advance], SourceFile]


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
    """The work that is left for each file of a source, and its bytes."""
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


class HashedBlocks:
    """The blocks of a whole file, hashed and counted as they are taken."""

    def __init__(self, path: str, advance: Advance):
        self.path = path
        self.advance = advance
        self.status = stat_file(path)
        self.digest = xxhash.xxh3_128()

    def __iter__(self) -> Iterator[bytes]:
        for block in file_blocks(self.path, 0, self.status.st_size):
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
    """Hash a file and cut it, in one pass with constant memory. `advance` is told the bytes that were read."""
    hashed = HashedBlocks(path, advance)
    if name in ("parquet", "arrow"):
        hashed.hash_all()
        cut = cut_parquet if name == "parquet" else cut_arrow
        spans = tuple(cut(path)) if compression == "none" else (WHOLE_FILE,)
    elif compression != "none" or config.encoding is not None:
        hashed.hash_all()
        spans = (WHOLE_FILE,)
    else:
        spans = tuple(_cut(hashed, name, config))
    size, modified = hashed.status.st_size, hashed.status.st_mtime_ns
    return SourceFile(path, label, name, compression, config, size, modified, hashed.digest.hexdigest(), spans)


def _cut(hashed: HashedBlocks, name: Format, config: SourceConfig) -> list[Span]:
    path, size = hashed.path, hashed.status.st_size
    match name:
        case "csv" | "tsv":
            return cut_csv(hashed, path, dialect_of(name, config.quoting))
        case "json" | "squad":
            return cut_json(hashed, path, "data" if name == "squad" else config.split)
        case "conll" | "conllu":
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
        if not Path(path).is_file():
            raise MissingInputError(f"{path}: no such file ({dotted_key}.aligned)")
    return names


def scan_aligned(config: SourceConfig, names: dict[str, str], advance: Advance) -> SourceFile:
    """Hash aligned files and cut them at the same lines. A compressed file cannot be cut, nor can its companions."""
    compressions = [find_compression(path) for path in names.values()]
    hashes = [HashedBlocks(path, advance) for path in names.values()]
    cut: tuple[Span, ...]
    offsets: list[tuple[int, ...]]
    if config.encoding is not None or any(compression != "none" for compression in compressions):
        for hashed in hashes:
            hashed.hash_all()
        cut, offsets = (WHOLE_FILE,), [() for _ in hashes]
    else:
        cut, offsets = _cut_aligned(hashes)
    files = tuple(
        AlignedFile(field, hashed.path, compression, hashed.status.st_size, hashed.status.st_mtime_ns, digest, starts)
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


def dialect_of(name: str, quoting: bool) -> Dialect:
    """How the fields of a csv or tsv file are told apart."""
    return Dialect("," if name == "csv" else "\t", quoting)


def spool_hub(config: SourceConfig, dotted_key: str, cache_dir: Path, progress: bool) -> Path:
    """The JSONL file in `cache_dir` that holds the split, written unless it is there, in constant memory.

    Its name is made from the data set's name, configuration, split, revision and the fingerprint `datasets` gives its
    files. Raises MissingInputError if it cannot be reached or has no such configuration or split, BadDataError for what
    is neither text nor number, CannotWriteError.
    """
    builder = _builder(config, dotted_key)
    split = config.split or "train"
    name = str(config.hub)
    identity = [name, config.config, split, config.revision, builder.config_id, builder.hash]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    path = cache_dir / f"hub-{Path(name).name}-{digest}.jsonl"
    if not path.exists():
        try:
            records = builder.as_streaming_dataset(split=split)
        except ValueError as error:
            raise MissingInputError(f"{name}: {_one_line(error)} ({dotted_key}.split)") from error
        _write(records, path, f"{name}[{split}]", dotted_key, progress)
    return path


def _builder(config: SourceConfig, dotted_key: str) -> Any:
    import datasets

    assert config.hub is not None
    folder = Path(config.hub).expanduser()
    name = str(folder.resolve()) if folder.is_dir() else config.hub
    once = datasets.DownloadConfig(max_retries=1)  # more only delay the message that there is no network
    try:
        return datasets.load_dataset_builder(name, config.config, revision=config.revision, download_config=once)
    except (OSError, ValueError, RuntimeError) as error:
        raise MissingInputError(f"{config.hub}: {_one_line(error)} ({dotted_key}.hub)") from error


def _write(records: Iterable[dict[str, Any]], path: Path, label: str, dotted_key: str, progress: bool) -> None:
    """Stream records into a temporary file that gets its name when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    rows = iter(records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            temporary.open("w", encoding="utf-8", errors="surrogatepass") as file,
            Progress(label, None, progress, "records") as bar,
        ):
            row = 0
            while (record := _next(rows, label, dotted_key)) is not None:
                row += 1
                plain = {key: json_value(item, key, f"{label}: row {row}") for key, item in record.items()}
                value = {key: without_nulls(item)[0] for key, item in plain.items()}
                file.write(json.dumps(value, ensure_ascii=False) + "\n")
                bar.advance(1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CannotWriteError(f"{temporary}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _next(rows: Any, label: str, dotted_key: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] | None = next(rows, None)
    except Exception as error:  # whatever a data set's files, features or the network raise
        raise MissingInputError(f"{label}: cannot be read to its end: {_one_line(error)} ({dotted_key}.hub)") from error
    return record


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
