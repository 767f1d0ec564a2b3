"""The arrangement of a token store's documents into rows: read, checked, and how often an epoch uses each."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_prep.token_store.format import ADVICE, INDEX_TYPES, MANIFEST_NAME, StoreError, whole_number

if TYPE_CHECKING:
    from data_prep.token_store.store import TokenStore

ROW_COLUMNS = ("documents", "starts", "lengths", "ends", "targets")
_BLOCK = 1 << 20  # rows and segments that are checked at once


@dataclass(frozen=True)
class RowSource:
    """The rows of one source, which follow each other, and how many of them an epoch uses."""

    name: str
    first_row: int
    num_rows: int
    rows_per_epoch: int


@dataclass(frozen=True)
class Rows:
    """The arrangement of a store's documents into rows of at most `row_tokens` tokens.

    S segments, R rows; arrays are views of the files, in their stored unsigned types. The first token
    of a segment is never a target.
    """

    row_tokens: int
    documents: np.ndarray  # [S] segment -> document
    starts: np.ndarray  # [S] first token of the segment in its document
    lengths: np.ndarray  # [S] tokens of the segment
    row_ends: np.ndarray  # [R] segments of row r are [row_ends[r - 1], row_ends[r])
    row_targets: np.ndarray  # [R] targets of the row; 1 for a task with labels
    sources: tuple[RowSource, ...]
    digest: str  # identity of store content, arrangement and mixture

    @property
    def num_rows(self) -> int:
        return len(self.row_ends)

    @property
    def epoch_rows(self) -> int:
        """Rows of one epoch: every row once, or what the mixture makes of it."""
        return sum(source.rows_per_epoch for source in self.sources)

    def segments(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents, starts and lengths (int64 each) of the segments of one row, in row order."""
        chosen = slice(int(self.row_ends[row - 1]) if row else 0, int(self.row_ends[row]))
        documents, starts, lengths = (
            column[chosen].astype(np.int64) for column in (self.documents, self.starts, self.lengths)
        )
        return documents, starts, lengths


def open_rows(store: "TokenStore", row_tokens: int) -> Rows:
    """The rows that preparation planned for `store`. StoreError if they have another length or are damaged."""
    manifest = store.manifest
    planned = manifest.get("row_tokens")
    if planned != row_tokens:
        raise StoreError(
            f"{store.path}: its rows have {planned} tokens, not data.row_tokens {row_tokens};"
            " run `fulltune prepare RUN.yaml`"
        )
    try:
        num_segments, num_rows = whole_number(manifest, "num_segments"), whole_number(manifest, "num_rows")
        sources = tuple(
            RowSource(
                str(source["name"]),
                whole_number(source, "first_row"),
                whole_number(source, "num_rows"),
                whole_number(source, "rows_per_epoch"),
            )
            for source in manifest["row_sources"]
        )
        files = manifest["files"]
        hashes = [files[f"rows_{name}.npy"]["xxh3_128"] for name in ROW_COLUMNS]
    except (KeyError, TypeError) as error:
        raise StoreError(f"{store.path / MANIFEST_NAME}: lacks or garbles {error}") from error
    documents, starts, lengths = (
        store.load_array(f"rows_{name}", num_segments, INDEX_TYPES) for name in ROW_COLUMNS[:3]
    )
    row_ends, row_targets = (store.load_array(f"rows_{name}", num_rows, INDEX_TYPES) for name in ROW_COLUMNS[3:])
    mixture = [(source.first_row, source.num_rows, source.rows_per_epoch) for source in sources]
    digest = hashlib.sha256(json.dumps([store.digest, row_tokens, *hashes, mixture]).encode()).hexdigest()
    rows = Rows(row_tokens, documents, starts, lengths, row_ends, row_targets, sources, digest)
    store.check_borders()
    _check_rows(store, rows)
    store.release_memory()
    return rows


def _check_rows(store: "TokenStore", rows: Rows) -> None:
    """Read the whole plan, in blocks. StoreError if a row reaches outside its documents or is too long."""
    covered = 0
    for source in rows.sources:
        used = (source.rows_per_epoch > 0) == (source.num_rows > 0)
        covered = covered + source.num_rows if source.first_row == covered and used else -1
    if covered != rows.num_rows or not all(_sound(store, rows, *block) for block in _row_blocks(rows)):
        raise StoreError(f"{store.path}: the plan of its rows reaches outside the documents: damaged; {ADVICE}")


def _row_blocks(rows: Rows) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of rows with at most about _BLOCK rows and segments each."""
    first = 0
    while first < rows.num_rows:
        before = int(rows.row_ends[first - 1]) if first else 0
        block = rows.row_ends[first : first + _BLOCK]
        fitting = int(np.searchsorted(block, np.asarray(before + _BLOCK, dtype=block.dtype), side="right"))
        yield first, first + max(1, fitting)
        first += max(1, fitting)
    if first and int(rows.row_ends[-1]) != len(rows.documents):
        yield rows.num_rows, rows.num_rows


def _sound(store: "TokenStore", rows: Rows, first_row: int, stop_row: int) -> bool:
    ends = rows.row_ends[first_row:stop_row].astype(np.int64)
    first = int(rows.row_ends[first_row - 1]) if first_row else 0
    begins = np.concatenate(([first], ends[:-1]))
    if len(ends) == 0 or bool(np.any(ends <= begins)) or int(ends[-1]) > len(rows.documents):
        return False
    if int((ends - begins).max()) > rows.row_tokens:
        return False
    chosen = slice(first, int(ends[-1]))
    documents = rows.documents[chosen].astype(np.int64)
    if int(documents.min()) < 0 or int(documents.max()) >= store.num_documents:
        return False
    starts, lengths = rows.starts[chosen].astype(np.int64), rows.lengths[chosen].astype(np.int64)
    document_begins, document_ends = store.borders(documents)
    inside = (starts >= 0) & (lengths > 0) & (lengths <= document_ends - document_begins - starts)
    return bool(inside.all()) and int(np.add.reduceat(lengths, begins - first).max()) <= rows.row_tokens
