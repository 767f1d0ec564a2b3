"""Data sets through `datasets`: a local folder stands for the Hub."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from data_fixtures import write_jsonl
from pyarrow import parquet

from data_prep.config import SourceConfig
from data_prep.errors import BadDataError, DataConfigError, MissingInputError
from data_prep.sources.read import read_records
from data_prep.sources.records import Record
from data_prep.sources.scan import find_sources

ROWS = [{"text": f"é{number}", "label": number % 3, "score": None, "turns": [{"role": "user"}]} for number in range(50)]


def read(folder: Path, cache_dir: Path, **more: Any) -> list[Record]:
    ((source,),) = find_sources((SourceConfig(hub=str(folder), **more),), "data.train", cache_dir)
    assert (source.format, source.label) == ("jsonl", f"{folder}[{more.get('split', 'train')}]")
    return list(read_records(source))


def test_a_split_is_spooled_once_and_again_when_it_changed(tmp_path: Path) -> None:
    folder, cache_dir = tmp_path / "set", tmp_path / "cache" / "deep"
    write_jsonl(folder / "train.jsonl", ROWS)
    write_jsonl(folder / "test.jsonl", ROWS[:5])
    records = read(folder, cache_dir)
    assert [record.value for record in records] == ROWS
    assert records[3].where == f"{folder}[train]:4"
    assert len(read(folder, cache_dir, split="test")) == 5
    spools = sorted(cache_dir.iterdir())
    assert len(spools) == 2 and all(path.suffix == ".jsonl" for path in spools)
    before = [path.stat().st_mtime_ns for path in spools]
    read(folder, cache_dir)
    assert [path.stat().st_mtime_ns for path in spools] == before
    write_jsonl(folder / "train.jsonl", ROWS[:7])
    os.utime(folder / "train.jsonl", (1, 1))
    assert len(read(folder, cache_dir)) == 7


def test_nulls_that_a_table_adds_to_objects_are_left_out_and_counted(tmp_path: Path) -> None:
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": {"c": 2}}}]
    rows = [{"text": None, "calls": [call]} for call in calls]
    (tmp_path / "set").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set" / "train.parquet")
    for _ in range(2):  # fetched, and found on the disk
        records = read(tmp_path / "set", tmp_path / "cache")
        assert [record.value for record in records] == rows
        assert [record.num_nulls for record in records] == [1, 1]


def test_what_is_missing_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_jsonl(tmp_path / "set" / "train.jsonl", ROWS)
    for more, words in (
        ({"hub": "nobody/nothing"}, r"^nobody/nothing: .*\(data\.train\.hub\)$"),
        ({"hub": str(tmp_path / "set"), "split": "dev"}, r"set: .*train.*\(data\.train\.split\)$"),
        ({"hub": str(tmp_path / "set"), "config": "x"}, r"set: .*'x'.*\(data\.train\.hub\)$"),
    ):
        with pytest.raises(MissingInputError, match=words) as caught:
            find_sources((SourceConfig(**more),), "data.train", tmp_path / "cache")  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(DataConfigError, match=r"^data\.train\.columns has no meaning for hub"):
        find_sources((SourceConfig(hub="a", columns=("a",)),), "data.train", tmp_path)
    assert not list(tmp_path.glob("cache/*"))


def test_a_file_that_breaks_half_way_leaves_no_spool(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "x" * 1000}) for _ in range(20_000)] + ["{broken"]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(MissingInputError, match=r"set\[train\]: cannot be read to its end: .*\(data\.train\.hub\)$"):
        read(tmp_path / "set", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_whose_data_lies_in_an_archive_is_refused_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text("a data set")
    for name, advice in (("big.zip", "write `path: "), ("big.tar.gz", "unpack it, and write `path:`")):
        (folder / name).write_bytes(b"never read")
        with pytest.raises(DataConfigError, match=rf"its data lies in the archive {name}; {advice}.*train\.hub\)$"):
            find_sources((SourceConfig(hub=str(folder)),), "data.train", tmp_path / "cache")
        (folder / name).unlink()


def test_the_first_records_are_looked_at_before_the_others_are_fetched(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": str(number)} for number in range(300)])
    seen: list[Record] = []

    def check(first: Sequence[Record], _config: SourceConfig) -> None:
        seen.extend(first)
        raise BadDataError("no shape fits")

    with pytest.raises(BadDataError, match="no shape fits"):
        find_sources((SourceConfig(hub=str(tmp_path / "set")),), "data.train", tmp_path / "cache", check=check)
    assert [record.line for record in seen] == list(range(1, 101)) and seen[2].value == {"text": "2"}
    assert not (tmp_path / "cache").exists()
    ((source,),) = find_sources((SourceConfig(hub=str(tmp_path / "set")),), "data.train", tmp_path / "cache")
    assert len(list(read_records(source))) == 300
