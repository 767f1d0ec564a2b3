"""Opens the zip archives that `torch.save` writes, as far as needed to read tensors from them by byte range.

Only what torch itself writes is taken: stored members under one folder, none twice, none on top of
another, no other names. The pickle inside is described by restricted_pickle.py in a process of its own.
"""

import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import engine.deepspeed_import.restricted_pickle as restricted_pickle
from engine.deepspeed_import.stored_tensors import Storage, StoredTensor
from engine.errors import DataError, RefusedForSecurityError
from engine.tensor_files.reader import opened, read_into

_CHILD = Path(restricted_pickle.__file__)
_WALL_LIMIT_SECONDS = 120
_MAX_DIRECTORY_BYTES = 32 << 20
_MEMBER = re.compile(
    r"(?P<root>[^/]+)/(?P<name>data\.pkl|data/\w+|byteorder|version|\.format_version|\.storage_alignment|"
    r"\.data/serialization_id)"
)


class Opaque:
    """Something in a pickle that was not looked at."""


@dataclass(frozen=True)
class TorchFile:
    """What was asked for of a file. `root` is the name that the archive has for itself; torch takes it from the file's.

    `values` holds, for each key that is there, plain dictionaries with texts as keys, lists, texts,
    numbers, None, StoredTensor and Opaque.
    """

    path: Path
    root: str
    values: dict[str, Any]


def read_torch_file(path: Path, keys: tuple[str, ...]) -> TorchFile:
    """What a dictionary saved with `torch.save` has under `keys`; nothing of it is run, no tensor is read.

    Raises DataError for a damaged or truncated file and one that is not laid out as torch does, and
    RefusedForSecurityError, which names the file, for one that would run code or use up the machine.
    """
    with opened(path) as descriptor:
        root, members = _members(descriptor, path)
        pickled = members.get("data.pkl")
        if pickled is None:
            raise DataError(f"{path}: holds no data.pkl: not written by torch.save")
        size = pickled.end - pickled.begin
        if size > restricted_pickle.MAX_PICKLE_BYTES:
            raise RefusedForSecurityError(
                f"{path}: its pickle is {size} bytes long; at most {restricted_pickle.MAX_PICKLE_BYTES} are read"
            )
        data = _read(descriptor, size, pickled.begin, path)
        order = members.get("byteorder")
        if order is not None and _read(descriptor, order.end - order.begin, order.begin, path) != b"little":
            raise DataError(f"{path}: written on a machine of another byte order")
    if pickled.crc32 is not None and zlib.crc32(data) != pickled.crc32:
        raise DataError(f"{path}: damaged: its pickle is not what was written")
    if data.startswith(b"PK\x03\x04"):
        raise RefusedForSecurityError(f"{path}: a zip archive stands where its pickle should be")
    answer = _describe(data, keys, path)
    return TorchFile(path, root, {key: _value(value, path, members) for key, value in answer.items()})


def _describe(data: bytes, keys: tuple[str, ...], path: Path) -> dict[str, Any]:
    """Ask the child; it gets the pickle and the keys, and no more environment than it needs to start."""
    environment = {key: value for key, value in os.environ.items() if key in ("PATH", "LD_LIBRARY_PATH")}
    command = [sys.executable, "-I", "-S", str(_CHILD), *keys]
    with tempfile.TemporaryFile() as request, tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as complaint:
        request.write(data)
        request.seek(0)
        try:
            code = subprocess.run(
                command, stdin=request, stdout=answer, stderr=complaint, env=environment, check=False,
                timeout=_WALL_LIMIT_SECONDS,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RefusedForSecurityError(f"{path}: its pickle takes more than {_WALL_LIMIT_SECONDS} s") from None
        answer.seek(0)
        complaint.seek(0)
        if code == restricted_pickle.BROKE_OUT:
            event = complaint.read(100).decode("ascii", "replace").strip()
            raise RefusedForSecurityError(f"{path}: its pickle tries to act on this machine ({event})")
        if code != 0:
            why = f"signal {-code}" if code < 0 else complaint.read().decode("utf-8", "replace").strip()[-200:]
            raise RefusedForSecurityError(f"{path}: its pickle uses up time or memory, or breaks Python ({why})")
        found = json.loads(answer.read())
    if "refused" in found:
        raise RefusedForSecurityError(f"{path}: {found['refused']}")
    if "damaged" in found:
        raise DataError(f"{path}: {found['damaged']}")
    values: dict[str, Any] = found["values"]
    return values


def _value(value: Any, path: Path, members: dict[str, Storage]) -> Any:
    if isinstance(value, list):
        return [_value(item, path, members) for item in value]
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {key: _value(item, path, members) for key, item in value["dict"].items()}
    if "tensor" in value:
        return _tensor(value["tensor"], path, members)
    return Opaque()


def _tensor(described: list[Any], path: Path, members: dict[str, Storage]) -> StoredTensor:
    name, key, storage_count, offset, shape, contiguous = described
    dtype: torch.dtype = getattr(torch, name)
    member = members.get(f"data/{key}")
    if member is None:
        raise DataError(f"{path}: a tensor lies in data/{key[:50]!a}, which is not there")
    if storage_count * dtype.itemsize != member.end - member.begin:
        raise DataError(
            f"{path}: data/{key} should be {storage_count * dtype.itemsize} bytes long, "
            f"but it is {member.end - member.begin}"
        )
    tensor = StoredTensor(member, dtype, tuple(shape), member.begin + offset * dtype.itemsize)
    if not contiguous:
        raise DataError(f"{path}: a tensor in data/{key} is not contiguous")
    if offset + tensor.count > storage_count:
        raise DataError(f"{path}: a tensor in data/{key} reaches beyond its end")
    return tensor


def _members(descriptor: int, path: Path) -> tuple[str, dict[str, Storage]]:
    """The archive's own name, and where its members' bytes lie."""
    size = os.fstat(descriptor).st_size
    begin = _read(descriptor, min(4, size), 0, path)
    if begin != b"PK\x03\x04":
        if begin[:1] == b"\x80":
            raise RefusedForSecurityError(
                f"{path}: a bare pickle, as torch before 1.6 wrote it, is not read; save it again with a newer torch"
            )
        raise DataError(f"{path}: not written by torch.save ({size} bytes)")
    directory_begin, directory_end, count = _directory(descriptor, size, path)
    directory = _read(descriptor, directory_end - directory_begin, directory_begin, path)
    roots: set[str] = set()
    members: dict[str, Storage] = {}
    position = 0
    for _ in range(count):
        full_name, local, length, crc32, position = _entry(directory, position, path)
        if (match := _MEMBER.fullmatch(full_name)) is None:
            raise RefusedForSecurityError(f"{path}: holds {full_name[:100]!a}, which torch.save does not write")
        if match["name"] in members:
            raise RefusedForSecurityError(f"{path}: holds {full_name!a} twice")
        roots.add(match["root"])
        members[match["name"]] = _place(descriptor, full_name, local, length, crc32, path)
    if position != len(directory) or len(roots) != 1:
        raise DataError(f"{path}: its list of members is damaged")
    previous = 0
    for name, member in sorted(members.items(), key=lambda item: item[1].begin):
        if member.begin < previous or member.end > directory_begin:
            raise RefusedForSecurityError(f"{path}: {name} lies on top of something else in the file")
        previous = member.end
    return roots.pop(), members


def _directory(descriptor: int, size: int, path: Path) -> tuple[int, int, int]:
    """Begin, end and number of entries of the zip directory, which must stand at the very end."""
    damaged = DataError(f"{path}: truncated, or not written by torch.save: no zip directory at its end")
    if size < 42 + 22:
        raise damaged
    tail = _read(descriptor, 42, size - 42, path)
    signature, *disks, count, length, begin, comment = struct.unpack("<4s4H2LH", tail[20:])
    if signature != b"PK\x05\x06" or comment:
        raise damaged
    end = size - 22
    signature, *_, record, _ = struct.unpack("<4sLQL", tail[:20])
    if signature == b"PK\x06\x07":
        if record + 56 != size - 42:
            raise damaged
        fields = struct.unpack("<4sQ2H2L4Q", _read(descriptor, 56, record, path))
        if fields[0] != b"PK\x06\x06":
            raise damaged
        count, length, begin, end = *fields[7:], record
    elif any(disks[:2]):
        raise damaged
    if begin + length != end or length > _MAX_DIRECTORY_BYTES:
        raise damaged
    return begin, end, count


def _entry(directory: bytes, position: int, path: Path) -> tuple[str, int, int, int, int]:
    """An entry's name, where its member begins, how long that is, its CRC-32, and where the next entry begins."""
    try:
        (
            signature,
            *_,
            flags,
            method,
            _,
            _,
            crc32,
            packed,
            length,
            name_length,
            extra_length,
            comment,
            _,
            _,
            _,
            local,
        ) = struct.unpack_from("<4s6H3L5H2L", directory, position)
        name = directory[position + 46 : position + 46 + name_length].decode("utf-8")
        extra = directory[position + 46 + name_length : position + 46 + name_length + extra_length]
        packed, length, local = _wide(extra, [length, packed, local])
    except (struct.error, UnicodeDecodeError):
        raise DataError(f"{path}: its list of members is damaged") from None
    if signature != b"PK\x01\x02":
        raise DataError(f"{path}: its list of members is damaged")
    if method != 0 or flags & 1 or packed != length:
        raise DataError(f"{path}: {name[:100]!a} is compressed or encrypted, which torch.save does not do")
    return name, local, length, crc32, position + 46 + name_length + extra_length + comment


def _wide(extra: bytes, values: list[int]) -> tuple[int, int, int]:
    """Packed size, size and place; those that do not fit into four bytes stand in an extra field, in this order."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            place = position + 4
            for index, value in enumerate(values):
                if value == 0xFFFFFFFF:
                    (values[index],) = struct.unpack_from("<Q", extra, place)
                    place += 8
            break
        position += 4 + length
    length, packed, local = values
    return packed, length, local


def _place(descriptor: int, name: str, local: int, length: int, crc32: int, path: Path) -> Storage:
    """Where the bytes of a member lie; its own header must name it as the directory does."""
    header = _read(descriptor, 30, local, path)
    signature, _, _, method, *_, name_length, extra_length = struct.unpack("<4s5H3L2H", header)
    if signature != b"PK\x03\x04" or method != 0 or name_length != len(name.encode()):
        raise DataError(f"{path}: {name!a} is not where the list of members says")
    if _read(descriptor, name_length, local + 30, path) != name.encode():
        raise RefusedForSecurityError(f"{path}: {name!a} has two names")
    begin = local + 30 + name_length + extra_length
    # torch can be told to leave checksums out; it writes 0 then.
    return Storage(path, begin, begin + length, crc32 or None)


def _read(descriptor: int, count: int, offset: int, path: Path) -> bytes:
    data = bytearray(count)
    read_into(descriptor, memoryview(data), offset, path)
    return bytes(data)
