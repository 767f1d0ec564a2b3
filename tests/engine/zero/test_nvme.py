"""Optimizer states on NVMe: the same training as in memory, saved, resumed and moved bit by bit.

Real DeepSpeed with its async_io op, sub-groups of 1.4 MB and more, so that they really are swapped.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nvme_worker import LAST_STEP, SAVED_STEP, SWAPPING
from ranks import ROOT, kill_ranks, rank_environment, run_ranks, start_ranks
from repository import WORKERS
from safetensors.torch import load_file
from training_runs import metrics, run_file, state_bytes, wait_for_step

from engine.errors import ConfigError, MissingInputError, StorageError
from engine.zero.direct_io import check_direct_io
from engine.zero.nvme_state import prepare_swap_folder, swap_folder
from launcher import check_system
from launcher.start.start import _prebuild

pytestmark = pytest.mark.ranks
WORKER = WORKERS / "nvme_worker.py"
needs_libaio = pytest.mark.skipif(
    bool(check_system.missing_optional_packages()), reason="needs libaio: apt-get install libaio-dev"
)


def takes_direct_writes(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "direct", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the op built, where files can be written past the page cache."""
    folder = tmp_path_factory.mktemp("nvme")
    if not takes_direct_writes(folder):
        pytest.skip(f"{folder} lies on a file system without direct writes: set TMPDIR to one on a disk")
    command = [sys.executable, "-m", "engine.zero.prebuild", "--nvme"]
    done = subprocess.run(command, cwd=ROOT, env=rank_environment(1), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def trained(disk: Path) -> Path:
    run_ranks(2, WORKER, disk, "straight")
    run_ranks(2, WORKER, disk, "resume", "start", "refusing_disk", "as_deepspeed_does")
    run_ranks(1, WORKER, disk, "other_size")
    return disk


def facts(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / f"{name}.json").read_text()))


def assert_same(folder: Path, one: str, other: str) -> None:
    first, second = load_file(folder / f"{one}.safetensors"), load_file(folder / f"{other}.safetensors")
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert facts(folder, one)["steps"] == facts(folder, other)["steps"]


@needs_libaio
@pytest.mark.parametrize("setting", SWAPPING)
def test_training_is_that_with_states_in_memory(trained: Path, setting: str) -> None:
    for moment, steps in (("saved", SAVED_STEP), ("last", LAST_STEP)):
        assert_same(trained, f"{setting}-{moment}", f"memory-{moment}")
        ours, theirs = facts(trained, f"{setting}-{moment}"), facts(trained, f"memory-{moment}")
        assert ours["figures"] == theirs["figures"]
        assert ours["steps"] == steps


@needs_libaio
@pytest.mark.parametrize("setting", SWAPPING)
def test_states_are_on_the_disk_and_gradients_are_not(trained: Path, setting: str) -> None:
    swapped = facts(trained, f"{setting}-last")["swapped"]
    assert swapped["groups"] == [True, True, True, False], "the last is of biases and norms, and small"
    if setting == "plain":  # DeepSpeed leaves its buffers named when it overlaps
        assert [count == 0 for count in swapped["in_memory"]] == swapped["groups"]
    kinds = [name.partition("-")[0] if name.startswith("exp") else "master" for name in swapped["files"]]
    assert sorted(kinds) == sorted(["master", "exp_avg", "exp_avg_sq"] * 3)
    assert min(swapped["files"].values()) > 2**20


@needs_libaio
@pytest.mark.parametrize(("source", "setting"), [("plain", "plain"), ("overlapped", "overlapped"), ("memory", "plain")])
def test_a_resumed_run_is_bit_equal_to_the_one_that_never_stopped(trained: Path, source: str, setting: str) -> None:
    assert_same(trained, f"{source}-to-{setting}", f"{setting}-last")
    assert facts(trained, f"{source}-to-{setting}")["figures"] == facts(trained, f"{setting}-last")["figures"]


@needs_libaio
def test_another_number_of_ranks_takes_masters_and_moments_over(trained: Path) -> None:
    for name in ("plain-to-memory-at-1", "plain-to-plain-at-1", "again-at-1"):
        assert_same(trained, name, "plain-saved")
    assert facts(trained, "plain-to-plain-at-1")["swapped"]["groups"].count(True) == 3


@needs_libaio
def test_a_checkpoint_before_the_first_step_and_an_engine_that_has_trained(trained: Path) -> None:
    assert_same(trained, "from-start", "plain-saved")
    assert facts(trained, "from-start")["figures"] == facts(trained, "plain-saved")["figures"]
    assert_same(trained, "used-engine", "plain-saved")


@needs_libaio
def test_nothing_is_left_on_the_disk(trained: Path) -> None:
    assert list((trained / "swap").iterdir()) == []


@needs_libaio
def test_what_is_put_right_is_still_wrong_in_deepspeed(trained: Path) -> None:
    """When this fails DeepSpeed has learnt to read swapped gradients, and `keep_gradients_in_memory` is not needed for it."""
    got = facts(trained, "as-deepspeed-does")
    assert any("gradient" in name for name in got["swapped"]["files"])
    if got["figures"] == facts(trained, "memory-saved")["figures"]:
        pytest.skip("this disk takes direct reads to addresses that are not aligned")


@needs_libaio
def test_a_disk_that_refuses_one_rank_stops_all_with_the_reason(trained: Path) -> None:
    outcomes = [json.loads((trained / f"refused-{rank}.json").read_text()) for rank in (0, 1)]
    assert outcomes[0] == outcomes[1]
    for kind, message in outcomes[0]:
        assert kind == "StorageError"
        assert "/rank1/" in message
        assert "no room for" in message


SIZES = {"model_type": "gpt2", "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 256}


@needs_libaio
def test_a_killed_run_goes_on_and_leaves_nothing(disk: Path) -> None:
    """The shipped configuration, by the same command after a kill: as if it had all been in memory without a break."""
    swap = disk / "ssd"
    swap.mkdir()
    common = {
        "deepspeed": "zero3_offload_nvme", "nvme_path": str(swap), "duration": {"steps": 6},
        "model": {"init": "random", "config": SIZES}, "checkpoint": {"save_every_steps": 2, "keep_checkpoints": 9},
    }  # fmt: skip
    run_ranks(2, "-m", "engine", run_file(disk, "memory-run", **{**common, "deepspeed": "zero3_offload"}))
    killed = run_file(disk, "killed-run", **common)
    ranks = start_ranks(2, "-m", "engine", killed)
    wait_for_step(disk / "killed-run", 3)
    kill_ranks(disk / "killed-run", signal.SIGKILL)
    ranks.wait(120)
    (left,) = swap.iterdir()
    assert left.name.endswith("-1")
    assert len(list(left.rglob("*.swp"))) > 4
    output = run_ranks(2, "-m", "engine", str(killed))
    assert "resuming after step 2" in output
    assert "changed since" not in output
    assert list(swap.iterdir()) == []
    expected, got = metrics(disk / "memory-run"), metrics(disk / "killed-run")
    assert sorted(got) == list(range(1, 7))
    assert all(got[step]["loss"] == expected[step]["loss"] for step in got)
    assert state_bytes(disk / "killed-run", 6) == state_bytes(disk / "memory-run", 6)


def test_the_folder_of_a_start(tmp_path: Path) -> None:
    run_dir, other_run = tmp_path / "run", tmp_path / "other"
    names = {swap_folder(tmp_path, run, number).name for run in (run_dir, other_run) for number in (1, 2, 11)}
    assert len(names) == 6
    for run, number in ((run_dir, 1), (run_dir, 3), (other_run, 1)):
        (swap_folder(tmp_path, run, number) / "zero_stage_3").mkdir(parents=True)
    (tmp_path / "fulltune-mine").mkdir()
    now = swap_folder(tmp_path, run_dir, 2)
    if not takes_direct_writes(tmp_path):
        pytest.skip("no direct writes here")
    prepare_swap_folder(now, run_dir, 1000)
    left = {path.name for path in tmp_path.iterdir()} - {"direct"}
    kept = [swap_folder(tmp_path, run_dir, 3), swap_folder(tmp_path, other_run, 1)]
    assert left == {now.name, "fulltune-mine", *(path.name for path in kept)}
    assert list(now.iterdir()) == []


def test_a_disk_that_is_not_there_full_or_unfit_is_told_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"there is no folder .*/unmounted here"):
        prepare_swap_folder(swap_folder(tmp_path / "unmounted", tmp_path, 1), tmp_path, 1)
    with pytest.raises(ConfigError, match="takes no direct writes"):
        check_direct_io(Path("/proc"))
    if takes_direct_writes(tmp_path):
        with pytest.raises(StorageError, match=r"need 1048576\.00 GiB in"):
            prepare_swap_folder(swap_folder(tmp_path, tmp_path, 1), tmp_path, 2**50)


def test_a_machine_without_libaio_is_told_in_one_line_before_ranks_start(tmp_path: Path) -> None:
    environment = rank_environment(1) | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CC": "false"}  # it links nothing
    with pytest.raises(ConfigError) as caught:
        _prebuild(environment, uses_nvme=True)
    assert str(caught.value) == "to keep optimizer states on NVMe DeepSpeed needs libaio: apt-get install libaio-dev"
