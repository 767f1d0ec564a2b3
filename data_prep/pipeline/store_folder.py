"""The folder that holds token stores: one writer at a time, whole stores or none, durable names."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_prep.errors import CannotWriteError, StorageError
from data_prep.token_store import FORMAT_VERSION, MANIFEST_NAME, TokenStore, is_content_file

_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)


@contextmanager
def storage_errors(store_dir: Path) -> Iterator[None]:
    """Turn the operating system's errors into CannotWriteError or StorageError."""
    try:
        yield
    except OSError as error:
        kind = CannotWriteError if error.errno in _CANNOT_WRITE else StorageError
        raise kind(f"{error.filename or store_dir}: {error.strerror or error} (data.store_dir {store_dir})") from error


@contextmanager
def exclusive(store_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Create `store_dir` and hold its lock; a second preparation waits and says so.

    The kernel lets go of the lock when its holder dies.
    """
    store_dir.mkdir(parents=True, exist_ok=True)
    with (store_dir / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another preparation in {store_dir}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_leftovers(store_dir: Path) -> None:
    """Remove what a killed preparation left. Only with the lock held."""
    for leftover in store_dir.glob(".*.partial"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def remove_work(folder: Path) -> None:
    """Remove the parts of a preparation whose stores are published."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_empty_work(folder: Path) -> None:
    """Remove the parts of a preparation that failed, if none of them holds a document and none is in the making."""
    with suppress(FileNotFoundError):  # another preparation was first
        useful = any(path.stat().st_size for path in folder.glob("records*/*.part"))
        if not useful and not any(folder.glob("records*/.*.partial")):
            remove_work(folder)


def sync_file(path: Path) -> None:
    """Make a file's content, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a file by its whole new content, durably."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_file(path.parent)


def link_content(donor: TokenStore, folder: Path) -> dict[str, Any]:
    """Take over the documents of another store, sharing the files; returns its manifest without the rows."""
    files = {name: entry for name, entry in donor.manifest["files"].items() if is_content_file(name)}
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        try:
            os.link(donor.path / name, folder / name)
        except OSError:  # a file system without hard links
            shutil.copyfile(donor.path / name, folder / name)
            sync_file(folder / name)
    return {**donor.manifest, "files": files}


def publish(folder: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest last, make everything durable, and give the folder its name."""
    entries = {"format": FORMAT_VERSION, **manifest}.items()  # a line each: with all indented, many files take long
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    write_text_atomically(folder / MANIFEST_NAME, text)
    for inner in folder.iterdir():
        if inner.is_dir():
            sync_file(inner)
    folder.rename(final)
    sync_file(final.parent)
