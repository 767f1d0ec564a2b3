"""Writes the files of a token store: columns with their hashes."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.store_folder import sync_file
from data_prep.token_store import hash_file
from data_prep.worker import SpanResult, part_path

FileEntry = dict[str, Any]


def write_column(path: Path, dtype: np.dtype[Any], length: int, blocks: Iterable[np.ndarray]) -> FileEntry:
    """Write a one-dimensional .npy file of `length` values from consecutive blocks; returns its manifest entry."""
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(header, description)
    digest = xxhash.xxh3_128(header.getvalue())
    written = 0
    with path.open("wb") as file:
        file.write(header.getvalue())
        for block in blocks:
            data = np.ascontiguousarray(block, dtype=dtype).data
            file.write(data)
            digest.update(data)
            written += len(block)
        file.flush()
        os.fsync(file.fileno())
    assert written == length, f"{path}: {written} values, not {length}"
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def _pack_bits(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """One bit for each byte of `blocks`, most significant first, padded with zeros only at the very end."""
    carried = np.zeros(0, dtype=np.uint8)
    for block in blocks:
        marks = np.concatenate((carried, block))
        whole = len(marks) // 8 * 8
        yield np.packbits(marks[:whole])
        carried = marks[whole:]
    if len(carried):
        yield np.packbits(carried)


def _parts(parts_dir: Path, count: int, column: str, dtype: Any) -> Iterator[np.ndarray]:
    for index in range(count):
        yield np.fromfile(part_path(parts_dir, index, column), dtype=dtype)


def _ends(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    total = 0
    for block in blocks:
        ends = np.cumsum(block, dtype=np.int64) + total
        total = int(ends[-1]) if len(ends) else total
        yield ends


def write_content(
    folder: Path, parts_dir: Path, results: Sequence[SpanResult], ids: np.dtype[Any], has_labels: bool
) -> dict[str, FileEntry]:
    """Join the part files of all spans into the columns of a store; returns their manifest entries."""
    count = len(results)
    tokens = sum(result.num_tokens for result in results)
    documents = sum(result.num_documents for result in results)
    end_type = np.dtype(np.uint32 if tokens < 2**32 else np.uint64)
    entries = {
        "input_ids.npy": write_column(
            folder / "input_ids.npy", ids, tokens, _parts(parts_dir, count, "input_ids", ids)
        ),
        "document_ends.npy": write_column(
            folder / "document_ends.npy", end_type, documents, _ends(_parts(parts_dir, count, "lengths", np.uint32))
        ),
        "document_lines.npy": write_column(
            folder / "document_lines.npy",
            np.dtype(np.uint32),
            documents,
            _parts(parts_dir, count, "lines", np.uint32),
        ),
    }
    if has_labels:
        entries["labels.npy"] = write_column(
            folder / "labels.npy", np.dtype(np.int32), documents, _parts(parts_dir, count, "labels", np.int32)
        )
    else:
        bits = _pack_bits(_parts(parts_dir, count, "marks", np.uint8))
        entries["targets.npy"] = write_column(folder / "targets.npy", np.dtype(np.uint8), -(-tokens // 8), bits)
    return entries


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Manifest entries of files that are already there, made durable."""
    entries = {}
    for name in names:
        path = folder / name
        sync_file(path)
        entries[name] = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
    return entries
