"""Many byte ranges of a few files straight into tensors: in file order, in large reads, hashes checked on the way."""

import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import DataError
from engine.tensor_files.reader import BLOCK_BYTES, FileRecord, block_digest, check_size, opened, read_into

_READ_BYTES = 4 * BLOCK_BYTES
_MAX_PIECES = 512  # of one read; the system takes at most 1024
_ALIGNMENT = 16  # of a piece in a thread's buffer
_THREADS = max(1, min(4, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
_thread = threading.local()  # of the pool of one `read_ranges`


@dataclass(frozen=True)
class ReadRequest:
    """`values.numel()` elements of type `dtype`, stored at a byte offset of a file, are to fill the 1-D `values`.

    `values` may have another type and live on another device.
    """

    path: Path
    offset_bytes: int
    dtype: torch.dtype
    values: Tensor

    @property
    def end_bytes(self) -> int:
        """Where the range ends in the file."""
        return self.offset_bytes + self.values.numel() * self.dtype.itemsize

    def part(self, begin: int, end: int) -> "ReadRequest":
        """The part between two byte offsets of the file, both at borders of elements."""
        first = (begin - self.offset_bytes) // self.dtype.itemsize
        count = (end - begin) // self.dtype.itemsize
        return ReadRequest(self.path, begin, self.dtype, self.values.narrow(0, first, count))

    @property
    def is_direct(self) -> bool:
        """True if the file's bytes are those of `values`, so that the system can put them there itself."""
        return self.dtype == self.values.dtype and self.values.device.type == "cpu" and self.values.is_contiguous()


def read_ranges(wanted: Iterable[ReadRequest], records: Mapping[Path, FileRecord] | None = None) -> int:
    """Fill every wanted tensor; returns the bytes read from storage. No communication.

    Memory beyond the tensors: 16 MiB a thread, four threads at most. With `records` every 4 MiB
    block that holds a wanted byte is read whole and compared with its hash. Raises DataError
    naming the file and the bytes: then some of the tensors have been filled.
    """
    files: dict[Path, list[ReadRequest]] = defaultdict(list)
    for item in wanted:
        if item.values.numel():
            files[item.path].append(item)
    total = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for path, items in files.items():
            items.sort(key=lambda item: item.offset_bytes)
            record = None if records is None else records[path]
            if record is not None:
                check_size(path, record)
            with opened(path) as descriptor:
                if record is None:
                    total += sum(pool.map(partial(_read_pieces, descriptor, path), _runs(items)))
                else:
                    blocks = _blocks(items)
                    total += sum(pool.map(partial(_read_block, descriptor, record, path), blocks, blocks.values()))
    return total


def _runs(items: list[ReadRequest]) -> Iterator[list[ReadRequest]]:
    """Pieces that lie next to each other in the file, for one read each."""
    run: list[ReadRequest] = []
    for item in items:
        step = _READ_BYTES // item.dtype.itemsize * item.dtype.itemsize
        for begin in range(item.offset_bytes, item.end_bytes, step):
            piece = item.part(begin, min(begin + step, item.end_bytes))
            full = run and piece.end_bytes - run[0].offset_bytes > _READ_BYTES
            if run and (full or len(run) == _MAX_PIECES or piece.offset_bytes != run[-1].end_bytes):
                yield run
                run = []
            run.append(piece)
    if run:
        yield run


def _read_pieces(descriptor: int, path: Path, run: list[ReadRequest]) -> int:
    landing, used = [], 0
    for item in run:
        if item.is_direct:
            landing.append(item.values)
            continue
        num_bytes = item.end_bytes - item.offset_bytes
        landing.append(_thread_buffer()[used : used + num_bytes].view(item.dtype))
        used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    buffers = [values.view(torch.uint8).numpy().data for values in landing]
    count = run[-1].end_bytes - run[0].offset_bytes
    try:
        got = os.preadv(descriptor, buffers, run[0].offset_bytes)
    except OSError as error:
        raise DataError(f"{path}: cannot be read at byte {run[0].offset_bytes}: {error.strerror}") from error
    if got < count:  # the system may give less than asked: piece by piece then, which tells where it ends
        for item, buffer in zip(run, buffers, strict=True):
            read_into(descriptor, buffer, item.offset_bytes, path)
    for item, values in zip(run, landing, strict=True):
        if values is not item.values:
            item.values.copy_(values)
    return count


def _thread_buffer() -> Tensor:
    """Bytes of this thread, for what cannot be read into its destination. Made once: the allocator keeps new ones."""
    if not hasattr(_thread, "buffer"):
        _thread.buffer = torch.empty(_READ_BYTES + _MAX_PIECES * _ALIGNMENT, dtype=torch.uint8)
    buffer: Tensor = _thread.buffer
    return buffer


def _blocks(items: list[ReadRequest]) -> dict[int, list[ReadRequest]]:
    """The parts that lie in each block. Our own files are aligned, so no element crosses a border."""
    blocks: dict[int, list[ReadRequest]] = defaultdict(list)
    for item in items:
        if item.offset_bytes % item.dtype.itemsize:
            raise ValueError(f"{item.path}: byte {item.offset_bytes} is not aligned for {item.dtype}")
        for block in range(item.offset_bytes // BLOCK_BYTES, -(-item.end_bytes // BLOCK_BYTES)):
            begin, end = block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
            blocks[block].append(item.part(max(begin, item.offset_bytes), min(end, item.end_bytes)))
    return blocks


def _read_block(descriptor: int, record: FileRecord, path: Path, block: int, parts: list[ReadRequest]) -> int:
    begin = block * BLOCK_BYTES
    size = min(BLOCK_BYTES, record.size_bytes - begin)
    # Read into the destination where it takes the whole block; the hash sees the very bytes that stay.
    first = parts[0]
    direct = first.is_direct and first.offset_bytes == begin and first.end_bytes == begin + size
    data = first.values.view(torch.uint8) if direct else _thread_buffer()[:size]
    buffer = data.numpy().data
    read_into(descriptor, buffer, begin, path)
    if block_digest(buffer) != record.blocks[block]:
        raise DataError(f"{path}: damaged: bytes {begin} to {begin + size} are not what was written")
    if not direct:
        for part in parts:
            part.values.copy_(data[part.offset_bytes - begin : part.end_bytes - begin].view(part.dtype))
    return size
