"""The files of a token store: the manifest, memory maps that never lead outside, and which store is current."""

import hashlib
import json
import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import xxhash

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
ADVICE = "prepare the data again"
INDEX_TYPES = ("uint32", "uint64")
_HASH_BLOCK_BYTES = 1 << 22


class StoreError(Exception):
    """A token store is missing (66), damaged, or not the one that is needed (65)."""

    def __init__(self, message: str, exit_code: int = 65):
        super().__init__(message, exit_code)
        self.message = message
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.message


def is_content_file(name: str) -> bool:
    """True if a file of a store belongs to its content (documents) and not to one arrangement into rows."""
    return not name.startswith("rows_")


def content_digest(manifest: Mapping[str, Any]) -> str:
    """Hex identity of a store's documents: the hashes of their files and how to read them."""
    identity = {
        "format": manifest["format"],
        "task": manifest["task"],
        "vocab_size": manifest["vocab_size"],
        "label_names": manifest["label_names"],
        "files": {name: entry["xxh3_128"] for name, entry in manifest["files"].items() if is_content_file(name)},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """xxh3 (128 bits, hex) of a whole file, read in blocks."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def place_prefix(file: Mapping[str, Any]) -> str:
    """The beginning of the places of records in a file of the manifest: lines are numbered unless `unit` says else."""
    unit = file.get("unit")
    return f"{file['path']}: {unit} " if unit else f"{file['path']}:"


def whole_number(values: Mapping[str, Any], key: str) -> int:
    value = values[key]
    if type(value) is not int or not 0 <= value < 2**62:
        raise TypeError(f"{key!r} ({value!r} is not a count)")
    return value


def identity_of(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


@dataclass(frozen=True)
class MappedFile:
    """An open .npy file of one dimension."""

    path: Path
    values: np.ndarray
    map: mmap.mmap
    identity: tuple[int, int, int, int]

    def require_whole(self) -> None:
        """StoreError if the file is shorter now than it was: reading its end would kill the process."""
        if self.map.size() < self.identity[0]:
            raise StoreError(f"{self.path}: was cut off while it was in use; {ADVICE}")


def map_array(path: Path) -> MappedFile:
    """Map a one-dimensional .npy file that this program's writer could have written, and nothing else."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("not version 1.0 of the .npy format")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=4096)
            offset = file.tell()
            if len(shape) != 1 or dtype.kind not in "uif" or status.st_size != offset + shape[0] * dtype.itemsize:
                raise ValueError(f"{dtype}{shape} in {status.st_size} bytes")
            mapped = mmap.mmap(file.fileno(), status.st_size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: not a readable array: {error}; {ADVICE}") from error
    values = np.frombuffer(mapped, dtype=dtype, count=shape[0], offset=offset)
    return MappedFile(path, values, mapped, identity_of(status))


def check_file(store: Path, name: str, entry: Mapping[str, Any]) -> None:
    """One file of the manifest: inside the store's folder, an ordinary file, of its size."""
    relative = PurePosixPath(name)
    if not relative.parts or ".." in relative.parts or relative.is_absolute():
        raise StoreError(f"{store / MANIFEST_NAME}: {name!r} leaves the store's folder", 77)
    path = store / name
    try:
        size = path.lstat().st_size
        inner = [path, *(store / parent for parent in relative.parents if parent.parts)]
        links = [place for place in inner if stat.S_ISLNK(place.lstat().st_mode)]
    except (OSError, ValueError):
        raise StoreError(f"{path}: missing; {ADVICE}", 66) from None
    if links or not stat.S_ISREG(path.lstat().st_mode):
        raise StoreError(f"{(links or [path])[0]}: a link or no ordinary file: a store holds its own files", 77)
    if not isinstance(entry, dict) or size != entry.get("bytes"):
        expected = entry.get("bytes") if isinstance(entry, dict) else entry
        raise StoreError(f"{path}: {size} bytes, not {expected}: damaged; {ADVICE}")


def read_manifest(path: Path) -> dict[str, Any]:
    manifest_path = path / MANIFEST_NAME
    if not path.is_dir():
        raise StoreError(f"{path}: no such token store; run `fulltune prepare RUN.yaml`", 66)
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path}: has no {MANIFEST_NAME}, so it is not a finished token store", 66) from None
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{manifest_path}: cannot be read: {error}; {ADVICE}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise StoreError(f"{manifest_path}: not the manifest of a token store")
    if manifest.get("format") != FORMAT_VERSION:
        raise StoreError(f"{path}: store format {manifest.get('format')}, not {FORMAT_VERSION}; {ADVICE}")
    return manifest


CURRENT_NAME = "current.json"
_SAID_CHARACTERS = 100


def resolve_store(
    store_dir: Path, split: str, data_section: Mapping[str, Any] | None = None, task: str | None = None
) -> Path | None:
    """The folder of `split` that ``store_dir/current.json`` names, or None if the data has no such split.

    With `data_section` and `task` given, they must be what the store was prepared from. Raises
    StoreError: 66 when nothing was prepared, 65 when it was prepared from other settings.
    """
    path = store_dir / CURRENT_NAME
    advice = "run `fulltune prepare RUN.yaml`"
    try:
        current = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{store_dir}: no prepared data here; {advice}", 66) from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read: {error}; {advice}") from error
    if not isinstance(current, dict) or not isinstance(current.get("splits"), dict):
        raise StoreError(f"{path}: does not name any splits; {advice}")
    if task is not None and current.get("task") != task:
        raise StoreError(f"{store_dir}: prepared for task {current.get('task')}, not {task}; {advice}")
    if data_section is not None:
        _require_same_section(store_dir, current.get("data"), data_section)
    folder = current["splits"].get(split)
    if folder is None:
        return None
    if not isinstance(folder, str) or PurePosixPath(folder).name != folder or folder in (".", ".."):
        raise StoreError(f"{path}: {folder!r} is not the plain name of a folder")
    return store_dir / folder


def _require_same_section(store_dir: Path, prepared: Any, wanted: Mapping[str, Any]) -> None:
    from pydantic import ValidationError

    from data_prep.config import comparable_section

    try:
        old, new = comparable_section(prepared), comparable_section(dict(wanted))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        dotted = ".".join(("data", *map(str, fault["loc"])))
        raise StoreError(f"{store_dir}: `{dotted}`: {fault['msg']}", 78) from error
    changed = [f"data.{key}{_change(old[key], new[key])}" for key in new if old[key] != new[key]]
    if changed:
        listed = ", ".join(changed)
        raise StoreError(f"{store_dir}: prepared from other settings ({listed}); run `fulltune prepare RUN.yaml`")


def _change(old: Any, new: Any) -> str:
    """The message for a value that is another now; sources and the like are too long to say."""
    said = f": {old} -> {new}"
    return said if len(said) <= _SAID_CHARACTERS else ""
