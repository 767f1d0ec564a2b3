"""Tensors where they lie in files: cut into parts, put together, verified, and read a chunk at a time."""

import math
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import DataError
from engine.tensor_files.range_reader import ReadRequest, read_ranges
from engine.tensor_files.reader import opened, read_into
from engine.tensor_files.writer import CHUNK_BYTES, TensorSource

_FILES_AT_ONCE = 4
_READ_BYTES = 16 << 20


@dataclass(frozen=True)
class Storage:
    """Bytes `[begin, end)` of a file, and the CRC-32 that was recorded of them; None where none was."""

    path: Path
    begin: int
    end: int
    crc32: int | None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's elements, in order, from byte `offset_bytes` of the file that its storage lies in."""

    storage: Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def path(self) -> Path:
        """The file."""
        return self.storage.path

    @property
    def count(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


class Flat:
    """Stored tensors seen as one long one."""

    def __init__(self, pieces: Sequence[StoredTensor]):
        self._pieces = pieces
        self._ends = list(accumulate(piece.count for piece in pieces))
        #: number of elements
        self.count = self._ends[-1] if pieces else 0

    def cut(self, start: int, stop: int) -> Iterator[StoredTensor]:
        """Elements `[start, stop)`, as parts of the pieces they lie in."""
        index = bisect_right(self._ends, start)
        while start < stop:
            piece, begin = self._pieces[index], self._ends[index] - self._pieces[index].count
            end = min(stop, self._ends[index])
            if end > start:
                offset = piece.offset_bytes + (start - begin) * piece.dtype.itemsize
                yield StoredTensor(piece.storage, piece.dtype, (end - start,), offset)
            start, index = end, index + 1


def whole_source(name: str, tensor: StoredTensor) -> TensorSource:
    """A weight that is stored in one piece."""
    return joined_source(name, tensor.shape, [tensor], tensor.path)


def joined_source(name: str, shape: tuple[int, ...], pieces: Sequence[StoredTensor], path: Path) -> TensorSource:
    """A weight put together of the first elements of `pieces`, read a chunk at a time."""
    flat, count = Flat(pieces), math.prod(shape)
    dtypes = {piece.dtype for piece in pieces}
    if flat.count < count or len(dtypes) > 1:
        raise DataError(f"{path}: {name[:200]!a} needs {count} elements of one type, but {flat.count} are stored")
    dtype = dtypes.pop() if dtypes else torch.float32

    def chunks() -> Iterator[Tensor]:
        step = CHUNK_BYTES // dtype.itemsize
        for start in range(0, count, step):
            values = torch.empty(min(step, count - start), dtype=dtype)
            read_ranges(_destinations(flat.cut(start, start + len(values)), values))
            yield values

    return TensorSource(name, dtype, shape, chunks)


def _destinations(pieces: Iterator[StoredTensor], values: Tensor) -> Iterator[ReadRequest]:
    start = 0
    for piece in pieces:
        yield ReadRequest(piece.path, piece.offset_bytes, piece.dtype, values[start : start + piece.count])
        start += piece.count


def verify_storages(tensors: Iterable[StoredTensor]) -> None:
    """Read what the tensors lie in, once, and compare it with its checksum. DataError names the file and the bytes."""
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        list(pool.map(_verify, dict.fromkeys(tensor.storage for tensor in tensors)))


def _verify(storage: Storage) -> None:
    if storage.crc32 is None:
        return
    found, buffer = 0, memoryview(bytearray(min(_READ_BYTES, storage.end - storage.begin)))
    with opened(storage.path) as descriptor:
        for begin in range(storage.begin, storage.end, _READ_BYTES):
            piece = buffer[: min(_READ_BYTES, storage.end - begin)]
            read_into(descriptor, piece, begin, storage.path)
            found = zlib.crc32(piece, found)
    if found != storage.crc32:
        raise DataError(f"{storage.path}: damaged: bytes {storage.begin} to {storage.end} are not what was written")
