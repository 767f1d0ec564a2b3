"""Our safetensors writer and reader against the ordinary library, and against files that lie."""

import json
import os
import struct
from functools import partial
from pathlib import Path

import pytest
import safetensors
import torch
import xxhash
from safetensors.torch import load_file, save_file

from engine.errors import DataError
from engine.tensor_files.reader import BLOCK_BYTES, FileRecord, read_header, verify_blocks
from engine.tensor_files.writer import TensorSource, tensor_chunks, write_file, write_safetensors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


def make_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    values = torch.randn(shape) * 50
    return values.to(dtype) if dtype.is_floating_point else values.round().to(dtype)


def source(name: str, tensor: torch.Tensor, chunk_bytes: int = 1000) -> TensorSource:
    return TensorSource(name, tensor.dtype, tuple(tensor.shape), partial(tensor_chunks, tensor, chunk_bytes))


def test_every_type_and_shape_opens_with_the_ordinary_library(tmp_path: Path) -> None:
    tensors = {f"a.{number}": make_tensor(dtype, 3, number + 1) for number, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "ünï": torch.arange(700.0)}
    write_safetensors(tmp_path / "x.safetensors", [source(*item) for item in tensors.items()], {"who": "us"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "us"}
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o117 == 0, (
        "nothing for others; the umask decides on the group"
    )


def test_chunks_of_a_large_tensor_are_written_in_order_and_each_block_has_its_hash(tmp_path: Path) -> None:
    tensor = torch.arange(2.5 * BLOCK_BYTES / 4)
    record = write_safetensors(tmp_path / "x.safetensors", [source("x", tensor, BLOCK_BYTES // 3)])
    data = (tmp_path / "x.safetensors").read_bytes()
    hashes = [xxhash.xxh3_128(data[i : i + BLOCK_BYTES]).hexdigest() for i in range(0, len(data), BLOCK_BYTES)]
    assert record == FileRecord("x.safetensors", len(data), tuple(hashes))
    assert len(hashes) == 3
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], tensor)


def test_a_changed_bit_is_found_in_its_block_only(tmp_path: Path) -> None:
    record = write_file(tmp_path / "x", os.urandom(2 * BLOCK_BYTES + 10))
    verify_blocks(tmp_path / "x", record)
    with (tmp_path / "x").open("r+b") as file:
        file.seek(BLOCK_BYTES + 7)
        byte = file.read(1)[0]
        file.seek(BLOCK_BYTES + 7)
        file.write(bytes([byte ^ 4]))
    verify_blocks(tmp_path / "x", record, range(0, 1))
    verify_blocks(tmp_path / "x", record, range(2, 3))
    with pytest.raises(DataError, match=f"bytes {BLOCK_BYTES} to {2 * BLOCK_BYTES}"):
        verify_blocks(tmp_path / "x", record)


@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_file_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    record = write_file(tmp_path / "x", b"0123456789")
    (tmp_path / "x").write_bytes(b"0" * size)
    with pytest.raises(DataError, match="10 were written"):
        verify_blocks(tmp_path / "x", record)


def test_links_pipes_and_absent_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "absent"):
        with pytest.raises(DataError, match=name):
            read_header(tmp_path / name)
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "real", [])
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "link", [])


def test_a_source_that_yields_other_than_it_said_is_refused(tmp_path: Path) -> None:
    for number, chunks in enumerate(([torch.ones(3)], [torch.ones(5)], [torch.ones(4, dtype=torch.int32)])):
        with pytest.raises(ValueError, match="x"):
            write_safetensors(
                tmp_path / str(number), [TensorSource("x", torch.float32, (4,), lambda c=chunks: iter(c))]
            )
    with pytest.raises(ValueError, match="two tensors"):
        write_safetensors(tmp_path / "twice", [source("x", torch.ones(1)), source("x", torch.ones(1))])


def entry(begin: int, end: int, **changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]} | changes


TWICE = b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
HOSTILE = {
    "gap": {"a": entry(4, 8)},
    "overlap": {"a": entry(0, 8), "b": entry(4, 12)},
    "past the end": {"a": entry(0, 400)},
    "unused rest": {"a": entry(0, 4)},
    "shape larger than bytes": {"a": entry(0, 12, shape=[2**40])},
    "negative": {"a": entry(0, 12, shape=[-1, -3])},
    "backwards": {"a": entry(12, 0, shape=[0])},
    "true is no number": {"a": entry(0, 12, shape=[3, True])},
    "fraction": {"a": entry(0, 12, shape=[3.0])},
    "unknown type": {"a": entry(0, 12, dtype="F12")},
    "extra key": {"a": entry(0, 12, code="x")},
    "entry is a list": {"a": [0, 12]},
    "header is a list": [],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, name: str) -> None:
    text = json.dumps(HOSTILE[name]).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    with pytest.raises(DataError, match="x: "):
        read_header(tmp_path / "x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 0),
        struct.pack("<Q", 4) + b"\xff\xfe{}",
        struct.pack("<Q", 9) + b'{"a":{},}',
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", len(TWICE)) + TWICE,
    ],
)
def test_bytes_that_are_no_header_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DataError, match="x: "):
        read_header(tmp_path / "x")


def test_a_sound_header_next_to_the_hostile_ones_is_read(tmp_path: Path) -> None:
    text = json.dumps({"a": entry(0, 8), "b": entry(8, 12), "__metadata__": {"format": "pt"}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    assert list(read_header(tmp_path / "x")) == ["a", "b"]
