"""The tests' own ranks (tests/support/ranks.py): how a failure is shown, and that none outlives its test."""

import os
import signal
import time
from pathlib import Path

import pytest
from faults import Job
from ranks import rank_parent, run_ranks

pytestmark = pytest.mark.ranks
PROGRAM = """\
import os, sys, time
from pathlib import Path

folder = Path(sys.argv[1]).with_suffix("")
folder.mkdir(exist_ok=True)
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True)
for number in range(int(os.environ.get("FILES", "4"))):
    (folder / f"{os.environ['RANK']}-{number}").write_text("x")
    time.sleep(0.1)
sys.exit(75 if os.environ["RANK"] == "1" else 0)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_codes_and_output_are_those_of_all_ranks(program: Path, tmp_path: Path) -> None:
    output = run_ranks(2, program, tmp_path / "run", expected_codes=(0, 75))
    assert sorted(output.split("\n")) == ["", "rank 0 of 2", "rank 1 of 2"]
    with pytest.raises(AssertionError, match=r"ended with \[0, 75\]:\n(?s:.*)rank 1 of 2"):
        run_ranks(2, program, tmp_path / "run")
    program.write_text("raise RuntimeError('broken on purpose')")
    with pytest.raises(AssertionError, match="RuntimeError: broken on purpose"):
        run_ranks(1, program)


def test_a_killed_rank_ends_the_others_and_nobody_outlives_the_limit(program: Path, tmp_path: Path) -> None:
    ranks = rank_parent().start(2, program, tmp_path / "run", FILES="1000")
    os.kill(ranks.pids[0], signal.SIGKILL)
    ranks.wait(60)
    assert ranks.codes == [-signal.SIGKILL, -signal.SIGTERM]
    ranks = rank_parent().start(2, program, tmp_path / "run", FILES="1000")
    with pytest.raises(AssertionError, match="did not end in 1 s:\nrank"):
        ranks.wait(1)
    assert ranks.codes == [-signal.SIGKILL] * 2
    forgotten = rank_parent().start(1, program, tmp_path / "run", FILES="1000").pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in (*ranks.pids, *forgotten))


def test_storage_fails_as_the_rules_say_and_srun_leaves_the_others_alone(program: Path, tmp_path: Path) -> None:
    words = (str(program),)
    job = Job(tmp_path / "full.yaml", 2, "write 28 0 2 /full/0-\n", program=words)
    assert job.wait() == [1, 75]
    assert "No space left on device" in job.output
    assert [line[:3] for line in job.injected] == [["0", "write", "28"]]
    job = Job(tmp_path / "killed.yaml", 2, "create KILL 1 1 /killed/1-\n", program=words)
    while job.is_whole:
        time.sleep(0.01)
    assert len(job.pids()) == 1
    assert job.wait() == [0, -signal.SIGKILL]
    assert not job.runs
