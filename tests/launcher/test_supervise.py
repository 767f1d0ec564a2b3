"""What `fulltune train` does about ranks that fail, hang, starve, or are asked to stop; real ranks throughout."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fault_runs import make_run, started
from memory_limit import memory_limit
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("supervise")


def state_bytes(run_dir: Path, step: int) -> dict[str, bytes]:
    files = sorted((run_dir / "checkpoints" / f"step-{step:08d}").glob("slices-*.safetensors"))
    assert len(files) == 2
    return {f"{file.name}:{name}": value.numpy().tobytes() for file in files for name, value in load_file(file).items()}


def steps_logged(run_dir: Path) -> list[int]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == "train"]


@pytest.mark.ranks
def test_stopped_within_a_step_it_goes_on_bit_by_bit(folder: Path) -> None:
    """A half-done accumulation leaves no trace; STOP is done with, HOLD keeps the run from starting."""
    with started(make_run(folder, "straight", steps=5)) as run:
        assert run.wait()[0] == 0
    run_file = make_run(folder, "stopped", steps=5, checkpoint={"save_every_steps": 100})
    with started(run_file, "slow") as run:
        run.wait_until(lambda: any(b.step == 2 and b.activity == "after backward" for b in run.beats().values()))
        (run.run_dir / "STOP").touch()
        code, output = run.wait()
        assert code == 75, output
        assert not (run.run_dir / "STOP").exists()
        assert run.exits()[0]["signal"] == "the file STOP"
        assert len(steps_logged(run.run_dir)) < 5
    with started(run_file, "slow") as run:
        run.wait_until(lambda: any(b.step == 4 and b.activity == "after forward" for b in run.beats().values()))
        (run.run_dir / "HOLD").touch()
        assert run.wait()[0] == 75
    with started(run_file) as run:
        code, output = run.wait()
        assert code == 78
        assert output.rstrip().endswith(f"is on hold: remove {run.run_dir / 'HOLD'} to go on")
    (run_file.with_suffix("") / "HOLD").unlink()
    with started(run_file) as run:
        assert run.wait()[0] == 0
        run.assert_nothing_is_left()
    assert steps_logged(run.run_dir) == [1, 2, 3, 4, 5]
    assert state_bytes(folder / "stopped", 5) == state_bytes(folder / "straight", 5)


@pytest.mark.long
@pytest.mark.ranks
def test_before_the_time_limit_there_is_time_for_a_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end that a batch system has announced: the ranks stop as long before it as a save takes, which they measure."""
    run_file = make_run(folder, "limited", steps=10_000, checkpoint={"save_every_steps": 2})
    end = int(time.time()) + 60
    monkeypatch.setenv("FULLTUNE_END_TIME", str(end))
    with started(run_file, "slow slow_save") as run:
        code, output = run.wait()
        assert code == 75, output
        asked = [record["signal"] for record in run.exits().values() if record["signal"]]
        # How long before it is tested with a clock, in test_liveness: a busy machine may start late.
        assert asked
        assert all(reason.startswith("the time limit, ") for reason in asked), asked
        assert time.time() < end
        assert "checkpoint committed" in run.exits()[0]["message"]
    monkeypatch.setenv("FULLTUNE_END_TIME", "tomorrow")
    with started(run_file) as run:
        code, output = run.wait()
        assert code == 78
        assert "FULLTUNE_END_TIME=tomorrow: write seconds since 1970" in output


@pytest.mark.long
@pytest.mark.ranks
def test_restarted_by_itself_as_long_as_it_gets_further(folder: Path) -> None:
    run_file = make_run(folder, "again", steps=5)
    with started(run_file, "raise_once:1:3", "--restarts", "3", "--fresh") as run:
        code, output = run.wait()
        assert code == 0, output
        assert "the data loader broke once" in output
        assert "fulltune: restart 1 of 3, after step 1" in output, "the checkpoint of step 2 was still being written"
        assert "restart 2" not in output
        assert steps_logged(run.run_dir) == [1, 2, 3, 4, 5]
        assert (run.run_dir / "ranks" / "rank-00001.log").read_text().count("--- started") == 2
    with started(make_run(folder, "no-further", steps=5), "raise:1:3", "--restarts", "5") as run:
        code, output = run.wait()
        assert code == 70
        last = output.rstrip().splitlines()[-1]
        assert "rank 1 ended with exit code 70 in phase step: RuntimeError: the data loader broke on purpose" in last
        assert last.endswith("not restarted again: no newer checkpoint than step 1 since the last one")
        trace = output[output.rindex("Traceback (most recent call last)") :]
        assert "in misbehave" in trace, "the traceback of the rank that failed first is the last one"
        assert "gloo" not in trace
        run.assert_nothing_is_left()


HANGS = {
    "pipe:1:200": "in misbehave", "lock:0:200": "in misbehave", "gil:1:200": "in misbehave", "alone:1:200": "in barrier",
}  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=pytest.mark.ranks if "pipe" in fault else pytest.mark.faults) for fault in HANGS],
)
def test_a_rank_that_hangs_is_named_with_all_stacks(folder: Path, fault: str) -> None:
    what, rank, _ = fault.split(":")
    run_file = make_run(folder, f"hang-{what}", steps=400, checkpoint={"save_every_steps": 100})
    with started(run_file, fault, "--hang-seconds", "6") as run:
        code, output = run.wait()
        assert code == 76, output
        run.assert_nothing_is_left()
        last = output.rstrip().splitlines()[-1]
        assert f"rank {rank} on {os.uname().nodename} hangs in step 200" in last
        stacks = (run.run_dir / "ranks" / "hang.txt").read_text()
        assert HANGS[fault] in stacks.partition(f"=== rank {rank}:")[2].partition("=== rank")[0]
        assert stacks.count("in train_step") == 2, "the stacks of both ranks"
        assert run.exits()[int(rank)]["step"] == 200


@pytest.mark.parametrize(
    "phase", [pytest.param("step", marks=pytest.mark.ranks), pytest.param("import", marks=pytest.mark.faults)]
)
def test_a_stopped_rank_is_found_in_every_phase(folder: Path, phase: str) -> None:
    with started(make_run(folder, f"stopped-{phase}", steps=60), "slow", "--hang-seconds", "6") as run:
        run.wait_for_phase(phase)
        os.kill(run.pid("rank-1"), signal.SIGSTOP)
        code, output = run.wait()
        assert code == 76, output
        assert f"rank 1 on {os.uname().nodename} is stopped (state T) in " in output.rstrip().splitlines()[-1]
        assert "State:\tT (stopped)" in (run.run_dir / "ranks" / "hang.txt").read_text()
        run.assert_nothing_is_left()


@pytest.mark.faults
def test_nothing_is_left_when_the_supervisor_is_killed_and_a_rank_cannot_move(folder: Path) -> None:
    with started(make_run(folder, "guarded", steps=60), "slow") as run:
        run.wait_for_phase("step", step=2)
        os.kill(run.pid("rank-0"), signal.SIGSTOP)
        run.process.kill()
        run.wait()
        run.assert_nothing_is_left(within_seconds=30)


@pytest.mark.faults
def test_ranks_that_are_stuck_in_their_start_are_ended_when_asked(folder: Path) -> None:
    with started(make_run(folder, "stuck-start"), "stuck_start") as run:
        run.wait_until(lambda: len(run.beats()) == 2)
        run.process.terminate()
        code, output = run.wait()
        assert code == 75, output
        assert "stopped on request while the ranks were starting" in output
        run.assert_nothing_is_left()


@pytest.mark.faults
def test_a_crash_of_native_code_shows_its_stack(folder: Path) -> None:
    with started(make_run(folder, "native"), "segv:1:3") as run:
        code, output = run.wait()
        assert code == 76
        assert "Fatal Python error: Segmentation fault" in output
        assert "rank 1 was killed (signal 11, SIGSEGV) in phase step, step 3" in output.rstrip().splitlines()[-1]
        run.assert_nothing_is_left()


@pytest.mark.faults
def test_an_out_of_memory_kill_is_recognised_and_explained(folder: Path) -> None:
    inside = ("sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"')
    with memory_limit(3 << 30) as cgroup:
        run_file = make_run(folder, "starved", steps=10)
        with started(run_file, "eat:1:3", launcher_prefix=(*inside, str(cgroup))) as run:
            code, output = run.wait()
            assert code == 76, output
            run.assert_nothing_is_left()
            last = output.rstrip().splitlines()[-1]
            assert last.startswith("fulltune: host memory: rank 1 was killed (signal 9, SIGKILL) in phase step, step 3")
            assert "by the out-of-memory killer (" in last
            assert "; last seen: rank 0 " in last
            record: dict[str, Any] = run.exits()[1]
            assert (record["signal"], record["phase"], record["step"]) == ("SIGKILL", "step", 3)


@pytest.mark.faults
def test_repeated_signals_save_once_and_never_kill(folder: Path) -> None:
    """In every order and in the middle of the save."""
    with started(make_run(folder, "repeated", steps=60), "slow slow_save") as run:
        run.wait_for_phase("step", step=2)
        ranks = [run.pid("rank-0"), run.pid("rank-1")]
        for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGCONT):
            for pid in (run.process.pid, *ranks):
                os.kill(pid, number)
        run.wait_until(lambda: any(beat.phase == "save" for beat in run.beats().values()))
        for pid in (run.process.pid, *ranks):
            os.kill(pid, signal.SIGTERM)
        code, output = run.wait()
        assert code == 75, output
        assert output.count("fulltune: stopping: ") == 1
        step = max(int(path.name.removeprefix("step-")) for path in (run.run_dir / "checkpoints").glob("step-*"))
        assert output.count(f"checkpoint step-{step:08d} committed") == 1
        run.assert_nothing_is_left()
