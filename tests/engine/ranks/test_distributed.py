"""The run folder's owner, and files another process may read at any moment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import CannotWriteError, ConfigError
from engine.ranks import liveness
from engine.ranks.liveness import remove_shared_memory
from engine.ranks.rank_record import write_json
from engine.run_folder import RunFolder


def test_a_run_folder_has_one_owner(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run", rank=0)
    first.own()
    with pytest.raises(CannotWriteError, match=rf"in use by process {os.getpid()} on ") as caught:
        RunFolder(tmp_path / "run", rank=0).own()
    assert caught.value.exit_code == 73
    RunFolder(tmp_path / "run", rank=1).own()  # other ranks leave it to rank 0


def test_a_dead_owner_does_not_block_and_a_stale_one_cannot_publish(tmp_path: Path) -> None:
    program = f"from engine.run_folder import RunFolder; from pathlib import Path; RunFolder(Path({str(tmp_path)!r}), 0).own()"
    subprocess.run([sys.executable, "-c", program], check=True)
    second = RunFolder(tmp_path, rank=0)
    second.own()
    second.check_owner()
    assert json.loads((tmp_path / "owner.json").read_text())["generation"] == 2
    write_json(tmp_path / "owner.json", {"generation": 3, "pid": 1, "host": "elsewhere"})
    with pytest.raises(CannotWriteError, match="taken over by a newer job"):
        second.check_owner()


def test_a_run_on_hold_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "HOLD").touch()
    with pytest.raises(ConfigError, match=r"is on hold: remove .*/HOLD to go on"):
        RunFolder(tmp_path, rank=0).own()
    (tmp_path / "HOLD").unlink()
    RunFolder(tmp_path, rank=0).own()


def test_an_unwritable_run_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError, match="run_dir: cannot write into"):
        RunFolder(tmp_path / "file" / "run", rank=0).own()


def test_only_our_own_segment_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "SHARED_MEMORY_DIR", tmp_path)
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29511"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    ours = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_29511_1"
    others = [ours[:-1] + "0", ours.replace("29511", "29512"), "unrelated"]
    for name in (ours, *others):
        (tmp_path / name).write_text("")
    remove_shared_memory()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
