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

from data_prep.encode.blocks import RAGGED_LENGTHS, TASK_COLUMNS, marks_of
from data_prep.pipeline.parts import Part, PartAccount
from data_prep.pipeline.store_folder import sync_file
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


def write_column(path: Path, dtype: np.dtype[Any], length: int, blocks: Iterable[np.ndarray]) -> FileEntry:
    """Write a one-dimensional .npy file of `length` values from consecutive blocks; returns its manifest entry."""
    with ColumnWriter(path, dtype, length) as writer:
        for block in blocks:
            writer.write(block)
        return writer.finish()


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
    id_type: np.dtype[Any],
    number_of: Mapping[str, int],
    kept: Sequence[np.ndarray] | None,
) -> tuple[dict[str, FileEntry], dict[str, dict[str, str]], list[PartAccount]]:
    """Join the parts into the columns of a store.

    `number_of` gives the final number of every label or tag. `kept`, one bool array [documents] a part,
    leaves out the others. Returns the manifest's files and columns, and the accounts of what was kept.
    """
    accounts = [part.account for part in parts]
    if kept is not None:
        sizes, accounts_kept = _sizes_of_kept(parts, kept)
    else:
        sizes, accounts_kept = column_sizes(accounts), list(accounts)
    tokens, documents = (sizes.get(name, (None, 0))[1] for name in ("input_ids", "lengths"))
    columns = {name: per for name, per in TASK_COLUMNS.items() if name in sizes}
    plan: dict[str, tuple[np.dtype[Any], int]] = {
        "input_ids": (id_type, tokens),
        "document_ends": (np.dtype(np.uint32 if tokens < 2**32 else np.uint64), documents),
        "document_lines": (np.dtype(np.uint32), documents),
        "targets": (np.dtype(np.uint8), -(-tokens // 8)),
    }
    for name, per in columns.items():
        plan[name] = sizes[name]
        if per == "ragged":
            plan[f"{name}_ends"] = (np.dtype(np.uint32 if sizes[name][1] < 2**32 else np.uint64), documents)
    if set(columns) & {"labels", "label_sets", "scores", "answer_spans", "target_ids"}:
        del plan["targets"]  # what is trained is the document itself
    writers = {name: ColumnWriter(folder / f"{name}.npy", *what) for name, what in plan.items()}
    try:
        _join(parts, writers, number_of, kept)
        files = {f"{name}.npy": writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.__exit__(None, None, None)
    return files, {name: {"per": per} for name, per in columns.items()}, accounts_kept


def _sizes_of_kept(
    parts: Sequence[Part], kept: Sequence[np.ndarray]
) -> tuple[dict[str, tuple[np.dtype[Any], int]], list[PartAccount]]:
    """As `column_sizes`, of the kept documents alone, and the accounts with their counts."""
    sizes = column_sizes([part.account for part in parts])
    counts = dict.fromkeys(sizes, 0)
    remaining = []
    for index, part in enumerate(parts):
        own = dict.fromkeys(sizes, 0)
        targets = first = 0
        for block in part.blocks():
            documents = len(block["lengths"])
            chosen = _choose(block, kept[index][first : first + documents])
            first += documents
            for name, values in chosen.items():
                own[name] += len(values)
            targets += int(np.count_nonzero(marks_of(chosen)))
        if not targets:
            targets = own["target_ids"] if "target_ids" in own else own.get("lengths", 0)
        pieces = part.account.pieces
        borders = np.cumsum([0, *(made for _, made in pieces)])
        left = np.diff(np.concatenate(([0], np.cumsum(kept[index])))[borders]).tolist()
        remaining.append(
            replace(
                part.account,
                pieces=[(read, made) for (read, _), made in zip(pieces, left, strict=True)],
                num_documents=own.get("lengths", 0),
                num_tokens=own.get("input_ids", 0),
                num_targets=targets,
            )
        )
        for name, count in own.items():
            counts[name] += count
    return {name: (dtype, counts[name]) for name, (dtype, _) in sizes.items()}, remaining


def _join(
    parts: Sequence[Part], writers: Mapping[str, ColumnWriter],
    number_of: Mapping[str, int], kept: Sequence[np.ndarray] | None,
) -> None:  # fmt: skip
    marks = _Marks(writers["targets"]) if "targets" in writers else None
    ends = dict.fromkeys(writers, 0)
    questions = 0
    for block, final in _kept_blocks(parts, number_of, kept):
        if marks is not None:
            marks.write(block)
        for name, values in block.items():
            if name in ("lengths", "lines") or name.endswith(RAGGED_LENGTHS):
                target = {"lengths": "document_ends", "lines": "document_lines"}.get(
                    name, f"{name.removesuffix(RAGGED_LENGTHS)}_ends"
                )
                if name == "lines":
                    writers[target].write(values)
                    continue
                so_far = np.cumsum(values, dtype=np.int64) + ends[target]
                ends[target] = int(so_far[-1]) if len(so_far) else ends[target]
                writers[target].write(so_far)
            elif name in ("labels", "tags", "label_sets"):
                writers[name].write(np.where(values >= 0, final[values], -1) if len(final) else values)
            elif name == "questions":
                writers[name].write(values + questions)
                questions += int(values[-1]) + 1 if len(values) else 0
            elif name in writers:
                writers[name].write(values)
    if marks is not None:
        marks.flush()


def _kept_blocks(
    parts: Sequence[Part], number_of: Mapping[str, int], kept: Sequence[np.ndarray] | None
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Every block with the documents that are kept, and the final number of each of its part's names."""
    for index, part in enumerate(parts):
        final = np.array([number_of[name] for name in part.account.names], dtype=np.int32)
        first = 0
        for block in part.blocks():
            documents = len(block["lengths"])
            chosen = None if kept is None else kept[index][first : first + documents]
            first += documents
            yield (block if chosen is None or chosen.all() else _choose(block, chosen)), final


def _choose(block: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, np.ndarray]:
    """The documents of a block for which `chosen` is true."""
    of_tokens = np.repeat(chosen, block["lengths"])
    result = {}
    for name, values in block.items():
        if f"{name}{RAGGED_LENGTHS}" in block:
            result[name] = values[np.repeat(chosen, block[f"{name}{RAGGED_LENGTHS}"])]
        elif name in ("input_ids", "marks", "tags"):
            result[name] = values[of_tokens]
        else:
            result[name] = values[chosen]
    return result


def count_id(path: Path, wanted: int) -> int:
    """How often a column of ids holds `wanted`."""
    column = np.load(path, mmap_mode="r", allow_pickle=False)
    steps = range(0, len(column), _COUNTED_AT_ONCE)
    return sum(int(np.count_nonzero(column[start : start + _COUNTED_AT_ONCE] == wanted)) for start in steps)


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Manifest entries of files that are already there, made durable."""
    entries = {}
    for name in names:
        path = folder / name
        sync_file(path)
        entries[name] = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
    return entries
