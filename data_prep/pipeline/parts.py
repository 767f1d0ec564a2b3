"""What workers leave behind: the blocks of some spans of input in one file, with a sealed account beside it.

A part exists when its account does: both are written under another name first. Whatever killed a
preparation, the parts that are there are whole, and the next preparation makes only the others.
"""

import json
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import xxhash

from data_prep.encode.blocks import Block, Names, add_counts
from data_prep.errors import Finding, StorageError

_BITS = "|b1"  # the type of columns of zeros and ones, which take one bit a value


@dataclass(frozen=True)
class PartAccount:
    """What the spans of one part came to for one split; counts are exact.

    `pieces`: for each span the records read and the documents made. `dropped`: records that cannot be used, by reason;
    `unusable` has the first of them. `blocks` lists (column, dtype, values) of each block.
    """

    pieces: list[tuple[int, int]] = field(default_factory=list)
    num_other_split: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    num_answers: int = 0
    num_stops: int = 0
    num_truncated: int = 0
    cut_documents: int = 0  # documents that encoding cut, of those that a store keeps, with what it cut off
    cut_tokens: int = 0
    cut_targets: int = 0
    num_extra: int = 0
    num_moved: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    unusable: list[Finding] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    first_seen: list[str] = field(default_factory=list)
    blocks: list[list[tuple[str, str, int]]] = field(default_factory=list)
    hash: str = ""

    @property
    def num_read(self) -> int:
        return sum(read for read, _ in self.pieces)


def _num_bytes(dtype: str, count: int) -> int:
    return -(-count // 8) if dtype == _BITS else np.dtype(dtype).itemsize * count


def part_path(folder: Path, name: str) -> Path:
    """The file of part `name`; its account stands beside it with the ending ``.json``."""
    return folder / f"{name}.part"


class PartWriter:
    """Collects the blocks of one part. `close` seals the part; a part that is not closed leaves nothing."""

    def __init__(self, folder: Path, name: str, names: Names):
        self._final = part_path(folder, name)
        # Two machines may be at the same span: each writes its own file, and either may win.
        self._temporary = folder / f".{name}.{uuid.uuid4().hex}.partial"
        self._file = self._temporary.open("wb")
        self._digest = xxhash.xxh3_128()
        self._account = PartAccount()
        self._names = names

    def write(self, block: Block) -> None:
        """Append a block and count it."""
        shapes = []
        for name, column in block.columns.items():
            stored = np.packbits(column) if name == "marks" else np.ascontiguousarray(column)
            self._file.write(stored.data)
            self._digest.update(stored.data)
            shapes.append((name, _BITS if name == "marks" else column.dtype.str, len(column)))
        account = self._account
        self._account = replace(
            account,
            num_documents=account.num_documents + block.num_documents,
            num_tokens=account.num_tokens + block.num_tokens,
            num_targets=account.num_targets + block.num_targets,
            num_answers=account.num_answers + block.num_answers,
            num_stops=account.num_stops + block.num_stops,
            num_truncated=account.num_truncated + block.num_truncated,
            num_extra=account.num_extra + block.num_extra,
            num_moved=account.num_moved + block.num_moved,
            notes=add_counts((account.notes, block.notes)),
        )
        self._account.blocks.append(shapes)

    def close(
        self, read: list[int], made: list[int], num_taken: int, dropped: dict[str, int], unusable: list[Finding]
    ) -> PartAccount:
        """Seal the part: records read and documents made of each span, the records taken into this split, and those
        of them that were left out."""
        self._file.close()
        account = replace(
            self._account,
            pieces=list(zip(read, made, strict=True)),
            num_other_split=sum(read) - num_taken,
            dropped=dropped,
            unusable=unusable,
            names=list(self._names.index),
            first_seen=self._names.first_seen,
            hash=self._digest.hexdigest(),
        )
        self._temporary.replace(self._final)
        self._temporary.write_text(json.dumps(vars(account)), encoding="utf-8")
        self._temporary.replace(self._final.with_suffix(".json"))
        return account

    def abandon(self) -> None:
        """Leave nothing."""
        with suppress(OSError):  # what is still to be written may not fit on the disk
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def read_account(folder: Path, name: str) -> PartAccount | None:
    """The account of a sealed part, or None if there is none, or its file has another size."""
    path = part_path(folder, name)
    try:
        values = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        account = PartAccount(**{**values, "unusable": [Finding(*one) for one in values.get("unusable", ())]})
        size = path.stat().st_size
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    wanted = sum(_num_bytes(dtype, count) for block in account.blocks for _, dtype, count in block)
    return account if size == wanted else None


class Part:
    """A sealed part. Raises StorageError if it is not there."""

    def __init__(self, folder: Path, name: str):
        self.path = part_path(folder, name)
        account = read_account(folder, name)
        if account is None:
            raise StorageError(f"{self.path}: missing; another process removed it; prepare again")
        self.account = account

    def blocks(self) -> Iterator[dict[str, np.ndarray]]:
        """The columns of every block. StorageError if the file is not what its account sealed."""
        digest = xxhash.xxh3_128()
        with self.path.open("rb") as file:
            for shapes in self.account.blocks:
                columns: dict[str, np.ndarray] = {}
                for name, dtype, count in shapes:
                    data = file.read(_num_bytes(dtype, count))
                    digest.update(data)
                    stored = np.frombuffer(data, dtype=np.uint8 if dtype == _BITS else dtype)
                    columns[name] = np.unpackbits(stored, count=count) if dtype == _BITS else stored
                yield columns
        if digest.hexdigest() != self.account.hash:
            self.path.with_suffix(".json").unlink(missing_ok=True)
            raise StorageError(
                f"{self.path}: damaged between writing and reading; prepare again, it alone is made anew"
            )
