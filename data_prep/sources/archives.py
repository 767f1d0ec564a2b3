"""Members of zip and tar archives as files, read where they lie: ``data.zip!inner/train.jsonl``.

A member is one stream from its first byte on; nothing is unpacked to disk. Sizes, checksums and places come from the
archive's own index, which is read once a process, so that an archive may have many members.
"""

import bz2
import io
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from data_prep.errors import BadDataError, DataConfigError, MissingInputError, StorageError
from data_prep.sources.inflate import BLOCK_BYTES, RATIO_FREE_BYTES, RATIO_LIMIT, output_of

ENDINGS = (".zip", ".tar")
_MEMBER = re.compile(r"(.*?\.(?:zip|tar))!(.*)", re.IGNORECASE | re.DOTALL)
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 1  # bit of a zip member's flags
_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflate", zipfile.ZIP_BZIP2: "bzip2"}


@dataclass(frozen=True)
class Member:
    """A file in an archive. `start`: of its local header in a zip, of its content in a tar, which has no checksums."""

    start: int
    stored_bytes: int
    size_bytes: int
    method: str  # stored, deflate or bzip2; else why it cannot be read
    crc: int | None


def is_archive(path: str) -> bool:
    """True if the name of a file is that of an archive whose members can be read."""
    return path.lower().endswith(ENDINGS)


def split_member(path: str) -> tuple[str, str] | None:
    """The archive and the member that ``archive!member`` names; None for any other path, and for a file so called."""
    match = _MEMBER.fullmatch(path)
    return None if match is None or os.path.lexists(path) else (match[1], match[2])


def member_names(archive: str) -> list[str]:
    """The names of all files in an archive, sorted, without those that hold a Mac's own notes. Raises BadDataError."""
    return sorted(name for name in _index_of(archive) if not name.startswith("__MACOSX/"))


def matching_names(archive: str, inner: str) -> list[str]:
    """The members that `inner` names: one member, a folder's own files, or a glob as for files (``**/*.txt``)."""
    names = member_names(archive)
    if inner in names:
        return [inner]
    folder = re.compile(re.escape(inner.rstrip("/")) + "/[^/]+")
    found = [name for name in names if folder.fullmatch(name)]
    return found or [name for name in names if _glob(inner).fullmatch(name)]


def _glob(pattern: str) -> re.Pattern[str]:
    """A glob as `Path.glob` has it: ** is any number of folders, the others stay in one. Raises DataConfigError."""
    translated, place = "", 0
    for match in re.finditer(r"\*\*/|\*+|\?|\[!?[^\]]+\]", pattern):
        translated += re.escape(pattern[place : match.start()])
        mark, place = match[0], match.end()
        plain = {"**/": "(?:[^/]+/)*", "?": "[^/]"}.get(mark, "[^/]*" if mark[0] == "*" else "")
        translated += plain or "[" + mark[1:-1].replace("\\", "\\\\").replace("!", "^", mark[1] == "!") + "]"
    try:
        return re.compile(translated + re.escape(pattern[place:]), re.DOTALL)
    except re.error as error:
        raise DataConfigError(f"the path inside an archive, {pattern!r}, is no pattern: {error.msg}") from None


def find_member(archive: str, name: str) -> Member:
    """The entry of a member in the archive's index. Raises MissingInputError, BadDataError, StorageError."""
    member = _index_of(archive).get(name)
    if member is None:
        raise MissingInputError(f"{archive}!{name}: the archive has no such member")
    if member.method not in _METHODS.values():
        raise BadDataError(f"{archive}!{name}: {member.method}; unpack the archive yourself")
    return member


def open_member(archive: str, name: str) -> IO[bytes]:
    """A member as a file that is read from its beginning on and cannot be sought in."""
    size = find_member(archive, name).size_bytes
    return io.BufferedReader(_MemberStream(archive, name), max(1, min(size, BLOCK_BYTES)))


def _index_of(archive: str) -> dict[str, Member]:
    try:
        status = os.stat(archive)  # noqa: PTH116
        return _read_index(archive, status.st_size, status.st_mtime_ns)
    except FileNotFoundError:
        raise MissingInputError(f"{archive}: no such file") from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise BadDataError(f"{archive}: broken, or no archive, whatever its name says: {error}") from error
    except OSError as error:
        raise StorageError(f"{archive}: cannot be read: {error.strerror}") from error


@lru_cache(maxsize=8)
def _read_index(archive: str, size: int, _modified_ns: int) -> dict[str, Member]:
    """The files of an archive of `size` bytes. Raises BadDataError for one that may be a bomb."""
    is_zip = archive.lower().endswith(".zip")
    members = _zip_members(archive) if is_zip else _tar_members(archive)
    index = dict(members)
    if len(index) != len(members):
        names = sorted(name for name, _ in members)
        raise BadDataError(f"{archive}: two members are named {next(a for a, b in pairwise(names) if a == b)!r}")
    ordered = sorted(index.values(), key=lambda member: member.start)
    least = _LOCAL_HEADER_BYTES if is_zip else 0
    if any(one.start + least + one.stored_bytes > other.start for one, other in pairwise(ordered)):
        raise BadDataError(f"{archive}: members overlap, as only those of bombs do")
    total = sum(member.size_bytes for member in ordered)
    if total > RATIO_FREE_BYTES and total > RATIO_LIMIT * size:
        raise BadDataError(
            f"{archive}: its members grow to more than {RATIO_LIMIT} times the archive; if that is meant, unpack it"
            " yourself"
        )
    return index


def _zip_members(archive: str) -> list[tuple[str, Member]]:
    with zipfile.ZipFile(archive) as opened:
        infos = [info for info in opened.infolist() if not info.is_dir()]
    found = []
    for info in infos:
        method = _METHODS.get(info.compress_type, f"compressed by method {info.compress_type}, which is not read")
        if info.flag_bits & _ENCRYPTED:
            method = "encrypted"
        sizes = info.compress_size, info.file_size
        found.append((info.filename, Member(info.header_offset, *sizes, method, info.CRC)))
    return found


def _tar_members(archive: str) -> list[tuple[str, Member]]:
    """The plain files of a tar that is not compressed. A later one of the same name counts, as for tar itself."""
    with tarfile.open(archive, "r:") as opened:
        infos = {info.name.removeprefix("./"): info for info in opened if info.isreg()}
    return [
        (name, Member(info.offset_data, info.size, info.size, "sparse" if info.issparse() else "stored", None))
        for name, info in infos.items()
    ]


class _MemberStream(io.RawIOBase):
    """The content of a member, checked against the size and checksum that the index has."""

    def __init__(self, archive: str, name: str):
        self._member = find_member(archive, name)
        self._where = f"{archive}!{name}"
        self._file = open(archive, "rb")  # noqa: PTH123, SIM115
        self._seek_content(archive.lower().endswith(".zip"))
        self._blocks = self._content()
        self._rest = memoryview(b"")
        self._given = 0

    def _seek_content(self, is_zip: bool) -> None:
        """Go to the first byte of the content; a zip's local header says how much of it comes before."""
        self._file.seek(self._member.start)
        if is_zip:
            header = self._file.read(_LOCAL_HEADER_BYTES)
            if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
                raise BadDataError(f"{self._where}: broken: the archive's index and content do not agree")
            skipped = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            self._file.seek(skipped, os.SEEK_CUR)

    def _stored(self) -> Iterator[bytes]:
        left = self._member.stored_bytes
        while left:
            block = self._file.read(min(left, BLOCK_BYTES // 32))
            if not block:
                raise BadDataError(f"{self._where}: the archive is cut off")
            left -= len(block)
            yield block

    def _inflated(self) -> Iterator[bytes]:
        if self._member.method == "stored":
            yield from self._stored()
            return
        stream: Any = bz2.BZ2Decompressor() if self._member.method == "bzip2" else zlib.decompressobj(wbits=-15)
        for data in self._stored():
            if not stream.eof:
                yield from output_of(stream, data)

    def _content(self) -> Iterator[bytes]:
        size = crc = 0
        try:
            for block in self._inflated():
                size += len(block)
                crc = zlib.crc32(block, crc)
                if size > self._member.size_bytes:
                    break
                yield block
        except (zlib.error, OSError, ValueError, EOFError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise BadDataError(f"{self._where}: broken after {size} bytes: {error}") from error
        if size != self._member.size_bytes or self._member.crc not in (None, crc):
            raise BadDataError(f"{self._where}: broken: size or checksum is not what the archive says")

    def readable(self) -> bool:
        """True, as for every file that is read."""
        return True

    def tell(self) -> int:
        """How many bytes were given out."""
        return self._given

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with what comes next; 0 at the end."""
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(self._rest), len(buffer))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self._given += count
        return count

    def close(self) -> None:
        """Close the archive."""
        if not self.closed:
            self._file.close()
        super().close()


def folder_of(path: str) -> str:
    """The name of the folder in which a file, or a member of an archive, lies; of a member at the top, none."""
    inside = split_member(path)
    return Path(inside[1]).parent.name if inside else Path(path).absolute().parent.name
