"""Blocks of bytes from plain and compressed files, guarded against bombs, truncation and garbage."""

import bz2
import codecs
import os
import zlib
from collections.abc import Iterator
from itertools import chain
from typing import IO, Any, Literal, NamedTuple

from data_prep.errors import BadDataError, MissingInputError, StorageError
from data_prep.sources.archives import find_member, open_member, split_member
from data_prep.sources.inflate import BLOCK_BYTES, RATIO_FREE_BYTES, RATIO_LIMIT, output_of

Compression = Literal["none", "gz", "zst", "bz2"]

_INPUT_BYTES = 32 << 10
_MAGIC: dict[Compression, bytes] = {"gz": b"\x1f\x8b", "zst": b"\x28\xb5\x2f\xfd", "bz2": b"BZh"}
_NAMES = {"gz": "gzip", "zst": "zstd", "bz2": "bzip2"}
_SUFFIXES: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".bz2": "bz2"}


def find_compression(path: str) -> Compression:
    """How a file is compressed, by its first bytes.

    Raises BadDataError for a name that promises a compression which is not there, MissingInputError, StorageError.
    """
    with open_binary(path) as file:
        head = file.read(4)
    named: Compression = next((kind for end, kind in _SUFFIXES.items() if path.lower().endswith(end)), "none")
    found: Compression = next((kind for kind, magic in _MAGIC.items() if head.startswith(magic)), "none")
    if named != "none" and named != found:
        raise BadDataError(f"{path}: is not {_NAMES[named]} data, whatever its name says")
    return found


def open_binary(path: str) -> IO[bytes]:
    """Open a file, or a member of an archive, for reading, with this project's errors."""
    try:
        if inside := split_member(path):
            return open_member(*inside)
        return open(path, "rb")  # noqa: PTH123 - with many small files a Path for each counts
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error


class FileStatus(NamedTuple):
    """The size of a file or of an archive's member, and the time of change of the file or the archive."""

    size_bytes: int
    modified_ns: int


def stat_file(path: str) -> FileStatus:
    """Size and time of a file or of a member, with this project's errors."""
    inside = split_member(path)
    try:
        status = os.stat(inside[0] if inside else path)  # noqa: PTH116
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    return FileStatus(find_member(*inside).size_bytes if inside else status.st_size, status.st_mtime_ns)


def all_blocks(path: str, compression: Compression, encoding: str | None = None) -> Iterator[bytes]:
    """A whole file in blocks, decompressed, and in UTF-8 if `encoding` names another one that it is in."""
    if compression != "none":
        blocks = decompressed_blocks(path, compression)
    else:
        blocks = file_blocks(path, 0, stat_file(path).size_bytes)
    return blocks if encoding is None else _in_utf8(blocks, path, encoding)


def _in_utf8(blocks: Iterator[bytes], path: str, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    seen = 0
    try:
        for block in chain(blocks, [b""]):
            if text := decoder.decode(block, final=not block):
                yield text.encode("utf-8")
            seen += len(block)
    except UnicodeError as error:
        raise BadDataError(f"{path}: not {encoding}, in the {BLOCK_BYTES} bytes from {seen} on: {error}") from error


def file_blocks(path: str, start: int, stop: int, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Bytes [start, stop) of a file in blocks. A file that ends before `stop` is a BadDataError."""
    with open_binary(path) as file:
        try:
            if start:
                file.seek(start)
            while start < stop:
                block = file.read(min(block_bytes, stop - start))
                if not block:
                    raise BadDataError(f"{path}: became shorter while it was in use; prepare again")
                start += len(block)
                yield block
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from error


def decompressed_blocks(
    path: str,
    compression: Compression,
    ratio_limit: int = RATIO_LIMIT,
    ratio_free_bytes: int = RATIO_FREE_BYTES,
) -> Iterator[bytes]:
    """What a compressed file holds, all its members, in blocks of at most BLOCK_BYTES.

    Raises BadDataError for a broken, cut or padded stream, and for one that grows beyond `ratio_limit` to one.
    """
    name = _NAMES[compression]
    total = 0
    with open_binary(path) as file:
        match compression:
            case "zst":
                blocks = _zstd_blocks(file)
            case "gz":
                blocks = _member_blocks(file, lambda: zlib.decompressobj(wbits=31))
            case _:
                blocks = _member_blocks(file, bz2.BZ2Decompressor)
        try:
            for block in blocks:
                total += len(block)
                if total > ratio_free_bytes and total > ratio_limit * file.tell():
                    raise BadDataError(
                        f"{path}: {name} data grows more than {ratio_limit} times; if that is meant, unpack it yourself"
                    )
                yield block
        except (zlib.error, EOFError, ValueError) as error:
            raise BadDataError(f"{path}: broken {name} data after {total} bytes: {error}") from error
        except OSError as error:
            if error.errno is not None:
                raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
            raise BadDataError(f"{path}: broken {name} data after {total} bytes: {error}") from error


def _member_blocks(file: IO[bytes], new_member: Any) -> Iterator[bytes]:
    """Concatenated gzip or bzip2 members. Both decompressors check their own checksums."""
    member = None
    data = b""
    while True:
        if not data:
            data = file.read(_INPUT_BYTES)
            if not data:
                break
        if member is None:
            data = data.lstrip(b"\0")  # gzip allows padding between and after members
            if not data:
                continue
            member = new_member()
        yield from output_of(member, data)
        data = member.unused_data
        if member.eof:
            member = None
    if member is not None:
        raise EOFError("the stream is cut")


def _zstd_blocks(file: IO[bytes]) -> Iterator[bytes]:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd") as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block
