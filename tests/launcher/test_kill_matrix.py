"""Signals and deaths of every process of a job, at every phase: exit code, no survivor, no shared memory.

A few of them run with all tests; all of them with ``pytest -m faults``.
"""

import itertools
import os
import signal
from pathlib import Path

import pytest
from fault_runs import FaultRun, make_run, started

PHASES = ("start", "step", "save")
TARGETS = ("launcher", "deepspeed", "rank-0", "rank-1")
SIGNALS = ("KILL", "TERM", "INT", "USR1")
SHORT = {("KILL", "launcher", "step"), ("KILL", "rank-1", "step"), ("TERM", "rank-0", "save")}
LONG = {("KILL", "deepspeed", "save"), ("INT", "rank-1", "step"), ("USR1", "launcher", "start")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


def reach(run: FaultRun, phase: str) -> None:
    """Until the job is where it shall be disturbed; always after `deepspeed` has started its ranks."""
    if phase == "start":
        run.wait_until(lambda: len(run.beats()) == 2)
    elif phase == "step":
        run.wait_for_phase("step", step=3)
    else:
        run.wait_until(lambda: any((run.run_dir / "checkpoints").glob(".tmp-step-00000002-*")))


def expected_code(number: str, target: str) -> int:
    """As designed: what is asked to stop stops with a checkpoint; a killed rank is a lost one."""
    if number == "KILL" and target == "launcher":
        return -9
    return 76 if number == "KILL" and target.startswith("rank") else 75


def matrix() -> list[object]:
    cases = itertools.product(SIGNALS, TARGETS, PHASES)
    ranks, long = pytest.mark.ranks, pytest.mark.long
    marks = dict.fromkeys(SHORT, ranks) | dict.fromkeys(LONG, (ranks, long))
    return [pytest.param(*case, marks=marks.get(case, pytest.mark.faults)) for case in cases]


@pytest.mark.parametrize(("number", "target", "phase"), matrix())
def test_whatever_is_killed_or_signalled(folder: Path, number: str, target: str, phase: str) -> None:
    run_file = make_run(folder, f"{number}-{target}-{phase}", steps=60)
    with started(run_file, "slow slow_save") as run:
        reach(run, phase)
        os.kill(run.pid(target), getattr(signal, f"SIG{number}"))
        code, output = run.wait()
        # Asked while they start, ranks on a busy machine may come to no micro-batch in the time they have.
        is_early = number == "KILL" and phase == "start"
        assert code == expected_code(number, target) or (is_early and code == 76), output
        run.assert_nothing_is_left()
        exits = run.exits()
        assert is_early or sorted(exits) == [0, 1], "every rank has a record, a killed one by the supervisor"
        if code == 75 or (number == "KILL" and target == "launcher"):
            assert {record["code"] for record in exits.values()} <= ({75, 76} if is_early else {75}), exits
            if phase != "start":
                step = max(
                    int(path.name.removeprefix("step-")) for path in (run.run_dir / "checkpoints").glob("step-*")
                )
                assert f"stopped on request after step {step}, checkpoint committed" in exits[0]["message"]
        if code == 76:
            if not target.startswith("rank"):
                return
            killed = exits[int(target[-1])]
            assert killed["written_by"] == "supervisor"
            # `deepspeed` may have buried a rank that was killed at once before anybody saw of what it died.
            seen = [
                killed["signal"] == "SIGKILL",
                f"rank {target[-1]} was killed (signal 9, SIGKILL) in phase " in output,
            ]
            assert all(seen) or (is_early and f"rank {target[-1]} was killed in phase " in output), output
            assert "was killed" in output.rstrip().splitlines()[-1]
