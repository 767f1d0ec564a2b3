"""Data sets through `datasets`: a split of the Hub, or of a local folder, as one file of JSON lines."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from data_prep.config import SourceConfig
from data_prep.errors import CannotWriteError, DataConfigError, MissingInputError
from data_prep.progress import Progress
from data_prep.sources.archives import is_archive
from data_prep.sources.class_names import class_labels
from data_prep.sources.filled_nulls import without_filled_nulls
from data_prep.sources.read_tables import json_value
from data_prep.sources.records import Record

_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
_DATA = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".xml")
_LISTED_FILES = 100_000
_LOOKED_AT_RECORDS = 100


#: A look at the first records of a source, which raises PreparationError where they cannot be used.
Check = Callable[[Sequence[Record], SourceConfig], object]


def spool_hub(config: SourceConfig, dotted_key: str, cache_dir: Path, progress: bool, check: Check | None) -> Path:
    """The JSONL file in `cache_dir` that holds the split, written unless it is there, in constant memory.

    Its name is made from the data set's name, configuration, split, revision and the fingerprint `datasets` gives its
    files. The first records are looked at by `check` before the others are fetched. Raises MissingInputError if it
    cannot be reached or has no such configuration or split, BadDataError for what is neither text nor number,
    DataConfigError for a folder whose data lies in an archive, CannotWriteError.
    """
    builder = _builder(config, dotted_key)
    split = config.split or "train"
    name = str(config.hub)
    _refuse_archives(
        name, [str(file) for files in (builder.config.data_files or {}).values() for file in files], dotted_key
    )
    identity = [name, config.config, split, config.revision, builder.config_id, builder.hash]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    path = cache_dir / f"hub-{Path(name).name}-{digest}.jsonl"
    if not path.exists():
        try:
            records = builder.as_streaming_dataset(split=split)
        except ValueError as error:
            raise MissingInputError(f"{name}: {_one_line(error)} ({dotted_key}.split)") from error
        label = f"{name}[{split}]"
        values = _values(iter(records), label, dotted_key)
        first = list(islice(values, _LOOKED_AT_RECORDS))
        if check is not None:
            looked_at = [Record(value, f"{label}:{line}", line) for line, value in enumerate(first, 1)]
            check([without_filled_nulls(record) for record in looked_at], config)
        # Before the records: once these are there, nothing is written any more.
        _write_names(class_labels(builder.info.features or {}), path.with_suffix(".names"))
        _write(chain(first, values), path, label, progress)
    return path


def _write_names(names: Mapping[str, list[str]], path: Path) -> None:
    """Keep the names of label numbers beside the records."""
    if not names:
        return
    features = {field: {"names": few} for field, few in names.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"features": features}), encoding="utf-8")
    except OSError as error:
        raise CannotWriteError(f"{path}: {error.strerror or error}") from error


def _refuse_archives(name: str, files: Sequence[str], dotted_key: str) -> None:
    """Raise DataConfigError where `datasets` would take the bytes of an archive for records, all of them."""
    archive = next((file for file in files if file.lower().endswith(_ARCHIVES)), None)
    if archive is not None:
        how = f"write `path: {archive}`" if is_archive(archive) else "unpack it, and write `path:` with what it holds"
        raise DataConfigError(f"{name}: its data lies in the archive {Path(archive).name}; {how} ({dotted_key}.hub)")


def _files_below(folder: Path) -> list[str]:
    """The files of a folder and of those in it, which may be many."""
    files = (str(Path(place, name)) for place, _, names in os.walk(folder) for name in names)
    return [file for file in islice(files, _LISTED_FILES) if not Path(file).name.startswith(".")]


def _builder(config: SourceConfig, dotted_key: str) -> Any:
    import datasets

    assert config.hub is not None
    folder = Path(config.hub).expanduser()
    name = str(folder.resolve()) if folder.is_dir() else config.hub
    if folder.is_dir():
        files = _files_below(folder)
        if not any(file.lower().removesuffix(".gz").endswith(_DATA) for file in files):
            _refuse_archives(config.hub, files, dotted_key)  # before `datasets` lists what is in it
    once = datasets.DownloadConfig(max_retries=1)  # more only delay the message that there is no network
    try:
        builder = datasets.load_dataset_builder(name, config.config, revision=config.revision, download_config=once)
    except (OSError, ValueError, RuntimeError) as error:
        raise MissingInputError(f"{config.hub}: {_one_line(error)} ({dotted_key}.hub)") from error
    if folder.is_dir():
        chosen = builder.config.data_files or {}
        _refuse_archives(config.hub, [str(file) for files in chosen.values() for file in files], dotted_key)
    return builder


def _values(rows: Iterator[Any], label: str, dotted_key: str) -> Iterator[dict[str, Any]]:
    """The records of a data set as JSON values."""
    for row in count(1):
        try:
            record = next(rows, None)
        except Exception as error:  # whatever a data set's files, features or the network raise
            raise MissingInputError(
                f"{label}: cannot be read to its end: {_one_line(error)} ({dotted_key}.hub)"
            ) from error
        if record is None:
            return
        yield {key: json_value(item, key, f"{label}: row {row}") for key, item in record.items()}


def _write(values: Iterable[dict[str, Any]], path: Path, label: str, progress: bool) -> None:
    """Stream records into a temporary file that gets its name when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            temporary.open("w", encoding="utf-8", errors="surrogatepass") as file,
            Progress(label, None, progress, "records") as bar,
        ):
            for value in values:
                file.write(json.dumps(value, ensure_ascii=False) + "\n")
                bar.advance(1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CannotWriteError(f"{temporary}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
