"""The files of a run's sources are looked for before anything starts; those in archives too."""

import zipfile
from pathlib import Path

import pytest

from data_prep.config import SourceConfig
from data_prep.errors import BadDataError, MissingInputError
from launcher.start.preflight import _files


def test_members_of_archives_are_found_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("in/train.jsonl", "{}\n")
    assert _files(SourceConfig(path=str(path)), "data.train") == [f"{path}!in/train.jsonl"]
    member = f"{path}!in/train.jsonl"
    assert _files(SourceConfig(aligned={"source": member, "target": member}), "data.train") == [member, member]
    with pytest.raises(MissingInputError, match="the archive holds no such file"):
        _files(SourceConfig(path=f"{path}!none.jsonl"), "data.train")
    with pytest.raises(MissingInputError, match="the archive has no such member"):
        _files(SourceConfig(aligned={"source": member, "target": f"{path}!none"}), "data.train")
    path.write_bytes(b"no archive")
    with pytest.raises(BadDataError, match="broken, or no archive"):
        _files(SourceConfig(path=str(path)), "data.train")
