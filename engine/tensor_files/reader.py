"""Safetensors files read a range at a time, and checked against a hash for every 4 MiB block.

The format is small: eight bytes of header length, a JSON header with names, types, shapes and byte
ranges, then the bytes. `engine.tensor_files.writer` writes such files.
"""

import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from engine.errors import DataError

BLOCK_BYTES = 4 * 1024 * 1024
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: What each type is called in a file.
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
#: What a file can hold.
TENSOR_TYPES = tuple(DTYPE_NAMES)


@dataclass(frozen=True)
class FileRecord:
    """A written file: its name, its size, and the xxh3-128 of each 4 MiB block in order."""

    name: str
    size_bytes: int
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file; `begin` and `end` are byte offsets from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_file(path: Path, max_bytes: int) -> bytes:
    """The whole of a plain file of at most `max_bytes`. Raises DataError."""
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise DataError(f"{path}: {size} bytes long, more than the {max_bytes} that such a file may have")
        return _read_exactly(descriptor, size, 0, path)


#: The first bytes of what a download leaves in place of a file, in small letters.
_INSTEAD = {
    b"versi": "a pointer of Git LFS; run `git lfs pull` in its folder, or download the model again",
    b"<!doc": "a web page; download the model again",
    b"<html": "a web page; download the model again",
}


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of the file at `path`. DataError unless they fill it without gap, overlap or excess."""
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size < 8:
            raise DataError(f"{path}: not a safetensors file: {size} bytes")
        first = _read_exactly(descriptor, 8, 0, path)
        if (stands_there := _INSTEAD.get(first.lstrip()[:5].lower())) is not None:
            raise DataError(f"{path}: not a safetensors file: {stands_there}")
        (length,) = struct.unpack("<Q", first)
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise DataError(f"{path}: not a safetensors file: it claims a header of {length} bytes")
        text = _read_exactly(descriptor, length, 8, path)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
        entries = {name: _entry(value, 8 + length) for name, value in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not a valid safetensors header: {error}") from None
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise DataError(f"{path}: tensor {name} does not begin where the one before it ends")
        position = entry.end
    if position != size:
        raise DataError(f"{path}: {size} bytes long, but its header describes {position}")
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is given twice")
    return result


def _entry(value: Any, base: int) -> TensorEntry:
    if set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("a tensor needs exactly dtype, shape and data_offsets")
    numbers = [*value["shape"], *value["data_offsets"]]
    if any(type(number) is not int or number < 0 for number in numbers) or len(value["data_offsets"]) != 2:
        raise ValueError("shapes and offsets are whole numbers")
    dtype = _DTYPES[value["dtype"]]
    begin, end = value["data_offsets"]
    if end - begin != math.prod(value["shape"]) * dtype.itemsize:
        raise ValueError("a tensor's bytes do not fit its shape")
    return TensorEntry(dtype, tuple(value["shape"]), base + begin, base + end)


def data_offset(path: Path) -> int:
    """Where the tensors' bytes begin in a file that `read_header` has accepted."""
    with opened(path) as descriptor:
        (length,) = struct.unpack("<Q", _read_exactly(descriptor, 8, 0, path))
    return 8 + int(length)


def check_size(path: Path, record: FileRecord) -> None:
    """DataError unless `path` is a plain file (no link) of the recorded size."""
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
    if size != record.size_bytes:
        raise DataError(f"{path}: {size} bytes long, but {record.size_bytes} were written")


def block_digest(data: memoryview) -> str:
    """The hash that a file's record holds for a block of these bytes."""
    return xxhash.xxh3_128(data).hexdigest()


def drop_cache(path: Path) -> None:
    """Ask the system to forget its copy of a flushed file, so that the next read comes from the disk."""
    with opened(path) as descriptor:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def verify_blocks(path: Path, record: FileRecord, blocks: Iterable[int] | None = None) -> None:
    """DataError unless `path` still holds what was written; `blocks` limits the check to some of its blocks."""
    check_size(path, record)
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with opened(path) as descriptor:
        for block in range(len(record.blocks)) if blocks is None else blocks:
            begin = block * BLOCK_BYTES
            piece = buffer[: min(BLOCK_BYTES, record.size_bytes - begin)]
            read_into(descriptor, piece, begin, path)
            if block_digest(piece) != record.blocks[block]:
                raise DataError(f"{path}: damaged: bytes {begin} to {begin + len(piece)} are not what was written")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a plain file; a link, device or pipe is a DataError, absence too."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DataError(f"{path}: not a plain file")
        yield descriptor
    finally:
        os.close(descriptor)


def _read_exactly(descriptor: int, count: int, offset: int, path: Path) -> bytes:
    data = bytearray(count)
    read_into(descriptor, memoryview(data), offset, path)
    return bytes(data)


def read_into(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` with the bytes at `offset`. DataError when the file ends before, or cannot be read."""
    rest = buffer.cast("B")
    while rest:
        try:
            count = os.preadv(descriptor, [rest], offset)
        except OSError as error:
            raise DataError(f"{path}: cannot be read at byte {offset}: {error.strerror}") from error
        if count == 0:
            raise DataError(f"{path}: ends at byte {offset}, in the middle of its data")
        rest = rest[count:]
        offset += count
