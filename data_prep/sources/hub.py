"""Data sets through `datasets`: a split of the Hub, or of a local folder, as one file of JSON lines."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.config import SourceConfig
from data_prep.errors import CannotWriteError, MissingInputError
from data_prep.progress import Progress
from data_prep.sources.filled_nulls import without_nulls
from data_prep.sources.read_tables import json_value


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
