"""Compressed input: bombs, truncation, wrong checksums, garbage behind the end, many members."""

import bz2
import gzip
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from data_prep.errors import BadDataError, MissingInputError
from data_prep.sources.decompress import (
    BLOCK_BYTES,
    Compression,
    all_blocks,
    decompressed_blocks,
    file_blocks,
    find_compression,
)


def _zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[Compression, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": _zstd, "bz2": bz2.compress}
KINDS = sorted(COMPRESS)
NOISE = random.Random(0).randbytes(300_000) + b"text\n" * 1000


def _file(folder: Path, kind: Compression, content: bytes) -> str:
    path = folder / f"a.jsonl.{kind}"
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_content_comes_back_in_bounded_blocks(tmp_path: Path, kind: Compression) -> None:
    content = NOISE + b"blank" * 1_000_000
    for compressed in (COMPRESS[kind](content), COMPRESS[kind](content[:1000]) + COMPRESS[kind](content[1000:])):
        blocks = list(decompressed_blocks(_file(tmp_path, kind, compressed), kind))
        assert b"".join(blocks) == content
        assert max(map(len, blocks)) <= BLOCK_BYTES


@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_members(tmp_path: Path, kind: Compression) -> None:
    path = _file(tmp_path, kind, COMPRESS[kind](b"{}\n") * 10_000)
    assert b"".join(decompressed_blocks(path, kind)) == b"{}\n" * 10_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[:-9],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:20],
        lambda whole: whole + b"garbage",
        lambda whole: whole + whole[:-3],
    ],
    ids=["last byte", "trailer", "half", "head", "garbage", "second member"],
)
def test_damage_is_an_error(tmp_path: Path, kind: Compression, damage: Callable[[bytes], bytes]) -> None:
    path = _file(tmp_path, kind, damage(COMPRESS[kind](NOISE)))
    with pytest.raises(BadDataError, match=r"a\.jsonl\.\w+: broken \w+ data after \d+ bytes: ") as caught:
        list(decompressed_blocks(path, kind))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "index"), [("gz", -1), ("gz", -5), ("gz", 200_000), ("bz2", -5), ("bz2", 200_000)])
def test_wrong_checksums(tmp_path: Path, kind: Compression, index: int) -> None:
    broken = bytearray(COMPRESS[kind](NOISE))  # pyarrow writes zstd without checksums
    broken[index] ^= 1
    with pytest.raises(BadDataError, match=r"broken .* data after"):
        list(decompressed_blocks(_file(tmp_path, kind, bytes(broken)), kind))


def test_gzip_may_be_padded_with_zeros(tmp_path: Path) -> None:
    path = _file(tmp_path, "gz", gzip.compress(b"a") + bytes(100_000) + gzip.compress(b"b") + bytes(10))
    assert b"".join(decompressed_blocks(path, "gz")) == b"ab"


@pytest.mark.parametrize("kind", KINDS)
def test_bombs_stop_at_the_ratio(tmp_path: Path, kind: Compression) -> None:
    path = _file(tmp_path, kind, COMPRESS[kind](bytes(20 << 20)))
    taken = 0
    with pytest.raises(BadDataError, match="grows more than 200 times"):
        for block in decompressed_blocks(path, kind, ratio_free_bytes=4 << 20):
            taken += len(block)
    assert taken <= 6 << 20
    assert sum(map(len, decompressed_blocks(path, kind))) == 20 << 20  # small things may be blank


def test_compression_is_what_the_first_bytes_say(tmp_path: Path) -> None:
    for kind in KINDS:
        assert find_compression(_file(tmp_path, kind, COMPRESS[kind](b"x"))) == kind
        (tmp_path / "named.jsonl").write_bytes(COMPRESS[kind](b"x"))
        assert find_compression(str(tmp_path / "named.jsonl")) == kind
        with pytest.raises(BadDataError, match=r"is not .* data, whatever its name says"):
            find_compression(_file(tmp_path, kind, b"plain"))
    (tmp_path / "plain.txt").write_bytes(b"BZ")
    assert find_compression(str(tmp_path / "plain.txt")) == "none"
    with pytest.raises(MissingInputError, match="no such file"):
        find_compression(str(tmp_path / "none.gz"))


def test_a_file_that_shrank_is_a_clean_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 100_000)
    blocks = file_blocks(str(path), 0, 100_000, block_bytes=20_000)
    next(blocks)
    path.write_bytes(b"x" * 5)
    with pytest.raises(BadDataError, match=r"a\.txt: became shorter while it was in use"):
        list(blocks)
    assert b"".join(all_blocks(str(path), "none")) == b"xxxxx"
