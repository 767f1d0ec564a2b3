"""Reads and writes around the page cache, as DeepSpeed does them for optimizer states on NVMe. Imports no torch."""

import mmap
import os
from pathlib import Path

from engine.errors import ConfigError, StorageError

_DIRECT_BYTES = 1024  # the grain of DeepSpeed's direct reads and writes


def check_direct_io(folder: Path) -> None:
    """ConfigError unless files here can be written around the page cache in the pieces that DeepSpeed writes."""
    path = folder / f".direct-{os.getpid()}"
    page = mmap.mmap(-1, mmap.PAGESIZE)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
        try:
            written = os.pwrite(descriptor, memoryview(page)[:_DIRECT_BYTES], _DIRECT_BYTES)
        finally:
            os.close(descriptor)
            path.unlink()
    except OSError as error:
        raise ConfigError(
            f"nvme_path: {folder} takes no direct writes of {_DIRECT_BYTES} bytes ({error.strerror}), which "
            "DeepSpeed needs: choose a folder on a local disk (not tmpfs, nor one with sectors of 4096 bytes)"
        ) from error
    if written != _DIRECT_BYTES:
        raise StorageError(f"nvme_path: {folder}: the disk is full")
