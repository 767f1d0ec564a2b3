"""Writes the columns of a token store with their hashes: the parts of all spans, joined in one pass."""

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash

from data_prep.encode.blocks import CUT_TARGETS, CUT_TOKENS, NO_NAME, Column, marks_of, values_per_document
from data_prep.errors import BadDataError
from data_prep.pipeline.parts import Part, PartAccount
from data_prep.pipeline.store_folder import sync_file
from data_prep.rows.row_files import unsigned_type
from data_prep.tasks.data_task import DataTask
from data_prep.token_store import hash_file

FileEntry = dict[str, Any]
_COUNTED_AT_ONCE = 1 << 22


class ColumnWriter:
    """A one-dimensional .npy file whose length is known before its values. A context manager."""

    def __init__(self, path: Path, dtype: np.dtype[Any], length: int):
        self._path, self._dtype, self._length = path, dtype, length
        header = io.BytesIO()
        description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(header, description)
        self._digest = xxhash.xxh3_128(header.getvalue())
        self._written = 0
        self._file = path.open("wb")
        self._file.write(header.getvalue())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, values: np.ndarray) -> None:
        """Append values."""
        data = np.ascontiguousarray(values, dtype=self._dtype).data
        self._file.write(data)
        self._digest.update(data)
        self._written += len(values)

    def finish(self) -> FileEntry:
        """Make the file durable; returns its manifest entry."""
        assert self._written == self._length, f"{self._path}: {self._written} values, not {self._length}"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._path.stat().st_size, "xxh3_128": self._digest.hexdigest()}


class _Marks:
    """Packs one bit a token, most significant first, across blocks."""

    def __init__(self, writer: ColumnWriter):
        self._writer = writer
        self._carried = np.zeros(0, dtype=np.uint8)  # the bits of the last, unfinished byte

    def write(self, block: Mapping[str, np.ndarray]) -> None:
        if "marks" in block:
            marks = np.concatenate((self._carried, block["marks"]))
            whole = len(marks) // 8 * 8
            self._writer.write(np.packbits(marks[:whole]))
            self._carried = marks[whole:]
            return
        before = len(self._carried)
        num_bits = before + len(block["input_ids"])
        bits = np.full(num_bits // 8 + 1, 255, dtype=np.uint8)
        bits[:1] &= np.packbits(np.append(self._carried, np.ones(8 - before, dtype=np.uint8)))
        first = np.cumsum(block["lengths"], dtype=np.int64) - block["lengths"] + before
        np.bitwise_and.at(bits, first >> 3, ~(128 >> (first & 7)).astype(np.uint8))
        self._writer.write(bits[:-1])
        self._carried = np.unpackbits(bits[-1:], count=num_bits % 8)

    def flush(self) -> None:
        if len(self._carried):
            self._writer.write(np.packbits(self._carried))


def column_sizes(accounts: Sequence[PartAccount]) -> dict[str, tuple[np.dtype[Any], int]]:
    """dtype and number of values of every column over all parts, from their accounts."""
    sizes: dict[str, tuple[np.dtype[Any], int]] = {}
    for account in accounts:
        for block in account.blocks:
            for name, dtype, count in block:
                before = sizes.get(name, (np.dtype(dtype), 0))
                sizes[name] = (before[0], before[1] + count)
    return sizes


def write_content(
    folder: Path,
    parts: Sequence[Part],
    task: DataTask,
    id_type: np.dtype[Any],
    number_of: Mapping[str, int],
    kept: Sequence[np.ndarray] | None,
    least_targets: int,
) -> tuple[dict[str, FileEntry], dict[str, dict[str, str]], list[PartAccount]]:
    """Join the parts into the columns of a store.

    `number_of` gives the final number of every label or tag; the others become -1. `kept`, one bool array
    [documents] a part, leaves out the others. Documents with less than `least_targets` will have no row. Returns the
    manifest's files and columns, and the accounts of what was kept.
    """
    if kept is not None:
        sizes, accounts = _sizes_of_kept(parts, task, kept)
    else:
        accounts = [part.account for part in parts]
        sizes = column_sizes(accounts)
    columns = [column for column in task.columns if column.name in sizes]
    writers = _open_writers(folder, task, columns, id_type, sizes)
    try:
        cuts = [_Cuts(task, least_targets) for _ in parts]
        _join(_kept_blocks(parts, task.columns, number_of, kept, cuts), columns, writers)
        files = {f"{name}.npy": writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.__exit__(None, None, None)
    accounts = [
        replace(one, cut_documents=cut.documents, cut_tokens=cut.tokens, cut_targets=cut.targets)
        for one, cut in zip(accounts, cuts, strict=True)
    ]
    return files, {column.name: {"per": column.per} for column in columns}, accounts


class _Cuts:
    """The sums of what encoding cut off the documents of a part."""

    def __init__(self, task: DataTask, least_targets: int):
        self._task, self._least = task, least_targets
        self.documents = self.tokens = self.targets = 0

    def add(self, block: Mapping[str, np.ndarray]) -> None:
        """Count the cut documents of a block; those that will have no row count as dropped, not as cut."""
        if CUT_TOKENS not in block:
            return
        tokens, targets = block[CUT_TOKENS], block[CUT_TARGETS]
        self.documents += int((((tokens > 0) | (targets > 0)) & self._has_row(block)).sum())
        self.tokens += int(tokens.sum(dtype=np.int64))
        self.targets += int(targets.sum(dtype=np.int64))

    def _has_row(self, block: Mapping[str, np.ndarray]) -> np.ndarray:
        lengths, column = block["lengths"].astype(np.int64), self._task.target_column
        if column is not None:
            counts = next(block[one.lengths_name] for one in self._task.columns if one.name == column)
        elif self._task.marks_tokens:
            counts = np.add.reduceat(marks_of(block), np.cumsum(lengths) - lengths, dtype=np.int64)
        else:
            return np.ones(len(lengths), dtype=bool)  # one label a document
        enough: np.ndarray = counts >= self._least
        return enough


def _open_writers(
    folder: Path, task: DataTask, columns: Sequence[Column], id_type: np.dtype[Any],
    sizes: Mapping[str, tuple[np.dtype[Any], int]],
) -> dict[str, ColumnWriter]:  # fmt: skip
    """A file for every column of the store, in the order of the manifest."""
    tokens, documents = (sizes.get(name, (None, 0))[1] for name in ("input_ids", "lengths"))
    plan: dict[str, tuple[np.dtype[Any], int]] = {
        "input_ids": (id_type, tokens),
        "document_ends": (unsigned_type(tokens), documents),
        "document_lines": (np.dtype(np.uint32), documents),
    }
    if task.marks_tokens:
        plan["targets"] = (np.dtype(np.uint8), -(-tokens // 8))
    for column in columns:
        plan[column.name] = sizes[column.name]
        if column.per == "ragged":
            plan[column.ends_name] = (unsigned_type(sizes[column.name][1]), documents)
    return {name: ColumnWriter(folder / f"{name}.npy", *what) for name, what in plan.items()}


def _sizes_of_kept(
    parts: Sequence[Part], task: DataTask, kept: Sequence[np.ndarray]
) -> tuple[dict[str, tuple[np.dtype[Any], int]], list[PartAccount]]:
    """As `column_sizes`, of the kept documents alone, and the accounts with their counts."""
    sizes = column_sizes([part.account for part in parts])
    counts = dict.fromkeys(sizes, 0)
    remaining = []
    for part, chosen in zip(parts, kept, strict=True):
        own = dict.fromkeys(sizes, 0)
        marked = first = 0
        for block in part.blocks():
            documents = len(block["lengths"])
            left = _choose(block, chosen[first : first + documents], task.columns)
            first += documents
            for name, values in left.items():
                own[name] += len(values)
            marked += int(np.count_nonzero(marks_of(left))) if task.marks_tokens else 0
        num_documents = own.get("lengths", 0)
        targets = marked if task.marks_tokens else own.get(task.target_column or "lengths", 0)
        borders = np.cumsum([0, *(made for _, made in part.account.pieces)])
        of_pieces = np.diff(np.concatenate(([0], np.cumsum(chosen)))[borders]).tolist()
        remaining.append(
            replace(
                part.account,
                pieces=[(read, made) for (read, _), made in zip(part.account.pieces, of_pieces, strict=True)],
                num_documents=num_documents,
                num_tokens=own.get("input_ids", 0),
                num_targets=targets,
            )
        )
        for name, count in own.items():
            counts[name] += count
    return {name: (dtype, counts[name]) for name, (dtype, _) in sizes.items()}, remaining


class _Ends:
    """The ends of documents in a column, from their lengths, across blocks."""

    def __init__(self, writer: ColumnWriter):
        self._writer, self._so_far = writer, 0

    def write(self, lengths: np.ndarray) -> None:
        ends = np.cumsum(lengths, dtype=np.int64) + self._so_far
        self._so_far = int(ends[-1]) if len(ends) else self._so_far
        self._writer.write(ends)


def _join(
    blocks: Iterable[tuple[dict[str, np.ndarray], np.ndarray]],
    columns: Sequence[Column],
    writers: Mapping[str, ColumnWriter],
) -> None:
    """Write the columns of all blocks; each comes with the final numbers of its part's names."""
    marks = _Marks(writers["targets"]) if "targets" in writers else None
    document_ends = _Ends(writers["document_ends"])
    ends = {column.name: _Ends(writers[column.ends_name]) for column in columns if column.per == "ragged"}
    num_records = 0
    for block, final in blocks:
        lacking = next((column.name for column in columns if column.name not in block), None)
        if lacking is not None:
            raise BadDataError(f"data: some records have {lacking} and others do not; a store holds one kind of label")
        writers["input_ids"].write(block["input_ids"])
        document_ends.write(block["lengths"])
        writers["document_lines"].write(block["lines"])
        if marks is not None:
            marks.write(block)
        for column in columns:
            values = block[column.name]
            if column.holds == "label numbers" and len(final):
                values = np.where(values >= 0, final[values], NO_NAME)
            elif column.holds == "record numbers":
                values = values + num_records
                num_records = int(values[-1]) + 1 if len(values) else num_records
            writers[column.name].write(values)
            if column.name in ends:
                ends[column.name].write(block[column.lengths_name])
    if marks is not None:
        marks.flush()


def _kept_blocks(
    parts: Sequence[Part], of_task: Sequence[Column], number_of: Mapping[str, int],
    kept: Sequence[np.ndarray] | None, cuts: Sequence[_Cuts],
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:  # fmt: skip
    """Every block with the documents that are kept, and the final number of each of its part's names."""
    for index, part in enumerate(parts):
        final = np.array([number_of.get(name, NO_NAME) for name in part.account.names], dtype=np.int32)
        first = 0
        for block in part.blocks():
            documents = len(block["lengths"])
            chosen = None if kept is None else kept[index][first : first + documents]
            first += documents
            left = block if chosen is None or chosen.all() else _choose(block, chosen, of_task)
            cuts[index].add(left)
            yield left, final


def _choose(block: dict[str, np.ndarray], chosen: np.ndarray, of_task: Sequence[Column]) -> dict[str, np.ndarray]:
    """The documents of a block for which `chosen` (bool [documents]) is true."""
    result = {}
    for name, values in block.items():
        counts = values_per_document(block, name, of_task)
        result[name] = values[chosen if counts is None else np.repeat(chosen, counts)]
    return result


def count_id(path: Path, wanted: int) -> int:
    """How often a column of ids holds `wanted`."""
    column = np.load(path, mmap_mode="r", allow_pickle=False)
    steps = range(0, len(column), _COUNTED_AT_ONCE)
    return sum(int(np.count_nonzero(column[start : start + _COUNTED_AT_ONCE] == wanted)) for start in steps)


def find_largest_id(path: Path) -> int:
    """The largest id of a column of ids."""
    column = np.load(path, mmap_mode="r", allow_pickle=False)
    steps = range(0, len(column), _COUNTED_AT_ONCE)
    return max((int(column[start : start + _COUNTED_AT_ONCE].max()) for start in steps), default=-1)


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Manifest entries of files that are already there, made durable."""
    entries = {}
    for name in names:
        path = folder / name
        sync_file(path)
        entries[name] = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
    return entries
