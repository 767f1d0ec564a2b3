"""Writes the files of a token store: columns with their hashes, and the rows of one length with the ledger."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.config import Overlong
from data_prep.errors import BadDataError
from data_prep.pack import Segments, cut_segments, pack_rows
from data_prep.store_folder import sync_file
from data_prep.token_store import ROW_COLUMNS, TokenStore, hash_file
from data_prep.worker import SpanResult, overlong_message, part_path

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


def write_rows(store: TokenStore, row_tokens: int, overlong: Overlong) -> dict[str, Any]:
    """Arrange the documents of `store` into rows, write them into its folder, and account for every record.

    Returns the manifest keys row_tokens, num_rows, num_segments, ledger and the entries of the files.
    BadDataError names the first record that is longer than a row when `overlong` is ``error``.
    """
    lengths = store.document_lengths
    segments = cut_segments(lengths, row_tokens, overlong)
    if overlong == "error" and len(segments.overlong):
        first = int(segments.overlong[0])
        raise BadDataError(overlong_message(store.locate(first), int(lengths[first]), row_tokens))
    targets = _segment_targets(store, segments, lengths)
    # A piece cut off before its first target teaches nothing; `split` promises every token, so there it stays.
    useless = np.zeros(len(targets), dtype=bool) if overlong == "split" else targets == 0
    ledger = _ledger(store, segments, lengths, targets, useless, row_tokens, overlong)
    documents, starts, sizes = (column[~useless] for column in (segments.documents, segments.starts, segments.lengths))
    targets = targets[~useless]
    if store.label_names:
        order = np.arange(len(documents), dtype=np.int64)
        ends = order + 1
    else:
        order, ends = pack_rows(sizes, row_tokens)
    first_of_row = np.concatenate(([0], ends[:-1])) if len(ends) else ends
    row_targets = np.add.reduceat(targets[order], first_of_row) if len(ends) else ends
    columns = (documents[order], starts[order], sizes[order], ends, row_targets)
    entries = {}
    for name, column in zip(ROW_COLUMNS, columns, strict=True):
        file_name = f"rows_{name}.npy"
        entries[file_name] = write_column(store.path / file_name, np.dtype(np.int64), len(column), [column])
    padding = None if store.label_names else len(ends) * row_tokens - int(sizes.sum())
    ledger["total"] |= {"rows": len(ends), "padding_tokens": padding}
    return {
        "row_tokens": row_tokens,
        "overlong": overlong,
        "num_rows": len(ends),
        "num_segments": len(documents),
        "ledger": ledger,
        "files": entries,
    }


def _segment_targets(store: TokenStore, segments: Segments, lengths: np.ndarray) -> np.ndarray:
    """int64 [S]: targets of every segment, its first token left out."""
    targets: np.ndarray = store.document_targets()[segments.documents]
    if not store.label_names:
        for index in np.flatnonzero(segments.lengths < lengths[segments.documents]).tolist():
            start, size = int(segments.starts[index]), int(segments.lengths[index])
            marks = store.targets(int(segments.documents[index]), start, start + size)
            targets[index] = int(marks[1:].sum())
    return targets


def _ledger(
    store: TokenStore, segments: Segments, lengths: np.ndarray, targets: np.ndarray, useless: np.ndarray,
    row_tokens: int, overlong: Overlong,
) -> dict[str, Any]:  # fmt: skip
    """Exact account per source and in total; every identity it promises is asserted here."""
    document_targets = store.document_targets()
    placed = np.zeros(len(lengths), dtype=np.int64)
    placed_targets = np.zeros(len(lengths), dtype=np.int64)
    np.add.at(placed, segments.documents[~useless], segments.lengths[~useless])
    np.add.at(placed_targets, segments.documents[~useless], targets[~useless])
    long = lengths > row_tokens
    sources = []
    for source in store.manifest["sources"]:
        chosen = slice(source["first_document"], source["first_document"] + source["num_documents"])
        long_here, in_rows = long[chosen], placed[chosen] > 0
        dropped = {
            "overlong": int(np.sum(long_here & ~in_rows)) if overlong == "drop" else 0,
            "no_targets_left": int(np.sum(long_here & ~in_rows)) if overlong != "drop" else 0,
        }
        cut = int(np.sum(long_here & in_rows))
        account = {
            "path": source["path"],
            "records_read": source["records_read"],
            "records_of_other_split": source["records_of_other_split"],
            "records": source["num_documents"],
            "kept": int(np.sum(~long_here)) - source["records_truncated"],
            "split": cut if overlong == "split" else 0,
            "truncated": (cut if overlong == "truncate" else 0) + source["records_truncated"],
            "dropped": dropped,
            "tokens": int(lengths[chosen].sum()),
            "tokens_in_rows": int(placed[chosen].sum()),
            "targets": int(document_targets[chosen].sum()),
            "targets_in_rows": int(placed_targets[chosen].sum()),
        }
        accounted = account["kept"] + account["split"] + account["truncated"] + sum(dropped.values())
        assert account["records"] == accounted, account
        assert account["records_read"] == account["records"] + account["records_of_other_split"], account
        sources.append(account)
    total: dict[str, Any] = {
        key: sum(account[key] for account in sources) for key in sources[0] if key not in ("path", "dropped")
    }
    total["dropped"] = {reason: sum(account["dropped"][reason] for account in sources) for reason in dropped}
    assert total["records"] == store.num_documents and total["tokens"] == store.num_tokens
    assert total["targets"] == store.num_targets
    return {"sources": sources, "total": total}
