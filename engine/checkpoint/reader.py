"""Reads a checkpoint's weights and moments by range, whichever ranks wrote them. One process suffices."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.format import MANIFEST, MAX_JSON_BYTES, STATE, WeightEntry, read_manifest
from engine.errors import DataError
from engine.tensor_files.range_reader import ReadRequest, read_ranges
from engine.tensor_files.reader import (
    BLOCK_BYTES,
    TensorEntry,
    check_size,
    data_offset,
    read_file,
    read_header,
    verify_blocks,
)


class CheckpointReader:
    """An open checkpoint. Its structure is checked here, its content where it is read.

    DataError where a file is missing, of another size, or its tensors are not those that the manifest names.
    """

    def __init__(self, path: Path):
        self.path = path
        self.manifest = read_manifest(path)
        self.weights: dict[str, WeightEntry] = self.manifest.weights
        self.records = {path / name: record for name, record in self.manifest.files.items()}
        for whole_path, record in self.records.items():
            check_size(whole_path, record)
        self._headers = {name: read_header(path / name) for name in self.manifest.slices}
        self._slices: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for file, rows in self.manifest.slices.items():
            for name, start, stop in rows:
                self._slices[name].append((start, stop, file))
            self._check_header(file, rows)

    def check_no_extra_files(self) -> None:
        """DataError for a file that the manifest does not name."""
        known = {MANIFEST, *self.manifest.files}
        extra = sorted(entry.name for entry in self.path.iterdir() if entry.name not in known and entry.name[0] != ".")
        if extra:
            raise DataError(f"{self.path / extra[0]}: does not belong to this checkpoint")

    def _check_header(self, file: str, rows: list[tuple[str, int, int]]) -> None:
        expected = {
            tensor: (self.weights[name].dtype, (stop - start,))
            for name, start, stop in rows
            for tensor in self.manifest.tensors_of(name)
        }
        found = {tensor: (entry.dtype, entry.shape) for tensor, entry in self._headers[file].items()}
        for tensor in expected.keys() | found.keys():
            if expected.get(tensor) != found.get(tensor):
                raise DataError(f"{self.path / file}: {tensor} is not the slice that the manifest names")

    def requests(self, tensor: str, start: int, values: Tensor) -> Iterator[ReadRequest]:
        """The requests that fill `values` with elements from `start` on of ``master/<name>``, ``frozen/<name>``, ..."""
        kind, _, name = tensor.partition("/")
        stop = start + values.numel()
        for first, last, file in self._slices[name]:
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                entry: TensorEntry = self._headers[file][f"{kind}/{name}"]
                offset = entry.begin + (begin - first) * entry.dtype.itemsize
                yield ReadRequest(self.path / file, offset, entry.dtype, values[begin - start : end - start])

    def read_into(self, requests: Iterable[ReadRequest]) -> int:
        """Fill tensors as `requests` say, comparing every block with its hash; returns the bytes read.

        DataError for a damaged block: then some of the tensors have been filled.
        """
        return read_ranges(requests, self.records)

    def read_weight(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened weight, 1-D on the CPU, in the type it is stored in. Not verified."""
        values = torch.empty(stop - start, dtype=self.weights[name].dtype)
        read_ranges(self.requests(self.manifest.tensors_of(name)[0], start, values))
        return values

    def verify_rest(self, share: int = 0, shares: int = 1) -> None:
        """Check what nobody reads by range: the state, and this share of the files' headers. DataError."""
        verify_blocks(self.path / STATE, self.manifest.files[STATE])
        for file in list(self._headers)[share::shares]:
            blocks = range(-(-data_offset(self.path / file) // BLOCK_BYTES))
            verify_blocks(self.path / file, self.manifest.files[file], blocks)

    def state(self) -> dict[str, Any]:
        """The training state that was given to `save_checkpoint`."""
        try:
            state = json.loads(read_file(self.path / STATE, MAX_JSON_BYTES))
        except ValueError as error:
            raise DataError(f"{self.path / STATE}: not a training state: {error}") from None
        return dict(state)
