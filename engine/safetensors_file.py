"""Safetensors files written and read a piece at a time, with a hash for every 4 MiB block.

The library's own writer wants whole tensors in memory; a training state and an export are larger
than that. The format is small: eight bytes of header length, a JSON header with names, types,
shapes and byte ranges, then the bytes. What we write opens with the ordinary library.
"""

import json
import math
import os
import queue
import stat
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import xxhash

from engine.errors import DataError

BLOCK_BYTES = 4 * 1024 * 1024
CHUNK_BYTES = 16 * BLOCK_BYTES
_BLOCKS_TO_PUSH = 16
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
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
#: What a file can hold.
TENSOR_TYPES = tuple(_DTYPE_NAMES)


@dataclass(frozen=True)
class TensorSource:
    """A tensor still to be written: `chunks()` yields its elements in order as 1-D tensors of `dtype`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[torch.Tensor]]


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


class HashingFile:
    """A new file that is hashed block by block while it is written, and is on the disk when `close` returns.

    Raises OSError; a file that already exists, or a link in its place, is refused.
    """

    def __init__(self, path: Path, mode: int = 0o600):
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        self._hash = xxhash.xxh3_128()
        self._in_block = 0
        self._blocks: list[str] = []
        self._size_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        if isinstance(value, OSError) and value.filename is None:
            value.filename = str(self._path)  # a failed write knows its descriptor only

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, hashing the very bytes that are handed to the system."""
        rest = memoryview(data).cast("B")
        while rest:
            written = os.write(self._descriptor, rest[: BLOCK_BYTES - self._in_block])
            self._hash.update(rest[:written])
            self._in_block += written
            self._size_bytes += written
            rest = rest[written:]
            if self._in_block == BLOCK_BYTES:
                self._end_block()
                if len(self._blocks) % _BLOCKS_TO_PUSH == 0:
                    self._push()

    def finish(self) -> FileRecord:
        """Flush to the disk and return what was written."""
        if self._in_block:
            self._end_block()
        os.fsync(self._descriptor)
        return FileRecord(self._path.name, self._size_bytes, tuple(self._blocks))

    def _push(self) -> None:
        """Have the system begin to write what it has and forget what it has written: the last flush is short then."""
        os.posix_fadvise(self._descriptor, 0, self._size_bytes, os.POSIX_FADV_DONTNEED)

    def _end_block(self) -> None:
        self._blocks.append(self._hash.hexdigest())
        self._hash = xxhash.xxh3_128()
        self._in_block = 0


def write_file(path: Path, data: bytes, mode: int = 0o600) -> FileRecord:
    """Write `data` to the new file `path` and fsync it. Raises OSError."""
    with HashingFile(path, mode) as file:
        file.write(data)
        return file.finish()


def read_file(path: Path, max_bytes: int) -> bytes:
    """The whole of a plain file of at most `max_bytes`. Raises DataError."""
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise DataError(f"{path}: {size} bytes long, more than the {max_bytes} that such a file may have")
        return _read_exactly(descriptor, size, 0, path)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_chunks(tensor: torch.Tensor, chunk_bytes: int = CHUNK_BYTES) -> Iterator[torch.Tensor]:
    """The elements of `tensor` as 1-D CPU pieces; a contiguous CPU tensor is not copied."""
    flat = tensor.detach().reshape(-1)
    elements = max(1, chunk_bytes // flat.element_size())
    for start in range(0, flat.numel(), elements):
        yield flat[start : start + elements].cpu()


@dataclass(frozen=True)
class FileLayout:
    """What a file of given tensors looks like: its first bytes, then these tensors in this order."""

    head: bytes
    tensors: list[TensorSource]
    entries: dict[str, TensorEntry]
    size_bytes: int


def file_layout(name: str, tensors: Iterable[TensorSource], metadata: dict[str, str] | None = None) -> FileLayout:
    """Lay out the file `name`: larger element sizes first, as in the library, so that every tensor is aligned.

    ValueError for two tensors of one name.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for tensor in ordered:
        end = offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        if tensor.name in header:
            raise ValueError(f"{name}: two tensors are called {tensor.name}")
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    entries = {}
    for tensor in ordered:
        begin, end = header[tensor.name]["data_offsets"]
        entries[tensor.name] = TensorEntry(tensor.dtype, tuple(tensor.shape), len(head) + begin, len(head) + end)
    return FileLayout(head, ordered, entries, len(head) + offset)


def write_safetensors(
    path: Path,
    tensors: Iterable[TensorSource],
    metadata: dict[str, str] | None = None,
    mode: int = 0o600,
    read_ahead: bool = False,
) -> FileRecord:
    """Write `tensors` to the new file `path` holding one chunk at a time, and fsync it.

    With `read_ahead` a thread makes the next chunks, two at most, while one is hashed and written.
    Raises OSError when the file cannot be written and ValueError when a source yields other than it said.
    """
    layout = file_layout(path.name, tensors, metadata)
    chunks = _checked_chunks(layout.tensors)
    with HashingFile(path, mode) as file, _ahead(chunks) if read_ahead else nullcontext(chunks) as stream:
        file.write(layout.head)
        for chunk in stream:
            file.write(as_bytes(chunk))
        return file.finish()


def as_bytes(chunk: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor's elements in order."""
    # bfloat16 has no numpy type; its bytes do.
    return memoryview(chunk.contiguous().view(-1).view(torch.uint8).numpy().data)


def _checked_chunks(tensors: Iterable[TensorSource]) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        missing = math.prod(tensor.shape)
        for chunk in tensor.chunks():
            missing -= chunk.numel()
            if chunk.dtype != tensor.dtype or missing < 0:
                raise ValueError(f"{tensor.name}: its source yielded more elements than, or other than, it said")
            if chunk.numel():
                yield chunk
        if missing:
            raise ValueError(f"{tensor.name}: its source yielded {missing} elements too few")


@contextmanager
def _ahead(chunks: Iterator[torch.Tensor]) -> Iterator[Iterator[torch.Tensor]]:
    """The same chunks, made by a thread that is up to two of them ahead; what it raises is raised here."""
    waiting: queue.Queue[torch.Tensor | BaseException | None] = queue.Queue(1)
    unwanted = threading.Event()

    def fill() -> None:
        last: BaseException | None = None
        try:
            for chunk in chunks:
                waiting.put(chunk)
                if unwanted.is_set():
                    break
        except BaseException as error:
            last = error
        waiting.put(last)

    def drain() -> Iterator[torch.Tensor]:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=fill, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield drain()
    finally:
        unwanted.set()
        while thread.is_alive():  # it may be waiting for room
            with suppress(queue.Empty):
                waiting.get(timeout=0.05)
        thread.join()


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of the file at `path`. DataError unless they fill it without gap, overlap or excess."""
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size < 8:
            raise DataError(f"{path}: not a safetensors file: {size} bytes")
        (length,) = struct.unpack("<Q", _read_exactly(descriptor, 8, 0, path))
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
