"""Safetensors files written a piece at a time, with a hash for every 4 MiB block.

The library's own writer wants whole tensors in memory; a training state and an export are larger
than that. What we write opens with the ordinary library.
"""

import json
import math
import os
import queue
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

from engine.file_modes import FILE_MODE
from engine.tensor_files.reader import BLOCK_BYTES, DTYPE_NAMES, FileRecord, TensorEntry

CHUNK_BYTES = 16 * BLOCK_BYTES
_BLOCKS_TO_PUSH = 16


@dataclass(frozen=True)
class TensorSource:
    """A tensor still to be written: `chunks()` yields its elements in order as 1-D tensors of `dtype`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[torch.Tensor]]


class HashingFile:
    """A new file that is hashed block by block while it is written, and is on the disk when `close` returns.

    Raises OSError; a file that already exists, or a link in its place, is refused.
    """

    def __init__(self, path: Path):
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
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


def write_file(path: Path, data: bytes) -> FileRecord:
    """Write `data` to the new file `path` and fsync it. Raises OSError."""
    with HashingFile(path) as file:
        file.write(data)
        return file.finish()


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
            "dtype": DTYPE_NAMES[tensor.dtype],
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
    read_ahead: bool = False,
) -> FileRecord:
    """Write `tensors` to the new file `path` holding one chunk at a time, and fsync it.

    With `read_ahead` a thread makes the next chunks, two at most, while one is hashed and written.
    Raises OSError when the file cannot be written and ValueError when a source yields other than it said.
    """
    layout = file_layout(path.name, tensors, metadata)
    chunks = _checked_chunks(layout.tensors)
    with HashingFile(path) as file, _ahead(chunks) if read_ahead else nullcontext(chunks) as stream:
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
