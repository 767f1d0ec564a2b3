"""Ranges of files land where they belong, whatever their types and borders; damage is named."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.errors import DataError
from engine.tensor_files.range_reader import ReadRequest, read_ranges
from engine.tensor_files.reader import BLOCK_BYTES, FileRecord, read_header
from engine.tensor_files.writer import TensorSource, tensor_chunks, write_safetensors

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def wanted_of(path: Path, name: str, start: int, values: torch.Tensor) -> ReadRequest:
    entry = read_header(path)[name]
    return ReadRequest(path, entry.begin + start * entry.dtype.itemsize, entry.dtype, values)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_ranges_of_any_types_equal_what_the_ordinary_library_reads(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Files of the ordinary library, whose tensors need not be aligned; several files, overlapping ranges."""
    folder = tmp_path_factory.mktemp("ranges")
    wanted, expected, total = [], [], 0
    for number in range(data.draw(st.integers(1, 3))):
        path = folder / f"{number}.safetensors"
        tensors = {
            f"t{index}": torch.randn(data.draw(st.integers(1, 70))).mul(3).to(data.draw(st.sampled_from(TYPES)))
            for index in range(data.draw(st.integers(1, 6)))
        }
        save_file(tensors, path)
        theirs = load_file(path)
        for name, tensor in tensors.items():
            start = data.draw(st.integers(0, len(tensor)))
            stop = data.draw(st.integers(start, len(tensor)))
            into = data.draw(st.sampled_from([tensor.dtype, torch.float32]))
            values = torch.zeros(stop - start, dtype=into)
            wanted.append(wanted_of(path, name, start, values))
            expected.append(theirs[name][start:stop].to(into))
            total += (stop - start) * tensor.dtype.itemsize
    assert read_ranges(data.draw(st.permutations(wanted))) == total
    for item, values in zip(wanted, expected, strict=True):
        assert torch.equal(item.values, values)


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, FileRecord, torch.Tensor]:
    """A file of ten blocks and a bit: one long tensor of fp32 and a short one of bf16."""
    long = torch.randn(BLOCK_BYTES // 4 * 10 + 321)
    short = torch.randn(77).bfloat16()
    path = tmp_path / "x.safetensors"
    sources = [
        TensorSource(n, t.dtype, tuple(t.shape), partial(tensor_chunks, t)) for n, t in (("a", long), ("b", short))
    ]
    return path, write_safetensors(path, sources), long


@pytest.mark.parametrize("into", [torch.float32, torch.float64])
@pytest.mark.parametrize("verified", [True, False])
def test_large_reads_cross_blocks(
    large: tuple[Path, FileRecord, torch.Tensor], into: torch.dtype, verified: bool
) -> None:
    path, record, long = large
    first = torch.zeros(BLOCK_BYTES, dtype=into)  # four blocks' worth of fp32, in the middle
    second = torch.zeros(len(long) - 3 - BLOCK_BYTES, dtype=into)
    read = read_ranges(
        [wanted_of(path, "a", 3 + BLOCK_BYTES, second), wanted_of(path, "a", 3, first)],
        {path: record} if verified else None,
    )
    assert torch.equal(torch.cat([first, second]), long[3:].to(into))
    assert read == (record.size_bytes if verified else (len(long) - 3) * 4)


def test_a_changed_bit_is_found_in_the_blocks_that_are_read_and_only_there(
    large: tuple[Path, FileRecord, torch.Tensor],
) -> None:
    path, record, long = large
    position = 5 * BLOCK_BYTES + 12345
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))
    values = torch.zeros(1000)
    read_ranges([wanted_of(path, "a", 0, values)], {path: record})
    assert torch.equal(values, long[:1000])
    with pytest.raises(DataError, match=rf"x\.safetensors: damaged: bytes {5 * BLOCK_BYTES} to {6 * BLOCK_BYTES}"):
        read_ranges([wanted_of(path, "a", 0, torch.zeros(len(long)))], {path: record})


def test_files_that_end_early_are_another_size_or_missing_are_named(
    large: tuple[Path, FileRecord, torch.Tensor], tmp_path: Path
) -> None:
    path, record, _ = large
    wanted = wanted_of(path, "a", 0, torch.zeros(BLOCK_BYTES))
    os.truncate(path, BLOCK_BYTES)
    with pytest.raises(DataError, match=r"x\.safetensors: ends at byte 4194304"):
        read_ranges([wanted])
    with pytest.raises(DataError, match=r"x\.safetensors: 4194304 bytes long, but"):
        read_ranges([wanted], {path: record})
    path.unlink()
    with pytest.raises(DataError, match=r"x\.safetensors: cannot be opened"):
        read_ranges([wanted])
    assert read_ranges([]) == 0
