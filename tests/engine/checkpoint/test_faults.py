"""Nothing that happens to a process, a disk or a file costs more than the steps since the last checkpoint.

Everything real: ``python -m engine`` on DeepSpeed ranks (ZeRO-3, optimizer and parameters offloaded,
bf16, dropout on, accumulation), the real code of a save, real files. What fails is the system below:
tests/support/faults/faults.c makes single storage calls fail, tear, stop or be the last. `make test-faults` runs
the long versions; FULLTUNE_FAULT_SEED and FULLTUNE_FAULT_ROUNDS choose what they draw.
"""

import collections
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import (
    SPOILS,
    Job,
    expected_rows,
    final_state,
    metrics,
    rows_hash,
    small_file_system,
    spoil,
    start_with_faults,
    steps_done,
    write_run_file,
)
from ranks import run_ranks
from repository import WORKERS
from safetensors.torch import load_file

from engine.arithmetic import list_checkpoints
from engine.checkpoint.format import verify_checkpoint
from engine.checkpoint.restore import find_checkpoint
from engine.errors import DataError

pytestmark = pytest.mark.ranks
WORKER = WORKERS / "faults_worker.py"
STEPS = 12
SEED = int(os.environ.get("FULLTUNE_FAULT_SEED", "1"))
ROUNDS = int(os.environ.get("FULLTUNE_FAULT_ROUNDS", "5"))
EIO, EROFS, ENOSPC, EDQUOT = 5, 30, 28, 122
COUNTS: collections.Counter[str] = collections.Counter()


@pytest.fixture(scope="module", autouse=True)
def summary() -> Iterator[None]:
    """One line of what was done, and how to do it again."""
    yield
    counts = ", ".join(f"{count} {what}" for what, count in COUNTS.items())
    print(f"\nfaults with FULLTUNE_FAULT_SEED={SEED} FULLTUNE_FAULT_ROUNDS={ROUNDS}: {counts or 'none'}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def golden(folder: Path) -> Path:
    """The run of two ranks that nothing disturbs."""
    job = Job(write_run_file(folder, "golden"), 2)
    assert job.wait() == [0, 0], job.output
    assert_rows_are_the_streams(folder / "golden.yaml")
    return folder / "golden"


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def assert_rows_are_the_streams(run_file: Path) -> None:
    """Each step used the rows that are its own, once each: no sample twice, none missing."""
    got = metrics(run_file.with_suffix(""))
    assert sorted(got) == list(range(1, STEPS + 1))
    for step, rows in enumerate(expected_rows(run_file, STEPS), 1):
        assert got[step]["rows_hash"] == rows_hash(rows), f"step {step} used other rows"


def assert_as_if_undisturbed(run_file: Path, golden: Path) -> None:
    """Bit-equal losses, gradient norms, masters, moments; the same rows."""
    run_dir = run_file.with_suffix("")
    assert_rows_are_the_streams(run_file)
    got, expected = metrics(run_dir), metrics(golden)
    for step in expected:
        for figure in ("loss", "gradient_norm", "learning_rate", "tokens", "epoch", "rows_hash"):
            assert got[step][figure] == expected[step][figure], (step, figure)
    newest = find_checkpoint(run_dir)
    assert newest == checkpoint(run_dir, STEPS)
    assert final_state(newest) == final_state(checkpoint(golden, STEPS))
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert not [name for name in left if name.startswith(".")], left


def assert_sound_or_none(run_dir: Path) -> None:
    for path in list_checkpoints(run_dir):
        verify_checkpoint(path)


# Kills of running training.


def start_to_be_killed(draw: random.Random, run_file: Path, world_size: int) -> tuple[Job, str]:
    """A start in which one rank dies at a random storage call of its saves, or in which nothing dies by itself."""
    if draw.random() < 0.5:
        rank = draw.randrange(world_size)
        number = draw.randint(1, 260 if rank == 0 else 110)
        call, action = draw.choice((("any", "KILL"), ("write", "TORN")))
        rule = f"{call} {action} {rank} {number} {run_file.with_suffix('')}/checkpoints\n"
        return Job(run_file, world_size, rule), "at a storage call"
    return Job(run_file, world_size, launcher=draw.random() < 0.3), "at a time"


def kill_somewhere(draw: random.Random, job: Job, how: str, seconds: float) -> str:
    """Wait for the death of `start_to_be_killed`, or kill: one rank, all, the launcher; says who died."""
    started = time.monotonic()
    moment = draw.uniform(0, seconds) if how == "at a time" else 600.0
    while time.monotonic() - started < moment and job.is_whole:
        time.sleep(0.01)
    if not job.runs:
        return "nobody"
    who = "one rank"
    if how == "at a time":
        pids = job.pids()
        who = draw.choice(("one rank", "all", "the starter and one rank"))
        if who == "one rank":
            pids = [draw.choice(pids)]
        elif who != "all":
            pids = [pids[0], draw.choice(pids)]
        job.kill(pids)
    job.end(grace_seconds=draw.choice((0, 3)))
    return who


def kill_campaign(folder: Path, golden: Path, seed: int, kills: int, seconds: float) -> None:
    draw = random.Random(seed)
    run_file = write_run_file(folder, f"killed-{seed}")
    for _ in range(kills):
        job, how = start_to_be_killed(draw, run_file, 2)
        who = kill_somewhere(draw, job, how, seconds)
        COUNTS[f"kills of {who} {how}"] += 1
        assert_sound_or_none(run_file.with_suffix(""))
        if who == "nobody":
            break
    job = Job(run_file, 2)
    assert job.wait() == [0, 0], f"seed {seed}: {job.output}"
    assert_as_if_undisturbed(run_file, golden)


def test_killed_inside_saves_and_started_again_is_bit_equal(folder: Path, golden: Path) -> None:
    """Rank 1 in the middle of its file, rank 0 right before it publishes; then all at any time."""
    run_file = write_run_file(folder, "killed")
    run_dir = run_file.with_suffix("")
    for rule, found in (
        ("write TORN 1 2 .tmp-step-00000003-", 2),
        ("rename KILL 0 1 checkpoints/step-00000007", 6),
    ):
        job = Job(run_file, 2, rule + "\n")
        while job.is_whole:
            time.sleep(0.02)
        job.end(grace_seconds=2)
        assert len(job.injected) == 1, job.output
        assert find_checkpoint(run_dir) == checkpoint(run_dir, found)
        assert_sound_or_none(run_dir)
        assert [path for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".tmp-step-")]
    job = Job(run_file, 2)
    assert job.wait() == [0, 0], job.output
    assert "resuming after step 6" in job.output
    assert_as_if_undisturbed(run_file, golden)


@pytest.mark.faults
@pytest.mark.parametrize("number", range(ROUNDS))
def test_kill_campaign(folder: Path, golden: Path, number: int) -> None:
    started = time.monotonic()
    write_run_file(folder, "measured")
    job = Job(folder / "measured.yaml", 2)
    assert job.wait() == [0, 0], job.output
    kill_campaign(folder, golden, 1000 * SEED + number, kills=6, seconds=time.monotonic() - started)
    shutil.rmtree(folder / "measured")


# One save, cut at each of its storage calls.


def run_cuts(folder: Path, scenario: str, every: str, some: str = "") -> dict[str, Any]:
    """What tests/support/workers/faults_worker.py saw; see there."""
    (folder / "rules").touch()  # the worker makes its own
    ranks = start_with_faults(
        1, WORKER, folder, "cuts", scenario, every, some, rules=folder / "rules", log=folder / "log"
    )
    output = ranks.wait()
    assert ranks.codes == [0], output
    return dict(json.loads((folder / "cuts.json").read_text()))


def check_cuts(outcome: dict[str, Any], scenario: str) -> None:
    calls = outcome["calls"]
    assert {call for call, _ in calls} == {"mkdir", "create", "write", "fsync", "rename", "unlink", "rmdir"}
    publishing = calls.index(["rename", "checkpoints/step-00000002"]) + 1
    # What belongs to the commit itself; what comes after it may fail without harm.
    last = max(number for number, call in enumerate(calls, 1) if call == ["fsync", "checkpoints"])
    for cut in outcome["cuts"]:
        action, number = cut["action"], cut["number"]
        COUNTS["kills at a call of a save" if action in ("KILL", "TORN") else "calls of a save that failed"] += 1
        if action == "SHORT":
            assert (cut["code"], cut["found"]) == (0, 2), cut
        elif action in ("KILL", "TORN"):
            assert cut["code"] == -signal.SIGKILL, cut
            assert cut["found"] == (2 if number > publishing else 1), cut
        else:
            assert cut["code"] in (0, 74), cut
            # A folder that is there need not be made.
            if number <= last and [cut["call"], cut["path"]] != ["mkdir", "checkpoints"]:
                assert cut["code"] == 74, f"a failure was taken for success: {cut}"
            assert cut["found"] == (2 if number > publishing or cut["code"] == 0 else 1), cut
        assert cut["right"], cut
        damaged = ["step-00000002"] if scenario == "again" and cut["found"] == 1 else []
        assert cut["broken"] == [name for name in damaged if name in cut["listed"]], cut
        assert cut["again"] == 0, cut
        assert cut["newest"] == "step-00000003", cut
        assert cut["newest right"], cut
        assert not [name for name in cut["left"] if name.startswith((".tmp", ".replaced"))], cut


def test_a_save_is_all_or_nothing_at_each_of_its_calls(tmp_path: Path) -> None:
    """Killed at every storage call; torn at writes; and every call fails once with EIO."""
    check_cuts(run_cuts(tmp_path, "new", "KILL", f"TORN,SHORT,{EIO}"), "new")


def test_a_save_in_place_of_a_refused_one_is_all_or_nothing(tmp_path: Path) -> None:
    check_cuts(run_cuts(tmp_path, "again", "", f"KILL,{EIO}"), "again")


@pytest.mark.faults
@pytest.mark.parametrize("scenario", ["new", "again"])
def test_every_call_with_every_fault(tmp_path: Path, scenario: str) -> None:
    check_cuts(run_cuts(tmp_path, scenario, f"KILL,TORN,SHORT,{EIO},{ENOSPC},{EDQUOT},{EROFS}"), scenario)


# Storage that fails under a run.


def test_failed_saves_are_said_and_training_goes_on_to_the_same_end(folder: Path, golden: Path) -> None:
    """Six saves fail in one run, each in another way and none as the third in a row; the last one ends it with 74."""
    rules = [
        f"fsync {EIO} 1 0 .tmp-step-00000002-", f"write {ENOSPC} 0 0 .tmp-step-00000003-",
        f"mkdir {EROFS} 0 0 .tmp-step-00000005-", f"write {EDQUOT} 1 0 .tmp-step-00000006-",
        f"rename {EIO} 0 0 checkpoints/step-00000008", f"fsync {EIO} 0 0 manifest.json",
        f"write {ENOSPC} 0 4 golden-again/metrics.jsonl", f"create {ENOSPC} 0 0 ranks/.exit-00000",
        f"create {EIO} 1 0 .tmp-step-00000012-",
    ]  # fmt: skip
    rules[5] = f"create {EROFS} 0 0 .tmp-step-00000009-"
    run_file = write_run_file(folder, "golden-again")
    run_dir = run_file.with_suffix("")
    job = Job(run_file, 2, "\n".join(rules) + "\n")
    assert job.wait() == [74, 74], job.output
    COUNTS["storage calls of a run that failed"] += len(job.injected)
    assert {line[2] for line in job.injected} == {str(EIO), str(ENOSPC), str(EROFS), str(EDQUOT)}
    assert job.output.count("NOT SAVED (failure 1 of 3)") == 3, job.output
    assert job.output.count("NOT SAVED (failure 2 of 3)") == 3, job.output
    assert "metrics.jsonl cannot be written" in job.output
    for text in ("Input/output error", "No space left on device", "Read-only file system", "Disk quota exceeded"):
        assert text in job.output
    assert "Traceback" not in job.output
    assert find_checkpoint(run_dir) == checkpoint(run_dir, 11)
    assert [path.name for path in list_checkpoints(run_dir)][-2:] == ["step-00000010", "step-00000011"]
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))
    assert_sound_or_none(run_dir)
    job = Job(run_file, 2)
    assert job.wait() == [0, 0], job.output
    assert "resuming after step 11" in job.output
    assert_as_if_undisturbed(run_file, golden)


@pytest.mark.parametrize("kind", ["bytes", "inodes"])
def test_a_full_disk_leaves_the_checkpoint_that_is_there(tmp_path: Path, kind: str) -> None:
    with small_file_system(tmp_path / "small", "size=4m" if kind == "bytes" else "size=4m,nr_inodes=40") as small:
        run_ranks(1, WORKER, small, "full", kind)
    results = json.loads((tmp_path / "small.json").read_text())
    assert len(results) >= 5
    for result in results:
        COUNTS["saves on a full disk"] += 1
        error, message, code = result["error"]
        assert (error, code) == ("StorageError", 74), result
        assert "No space left on device" in message
        assert "/checkpoints/" in message
        published = message.split(":")[1].rpartition("/")[2].startswith(".tmp-latest")  # room for all but the hint
        assert published == (kind == "inodes" and result["level"] == 4), result
        expected = ["step-00000001", *(["step-00000006"] if published else [])]
        assert result["found"] == expected[-1], result
        assert result["left"] == ["latest", *expected], result
        assert result["intact"] and result["again"], result


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["bytes", "inodes"])
def test_a_run_on_a_full_disk_ends_with_74_and_goes_on_when_there_is_room(
    folder: Path, golden: Path, kind: str
) -> None:
    with small_file_system(folder / f"full-{kind}", "size=8m" if kind == "bytes" else "size=8m,nr_inodes=200") as small:
        run_file = write_run_file(folder, f"full-{kind}")
        job = Job(run_file, 2)
        while steps_done(small) < 3 and job.runs:
            time.sleep(0.02)
        ballast = small / "ballast"
        ballast.mkdir()
        try:
            for number in range(10_000):
                (ballast / str(number)).write_bytes(bytes(1 << 16 if kind == "bytes" else 0))
        except OSError:
            pass
        assert job.wait() == [74, 74], job.output
        assert "NOT SAVED (failure 2 of 3)" in job.output
        assert find_checkpoint(small) is not None
        shutil.rmtree(ballast)
        job = Job(run_file, 2)
        assert job.wait() == [0, 0], job.output
        assert_as_if_undisturbed(run_file, golden)


# Files that are not what was written.


def spoiled_checkpoints(golden: Path, tmp_path: Path, seed: int, rounds: int, caplog: Any) -> None:
    """Draws damages; each is refused by name, and the checkpoint before is used; without damage the newest is."""
    draw = random.Random(seed)
    run_dir = tmp_path / "run"
    shutil.copytree(golden / "checkpoints", run_dir / "checkpoints")
    newest, older = checkpoint(run_dir, STEPS), checkpoint(run_dir, STEPS - 1)
    files = sorted(path.name for path in newest.iterdir())
    assert len(files) == 4
    pristine = tmp_path / "pristine"
    shutil.copytree(newest, pristine)
    plans = [(file, how) for file in files for how in SPOILS]
    plans += [(draw.choice(files), "a flipped bit") for _ in range(rounds)]
    for number, (file, how) in enumerate(plans):
        caplog.clear()
        where = spoil(newest, file, how, draw, older / file)
        what = f"{file}: {how} {where} (seed {seed})"
        assert find_checkpoint(run_dir) == older, what
        assert file in caplog.text or how == "swapped", what
        with pytest.raises(DataError):
            verify_checkpoint(newest)
        shutil.rmtree(newest)
        shutil.copytree(pristine, newest)
        (newest.parent / "aside").unlink(missing_ok=True)
        COUNTS["damages refused"] += 1
        if number % 8 == 0:
            caplog.clear()
            assert find_checkpoint(run_dir) == newest
            assert not caplog.text, "a false alarm"
            COUNTS["clean loads without an alarm"] += 1
    for extra in ("slices-00002-of-00003.safetensors", "pytorch_model.bin", "another"):
        (newest / extra).write_bytes(b"")
        with pytest.raises(DataError, match=extra):
            verify_checkpoint(newest)
        (newest / extra).unlink()
    for pointer in (None, b"", b"step-00000099", b"../..", b"\xff\xfe\x00", b"x" * 1_000_000):
        latest = newest.parent / "latest"
        latest.unlink(missing_ok=True)
        if pointer is not None:
            latest.write_bytes(pointer)
        assert find_checkpoint(run_dir) == newest


def test_spoiled_files_are_refused(golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoiled_checkpoints(golden, tmp_path, seed=1, rounds=200, caplog=caplog)


@pytest.mark.faults
def test_corruption_campaign(golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoiled_checkpoints(golden, tmp_path, seed=SEED, rounds=2000 * ROUNDS, caplog=caplog)


def test_spoiled_files_are_refused_by_all_ranks(tmp_path: Path) -> None:
    run_ranks(2, WORKER, tmp_path, "spoil")
    outcomes = [json.loads((tmp_path / f"spoiled-{rank}.json").read_text()) for rank in (0, 1)]
    assert outcomes[0] == outcomes[1]
    results, clean = outcomes[0]
    assert clean == 3
    assert len(results) == 4 * len(SPOILS)
    for file, how, error, step in results:
        COUNTS["damages refused by ranks"] += 1
        assert error, (file, how)
        assert file in error or how == "swapped", (file, how, error)
        assert step == 2, (file, how)


# Another number of ranks, and two jobs on one folder.


def world_size_schedule(folder: Path, name: str, golden: Path, sizes: tuple[int, ...], seed: int) -> None:
    """Each size but the last is killed; what each installs is what the checkpoint holds; the rows are the same."""
    draw = random.Random(seed)
    run_file = write_run_file(folder, name, checkpoint={"save_every_steps": 1, "keep_checkpoints": 99})
    run_dir = run_file.with_suffix("")
    each = STEPS // len(sizes)
    for number, size in enumerate(sizes):
        job = Job(run_file, size, program=(str(WORKER),))
        if number + 1 == len(sizes):
            assert job.wait() == [0] * size, job.output
            break
        while steps_done(run_dir) < each * (number + 1) and job.runs:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        job.kill(job.pids())
        job.end()
        assert "Traceback" not in job.output, job.output
        assert_sound_or_none(run_dir)
    installed = sorted(folder.glob(f"resumed-{name}-*.safetensors"))
    assert len(installed) == len(sizes) - 1
    for path in installed:
        step = int(path.name.split("-")[-3])
        saved, now = final_state(checkpoint(run_dir, step)), load_file(path)
        for key, data in saved.items():
            same = now[key.replace("frozen/", "weight/")].reshape(-1).contiguous().view(torch.uint8)
            assert same.numpy().tobytes() == data, (path.name, key)
            COUNTS["tensors bit-equal after a resume"] += 1
    assert_rows_are_the_streams(run_file)
    got, expected = metrics(run_dir), metrics(golden)
    for step in expected:
        for figure in ("rows_hash", "tokens", "learning_rate"):
            assert got[step][figure] == expected[step][figure], (step, figure)


def test_another_number_of_ranks_goes_on_with_the_same_bits_and_rows(folder: Path, golden: Path) -> None:
    world_size_schedule(folder, "sizes", golden, (1, 3), seed=1)


@pytest.mark.faults
def test_world_size_schedule(folder: Path, golden: Path) -> None:
    world_size_schedule(folder, "many-sizes", golden, (1, 2, 4, 3, 1), seed=SEED)


def wait_until_stopped(job: Job) -> None:
    """Wait until a process of the job stands still in the storage call that its rule names."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and job.runs:
        for pid in job.pids():
            if "State:\tT" in Path(f"/proc/{pid}/status").read_text():
                return
        time.sleep(0.02)
    raise AssertionError(f"never stopped:\n{job.output}")


@pytest.mark.parametrize(
    ("call", "begun_only"),
    [
        ("rename STOP 0 1 checkpoints/step-00000004", False),
        ("fsync STOP 0 1 .tmp-step-00000004-", True),
        pytest.param("fsync STOP 0 1 .tmp-step-00000004-", False, marks=pytest.mark.faults),
    ],
)
def test_a_job_that_wakes_up_after_another_took_over_publishes_nothing(
    folder: Path, call: str, begun_only: bool
) -> None:
    """Job A sleeps inside a save; B takes the folder, as on a file system without locks, and ends the run."""
    run_file = write_run_file(folder, f"zombie-{call.split()[0]}-{begun_only}")
    run_dir = run_file.with_suffix("")
    first = Job(run_file, 1, call + "\n")
    wait_until_stopped(first)
    assert find_checkpoint(run_dir) == checkpoint(run_dir, 3)
    if begun_only:  # all of A's files are still there
        owner = json.loads((run_dir / "owner.json").read_text())
        (run_dir / "owner.json").write_text(json.dumps(owner | {"generation": owner["generation"] + 1}))
    else:
        (run_dir / "owner.lock").unlink()
        second = Job(run_file, 1)
        assert second.wait() == [0], second.output
        assert "resuming after step 3" in second.output
    contents = {path: path.stat().st_mtime_ns for path in run_dir.glob("checkpoints/*/*")}
    latest = (run_dir / "checkpoints" / "latest").read_text()
    first.kill(first.pids(), signal.SIGCONT)
    assert first.wait() == [73], first.output
    assert "was taken over by a newer job; this one may not publish" in first.output
    COUNTS["stale writers refused"] += 1
    kept = {path: time for path, time in contents.items() if ".tmp-" not in str(path)}
    assert {path: path.stat().st_mtime_ns for path in run_dir.glob("checkpoints/*/*")} == kept
    assert (run_dir / "checkpoints" / "latest").read_text() == latest
    assert find_checkpoint(run_dir) == checkpoint(run_dir, 3 if begun_only else STEPS)
