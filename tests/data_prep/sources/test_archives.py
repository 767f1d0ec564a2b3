"""Members of zip and tar archives are read as files, where they lie, and nothing that they hold can do harm."""

import bz2
import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from data_fixtures import SAMPLES

from data_prep.config import SourceConfig
from data_prep.errors import BadDataError, DataConfigError, MissingInputError
from data_prep.sources import archives
from data_prep.sources.read import read_records
from data_prep.sources.records import Record
from data_prep.sources.scan import find_sources

LINES = b'{"text": "a"}\n{"text": "b"}\n'


def zipped(path: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def read(path: object, **more: Any) -> list[Record]:
    (files,) = find_sources((SourceConfig.model_validate({"path": str(path), **more}),), "data.train", Path("none"))
    return [record for file in files for record in read_records(file)]


def texts(path: object, **more: Any) -> list[str]:
    return [record.value["text"] for record in read(path, **more)]


MEMBERS = {
    "train.jsonl": LINES,
    "train.jsonl.gz": gzip.compress(LINES),
    "train.jsonl.bz2": bz2.compress(LINES),
    "train.json": b'[{"text": "a"}, {"text": "b"}]',
    "splits.json": b'{"train": [{"text": "a"}, {"text": "b"}]}',
    "train.csv": b"text\na\nb\n",
    "train.tsv": b"text\tid\na\t1\nb\t2\n",
    "deep/er/train.txt": b"a\nb\n",
}


# The names alone are the cases: gzip writes the time, and processes that share the tests must
# find the same ones.
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_of_any_format_is_a_file(tmp_path: Path, name: str, method: int) -> None:
    content = MEMBERS[name]
    path = zipped(tmp_path / "data.zip", {name: content, "__MACOSX/._x.jsonl": b"?", ".hidden.jsonl": b"?"}, method)
    records = read(path)
    assert [record.value["text"] for record in records] == ["a", "b"]
    assert all(record.where.startswith(f"{path}!{name}") for record in records)
    assert texts(tarred(tmp_path / "data.tar", {name: content})) == ["a", "b"]


def test_tables_in_an_archive(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        assert texts(zipped(tmp_path / f"{name}.zip", {name: (tmp_path / name).read_bytes()})) == ["a", "b"]


@pytest.mark.parametrize(
    ("inner", "wanted"),
    [
        ("", ["a/1.txt", "a/2.txt", "b/c/3.txt", "top.txt"]),
        ("!a/1.txt", ["a/1.txt"]),
        ("!a", ["a/1.txt", "a/2.txt"]),
        ("!a/", ["a/1.txt", "a/2.txt"]),
        ("!a/*.txt", ["a/1.txt", "a/2.txt"]),
        ("!*.txt", ["top.txt"]),
        ("!**/*.txt", ["a/1.txt", "a/2.txt", "b/c/3.txt", "top.txt"]),
        ("!b/**/*", ["b/c/3.txt"]),
        ("!a/[!1].txt", ["a/2.txt"]),
        ("!?/?.txt", ["a/1.txt", "a/2.txt"]),
    ],
)
@pytest.mark.parametrize("make", [zipped, tarred])
def test_members_by_name_folder_and_glob(tmp_path: Path, make: Any, inner: str, wanted: list[str]) -> None:
    members = {name: name.encode() for name in ("a/1.txt", "a/2.txt", "b/c/3.txt", "top.txt", "notes.md")}
    path = make(tmp_path / ("x.zip" if make is zipped else "x.tar"), members)
    assert texts(f"{path}{inner}") == wanted


def test_a_pattern_that_is_none_is_refused(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", {"a.jsonl": LINES})
    with pytest.raises(DataConfigError, match=r"'\[z-a\]\.jsonl', is no pattern: bad character range z-a"):
        find_sources((SourceConfig(path=f"{archive}![z-a].jsonl"),), "data.train", tmp_path)


def test_several_archives_and_archives_beside_files(tmp_path: Path) -> None:
    zipped(tmp_path / "1.zip", {"train.jsonl": b'{"text": "a"}', "test.jsonl": b'{"text": "x"}'})
    zipped(tmp_path / "2.zip", {"train.jsonl": b'{"text": "b"}'})
    assert texts(f"{tmp_path}/*.zip!train.jsonl") == ["a", "b"]
    assert texts(f"{tmp_path}/*.zip") == ["x", "a", "b"]
    (tmp_path / "odd.zip!name.jsonl").write_text('{"text": "a real file"}')
    assert texts(tmp_path / "odd.zip!name.jsonl") == ["a real file"]
    both = {name: f"{tmp_path}/1.zip!{file}" for name, file in (("source", "train.jsonl"), ("target", "test.jsonl"))}
    ((aligned,),) = find_sources((SourceConfig(aligned=both),), "data.train", tmp_path)
    assert [record.value for record in read_records(aligned)] == [
        {"source": '{"text": "a"}', "target": '{"text": "x"}'}
    ]


def test_places_are_lines_of_members(tmp_path: Path) -> None:
    path = zipped(tmp_path / "data.zip", {"in/train.jsonl": LINES + b"{broken\n"})
    with pytest.raises(BadDataError, match=r"data\.zip!in/train\.jsonl:3: not valid JSON"):
        read(path)


@pytest.mark.parametrize(
    ("members", "more", "error", "words"),
    [
        ({"a.md": b"x"}, {}, MissingInputError, r"x\.zip: the archive holds no data file of a known ending"),
        ({"a.txt": b"x", "b.csv": b"x"}, {}, DataConfigError, r"files of several formats \(.*x\.zip!b\.csv is csv"),
        ({"a.txt": b"x"}, {"format": "csv"}, MissingInputError, "holds no data file"),
        ({"inner.zip": b"PK"}, {}, MissingInputError, "holds no data file"),
    ],
)
def test_archives_without_what_is_wanted(
    tmp_path: Path, members: dict[str, bytes], more: dict[str, Any], error: type[Exception], words: str
) -> None:
    path = zipped(tmp_path / "x.zip", members)
    with pytest.raises(error, match=words):
        read(path, **more)
    with pytest.raises(MissingInputError, match=r"x\.zip!none\.txt: the archive holds no such file"):
        read(f"{path}!none.txt")
    with pytest.raises(MissingInputError, match=r"but archives: write .*x\.zip"):
        read(tmp_path)


def test_archives_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name in ("a.tar.gz", "a.tgz", "a.7z"):
        (tmp_path / name).write_bytes(gzip.compress(b"x"))
        with pytest.raises(DataConfigError, match=r"of archives \.zip and \.tar are read, .*unpack it \(data\.train\)"):
            read(tmp_path / name)


def _flagged(content: bytes, flags: int) -> bytes:
    """The archive with other flags of its only member, in its index and in the member's own header."""
    changed = bytearray(content)
    for magic, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        changed[changed.index(magic) + offset] |= flags
    return bytes(changed)


def test_broken_and_hostile_archives(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"a.jsonl": LINES * 100})
    whole = path.read_bytes()
    place = whole.index(b"a.jsonl") + 20
    for content, words in (
        (b"", "broken, or no archive"),
        (whole[:-30], "broken, or no archive"),
        (LINES, "broken, or no archive"),
        (_flagged(whole, 1), r"a\.zip!a\.jsonl: encrypted; unpack"),
        (whole[:place] + b"\xff\xff\xff" + whole[place + 3 :], r"a\.zip!a\.jsonl: broken"),
        (whole.replace(b"PK\x03\x04", b"PK\x03\x05"), "index and content do not agree"),
    ):
        path.write_bytes(content)
        with pytest.raises(BadDataError, match=words):
            read(path)
    with pytest.raises(BadDataError, match="two members are named"), pytest.warns(UserWarning, match="Duplicate"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.jsonl", LINES)
            archive.writestr("a.jsonl", LINES)
        read(path)
    zipped(path, {"a.jsonl": b" " * (70 << 20)})
    with pytest.raises(BadDataError, match="grow to more than 200 times the archive"):
        read(path)
    cut = tarred(tmp_path / "a.tar", {"a.jsonl": LINES * 1000})
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(BadDataError, match=r"a\.tar"):
        read(cut)


def test_a_member_that_is_larger_than_the_index_says_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"a.jsonl": LINES * 100})
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02") + 24
    struct.pack_into("<I", content, place, 10)
    path.write_bytes(content)
    with pytest.raises(BadDataError, match=r"a\.zip!a\.jsonl: broken: size or checksum"):
        read(path)


def test_members_that_overlap_are_those_of_a_bomb(tmp_path: Path) -> None:
    """Two entries of the index that point to one member, as in bombs without a large ratio of their own."""
    path = zipped(tmp_path / "a.zip", {"a.txt": b"x", "b.txt": b"x"})
    content = bytearray(path.read_bytes())
    second = content.rindex(b"PK\x01\x02")
    struct.pack_into("<I", content, second + 42, 0)
    path.write_bytes(content)
    with pytest.raises(BadDataError, match="members overlap"):
        read(path)


def test_many_members_read_the_index_once(tmp_path: Path) -> None:
    lines = {f"{number:05}.jsonl": json.dumps({"text": str(number)}).encode() for number in range(2000)}
    path = zipped(tmp_path / "many.zip", lines)
    before = archives._read_index.cache_info().misses
    assert texts(path) == [str(number) for number in range(2000)]
    assert archives._read_index.cache_info().misses == before + 1


@pytest.mark.skipif(not SAMPLES.exists(), reason="the samples are not here")
def test_the_sample_archive_is_read_where_it_lies() -> None:
    path = SAMPLES / "pretraining/inaugural/inaugural.zip"
    speeches = read(f"{path}!inaugural/[12]*.txt", document="file", encoding="latin-1")
    assert len(speeches) == 59 and min(len(speech.value["text"]) for speech in speeches) > 500
