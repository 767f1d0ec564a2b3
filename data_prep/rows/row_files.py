"""Writes the plan of a store's rows: columns whose length is known only at the end."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.token_store import ROW_COLUMNS, TokenStore, hash_file


class RowFiles:
    """The columns of the plan, written as they come, in the smallest types that hold them."""

    def __init__(self, store: TokenStore, row_tokens: int):
        most_segments = store.num_documents + store.num_tokens // row_tokens + 1
        large = {"documents": store.num_documents, "ends": most_segments}
        types = {name: unsigned_type(large.get(name, 0)) for name in ROW_COLUMNS}
        self._columns = {name: _ColumnFile(store.path / f"rows_{name}.npy", types[name]) for name in ROW_COLUMNS}
        self.num_segments = 0

    def append(
        self, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray, targets: np.ndarray, row_ends: np.ndarray
    ) -> None:
        """Add whole rows: their segments ([S] each, with their targets), and where each row ends in these ([R])."""
        if len(row_ends) == 0:
            return
        row_targets = np.add.reduceat(targets, np.concatenate(([0], row_ends[:-1])))
        values = (documents, starts, lengths, row_ends + self.num_segments, row_targets)
        for column, block in zip(self._columns.values(), values, strict=True):
            column.append(block)
        self.num_segments += len(documents)

    def close(self) -> dict[str, Any]:
        """Make the files durable; returns their manifest entries."""
        return {column.path.name: column.close() for column in self._columns.values()}


def unsigned_type(largest: int) -> np.dtype[Any]:
    """The stored type of numbers up to `largest`."""
    return np.dtype(np.uint32 if largest < 2**32 else np.uint64)


class _ColumnFile:
    """A one-dimensional .npy file whose length is known only at the end."""

    def __init__(self, path: Path, dtype: np.dtype[Any]):
        self.path, self._dtype, self._length = path, dtype, 0
        self._file = path.open("wb")
        self._file.write(self._header())

    def _header(self) -> bytes:
        header = io.BytesIO()
        description = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(header, {**description, "shape": (self._length,)})
        return header.getvalue()

    def append(self, block: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(block, dtype=self._dtype).data)
        self._length += len(block)

    def close(self) -> dict[str, Any]:
        self._file.seek(0)
        self._file.write(self._header())  # numpy leaves room for the digits, so it has the same size
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self.path.stat().st_size, "xxh3_128": hash_file(self.path)}
