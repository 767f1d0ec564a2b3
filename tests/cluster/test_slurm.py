"""Training on a real Slurm of two nodes: submitted, stopped in every way, and the same bits in the end.

The ranks are real ones, one a node, as in test_resume; both nodes are this machine.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import ROOT
from slurm_cluster import SlurmCluster
from training_runs import metrics, run_file, state_bytes, wait_for_step

# A step takes about a second, and a preemption comes within a few.
STEPS, LONG_STEPS, ROWS = 20, 120, 12
FIGURES = ("loss", "gradient_norm", "learning_rate", "tokens", "epoch")
TWO_NODES = ("--nodes", "2", "--ranks-per-node", "1", "--cpus-per-rank", "1")
PYTHON = {
    "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


def make_run(folder: Path, name: str, **changes: Any) -> Path:
    wanted = {"duration": {"steps": STEPS}, "batch__global_rows": ROWS, "checkpoint__save_every_steps": 4}
    return run_file(folder, name, **(wanted | changes))


def fulltune(cluster: SlurmCluster, *words: str | Path, check: bool = True) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "launcher.cli", *map(str, words)]
    done = subprocess.run(
        command, env=cluster.environment | PYTHON, capture_output=True, text=True, timeout=120, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def submit(cluster: SlurmCluster, path: Path, *words: str | Path) -> int:
    """`fulltune submit` on both nodes; the job's id."""
    fulltune(cluster, "submit", path, *TWO_NODES, *words)
    return int(json.loads((path.with_suffix("") / "job.json").read_text())["job_id"])


def log_of(run_dir: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(run_dir.glob("slurm-[0-9]*.log")))


def wait_until(cluster: SlurmCluster, job: int, run_dir: Path, *states: str, timeout: float = 240) -> dict[str, str]:
    """Wait for the end of a job, letting it start again at once whenever it was requeued."""
    deadline = time.monotonic() + timeout
    while (facts := cluster.job(job))["JobState"] not in states:
        assert time.monotonic() < deadline, f"{facts}\n{log_of(run_dir)[-6000:]}"
        if facts["JobState"] == "PENDING" and facts["Reason"] == "BeginTime":
            cluster.release(job)
        assert facts["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), (
            f"{facts}\n{log_of(run_dir)[-6000:]}"
        )
        time.sleep(0.3)
    return facts


def last_step(run_dir: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


def assert_same(run_dir: Path, undisturbed: Path, steps: int = STEPS) -> None:
    """Every step's figures once, and the final state, are those of the run that nobody disturbed, to the bit."""
    expected, got = metrics(undisturbed), metrics(run_dir)
    assert sorted(got) == sorted(expected) == list(range(1, steps + 1))
    for step in expected:
        for figure in FIGURES:
            assert got[step][figure] == expected[step][figure], (step, figure)
    assert state_bytes(run_dir, steps) == state_bytes(undisturbed, steps)


@pytest.fixture(scope="module")
def undisturbed(session_cluster: SlurmCluster, folder: Path) -> Path:
    """Two nodes, one rank each, through `fulltune submit` with the store made in a job before it."""
    path = make_run(folder, "undisturbed")
    shutil.rmtree(folder / "stores")
    told = fulltune(
        session_cluster, "submit", path, *TWO_NODES, "--prepare", "--prepare-cpus", "1", "--partition", "normal",
        "--time", "30",
    ).stdout  # fmt: skip
    run_dir = folder / "undisturbed"
    job = int(json.loads((run_dir / "job.json").read_text())["job_id"])
    assert f"training: Slurm job {job}, after job {job - 1}, log {run_dir}/slurm-{job}.log" in told
    wait_until(session_cluster, job, run_dir, "COMPLETED")
    assert (folder / "stores").is_dir()
    return run_dir


def test_a_submitted_run_trains_on_both_nodes(undisturbed: Path, cluster: SlurmCluster) -> None:
    log = log_of(undisturbed)
    assert "starting: srun --kill-on-bad-exit=1 " in log, "the exact command"
    assert f"ZeRO-3 on 2 ranks, {STEPS} steps" in log
    manifest = json.loads((undisturbed / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text())
    assert manifest["written_by"]["world_size"] == 2
    (port,) = set(re.findall(r"--master-port=(\d+)", log))
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))
    for name in ("job.json", "submitted.yaml", "train.sbatch", "prepare.sbatch", "complete.json"):
        assert (undisturbed / name).stat().st_mode & 0o777 == 0o600, name
    assert undisturbed.stat().st_mode & 0o777 == 0o700
    assert log == fulltune(cluster, "logs", undisturbed).stdout


def test_status_names_what_it_knows(undisturbed: Path, cluster: SlurmCluster) -> None:
    lines = fulltune(cluster, "status", undisturbed).stdout.splitlines()
    words = lines[1].split()
    assert words[:3] == [str(undisturbed), "complete", str(STEPS)]
    assert fulltune(cluster, "stop", undisturbed, check=False).returncode == 66


def test_a_complete_run_ends_at_once(undisturbed: Path, cluster: SlurmCluster, folder: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_text()
    job = submit(cluster, folder / "undisturbed.yaml")
    facts = cluster.wait_for(job, "COMPLETED", "FAILED", timeout=60)
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0")
    log = (undisturbed / f"slurm-{job}.log").read_text()
    assert "already complete, nothing to do" in log
    assert "srun" not in log
    assert (undisturbed / "metrics.jsonl").read_text() == before


def preempt(cluster: SlurmCluster, job: int) -> None:
    """A job of the partition `high` takes both nodes for a moment."""
    high = cluster.submit("-p", "high", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    cluster.wait_for(high, "COMPLETED", timeout=120)
    cluster.wait_for(job, "PENDING", timeout=120)


def preempt_often(cluster: SlurmCluster, path: Path, partition: str, cycles: int) -> Path:
    """Submit a run, preempt it so many times, each after a step of its own, and see it through to its end."""
    run_dir, step = path.with_suffix(""), 0
    job = submit(cluster, path, "--partition", partition)
    for _ in range(cycles):
        wait_for_step(run_dir, step + 1)
        preempt(cluster, job)
        assert last_step(run_dir) == max(metrics(run_dir)), "the preemption cost steps"
        step = last_step(run_dir)
        cluster.release(job)
    facts = wait_until(cluster, job, run_dir, "COMPLETED", timeout=400)
    assert int(facts["Restarts"]) == cycles
    assert log_of(run_dir).count("resuming after step") == cycles
    return run_dir


# `normal` has GraceTime 0, `patient` 20 seconds.
@pytest.mark.parametrize("partition", ["normal", pytest.param("patient", marks=pytest.mark.long)])
def test_a_preempted_run_comes_back(partition: str, undisturbed: Path, cluster: SlurmCluster, folder: Path) -> None:
    run_dir = preempt_often(cluster, make_run(folder, f"preempted-{partition}"), partition, cycles=2)
    assert_same(run_dir, undisturbed)


@pytest.fixture(scope="module")
def calm(session_cluster: SlurmCluster, folder: Path) -> Path:
    """A longer run that nobody disturbs."""
    job = submit(session_cluster, make_run(folder, "calm", duration={"steps": LONG_STEPS}))
    wait_until(session_cluster, job, folder / "calm", "COMPLETED", timeout=400)
    return folder / "calm"


@pytest.mark.long
@pytest.mark.parametrize("partition", ["normal", "patient"])
def test_a_run_that_is_preempted_ten_times(partition: str, calm: Path, cluster: SlurmCluster, folder: Path) -> None:
    path = make_run(folder, f"tossed-{partition}", duration={"steps": LONG_STEPS})
    run_dir = preempt_often(cluster, path, partition, cycles=10)
    assert_same(run_dir, calm, LONG_STEPS)


def reach_the_time_limit(cluster: SlurmCluster, path: Path, run_dir: Path) -> int:
    """Submit a run with Slurm's shortest limit, until it has come back for its sake; the job's id."""
    job = submit(cluster, path, "--time", "1", "--stop-seconds", "40")
    # A minute; a busy machine does not get to the first step before it is told to stop.
    for minutes in (2, 3, 4):
        cluster.wait_for(job, "RUNNING")
        cluster.wait_for(job, "PENDING", timeout=60 * minutes)
        if (run_dir / "metrics.jsonl").exists() and metrics(run_dir):
            break
        cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
        cluster.release(job)
    assert last_step(run_dir) == max(metrics(run_dir)), "the time limit cost steps"
    assert "stopped with a checkpoint: requeueing" in log_of(run_dir)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    return job


def test_the_time_limit_is_no_end(cluster: SlurmCluster, folder: Path) -> None:
    """The ranks are told before the limit, or know it themselves; they save, the script requeues, and on it goes."""
    path, run_dir = make_run(folder, "limited", duration={"steps": 2000}), folder / "limited"
    job = reach_the_time_limit(cluster, path, run_dir)
    step = last_step(run_dir)
    cluster.release(job)
    wait_for_step(run_dir, step + 1)
    assert f"resuming after step {step}" in log_of(run_dir)


@pytest.mark.long
def test_the_time_limit_changes_nothing(calm: Path, cluster: SlurmCluster, folder: Path) -> None:
    path, run_dir = make_run(folder, "limited-calm", duration={"steps": LONG_STEPS}), folder / "limited-calm"
    job = reach_the_time_limit(cluster, path, run_dir)
    assert int(wait_until(cluster, job, run_dir, "COMPLETED", timeout=400)["Restarts"]) >= 1
    assert_same(run_dir, calm, LONG_STEPS)


@pytest.mark.long
def test_a_cancelled_job_saves_and_stays_away(undisturbed: Path, cluster: SlurmCluster, folder: Path) -> None:
    path, run_dir = make_run(folder, "cancelled"), folder / "cancelled"
    job = submit(cluster, path)
    wait_for_step(run_dir, 2)
    cluster.run("scancel", str(job))
    facts = cluster.wait_for(job, "CANCELLED", timeout=60)
    time.sleep(3)
    assert cluster.job(job)["JobState"] == "CANCELLED", "a cancelled job came back"
    assert facts["Restarts"] == "0"
    assert "stopped on request after step" in log_of(run_dir)
    again = submit(cluster, path)
    wait_until(cluster, again, run_dir, "COMPLETED")
    assert_same(run_dir, undisturbed)


@pytest.mark.long
def test_stop_saves_and_stays_away(undisturbed: Path, cluster: SlurmCluster, folder: Path) -> None:
    path, run_dir = make_run(folder, "stopped"), folder / "stopped"
    job = submit(cluster, path)
    refused = fulltune(cluster, "submit", path, *TWO_NODES, check=False)
    assert refused.returncode == 73
    assert f"Slurm job {job} has it" in refused.stderr
    wait_for_step(run_dir, 2)
    assert fulltune(cluster, "status", run_dir).stdout.splitlines()[1].split()[1] == "running"
    following = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "logs", "-f", str(run_dir)], env=cluster.environment | PYTHON,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "does not come back" in fulltune(cluster, "stop", run_dir).stdout
    facts = cluster.wait_for(job, "FAILED", timeout=60)
    assert facts["ExitCode"] == "75:0"
    followed, _ = following.communicate(timeout=30)
    assert followed == log_of(run_dir)
    assert "not requeued: it was stopped for good" in followed
    assert fulltune(cluster, "status", run_dir).stdout.splitlines()[1].split()[1] == "stopped"
    again = submit(cluster, path)
    wait_until(cluster, again, run_dir, "COMPLETED")
    assert_same(run_dir, undisturbed)


@pytest.mark.long
def test_on_hold_it_stays_away_and_what_has_not_begun_is_cancelled(
    undisturbed: Path, cluster: SlurmCluster, folder: Path
) -> None:
    path, run_dir = make_run(folder, "held"), folder / "held"
    job = submit(cluster, path)
    wait_for_step(run_dir, 2)
    (run_dir / "HOLD").touch()
    facts = cluster.wait_for(job, "FAILED", "PENDING", timeout=60)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "75:0")
    assert f"on hold: remove {run_dir / 'HOLD'} and submit it again" in log_of(run_dir)
    (run_dir / "HOLD").unlink()
    blocker = cluster.submit("-p", "high", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 600")
    cluster.wait_for(blocker, "RUNNING")
    second = submit(cluster, path, "--prepare", "--prepare-cpus", "1")
    told = fulltune(cluster, "stop", run_dir).stdout
    assert f"Slurm job {second} had not started; cancelled, with the preparing job {second - 1}" in told
    assert {cluster.job(number)["JobState"] for number in (second - 1, second)} == {"CANCELLED"}
    cluster.run("scancel", str(blocker))
    last = submit(cluster, path)
    wait_until(cluster, last, run_dir, "COMPLETED")
    assert_same(run_dir, undisturbed)


@pytest.mark.long
def test_a_dead_node_costs_what_came_after_the_last_checkpoint(
    undisturbed: Path, cluster: SlurmCluster, folder: Path
) -> None:
    path, run_dir = make_run(folder, "dead"), folder / "dead"
    job = submit(cluster, path)
    wait_for_step(run_dir, 5)
    cluster.tell("kill n2")
    facts = cluster.wait_for(job, "PENDING", "FAILED", "NODE_FAIL", timeout=150)
    assert facts["JobState"] == "PENDING", f"{facts}\n{log_of(run_dir)[-3000:]}"
    assert "no answer from n2: waiting" in log_of(run_dir)
    cluster.tell("start")
    wait_until(cluster, job, run_dir, "COMPLETED")
    assert_same(run_dir, undisturbed)


def test_a_killed_rank_is_named_and_ends_the_job(cluster: SlurmCluster, folder: Path) -> None:
    path, run_dir = make_run(folder, "killed-rank"), folder / "killed-rank"
    job = submit(cluster, path)
    wait_for_step(run_dir, 1)
    pid = json.loads((run_dir / "ranks" / "rank-00001.json").read_text())["pid"]
    os.kill(pid, 9)
    facts = cluster.wait_for(job, "FAILED", timeout=60)
    assert facts["ExitCode"] == "76:0"
    assert "rank 1 was killed (signal 9, SIGKILL)" in log_of(run_dir)
    assert "rank 0 was" not in log_of(run_dir)


def test_asked_at_the_command_line_it_saves_and_comes_back(
    undisturbed: Path, cluster: SlurmCluster, folder: Path
) -> None:
    """A rank is killed, and `--restarts` goes on within the job; then `fulltune train` itself is told to stop."""
    path, run_dir = make_run(folder, "asked"), folder / "asked"
    job = submit(cluster, path, "--restarts", "1")
    wait_for_step(run_dir, 5)
    os.kill(json.loads((run_dir / "ranks" / "rank-00001.json").read_text())["pid"], signal.SIGKILL)
    wait_for_step(run_dir, 7)
    assert "restart 1 of 1, after step 4" in log_of(run_dir)
    os.kill(command_line_of(run_dir), signal.SIGTERM)
    cluster.wait_for(job, "PENDING", timeout=60)
    assert "stopped with a checkpoint: requeueing" in log_of(run_dir)
    assert last_step(run_dir) == max(metrics(run_dir)), "the stop cost steps"
    wait_until(cluster, job, run_dir, "COMPLETED")
    assert_same(run_dir, undisturbed)


def command_line_of(run_dir: Path) -> int:
    """The process of `fulltune train` in a job on this machine."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        words = entry.read_bytes().decode(errors="replace").split("\0") if entry.exists() else []
        if "train" in words and f"{run_dir}/submitted.yaml" in words:
            return int(entry.parent.name)
    raise AssertionError("no `fulltune train` runs")


def test_a_hanging_rank_is_named_and_ends_the_job(cluster: SlurmCluster, folder: Path) -> None:
    path, run_dir = make_run(folder, "hanging"), folder / "hanging"
    job = submit(cluster, path)
    wait_for_step(run_dir, 3)
    pid = json.loads((run_dir / "ranks" / "rank-00001.json").read_text())["pid"]
    os.kill(pid, signal.SIGSTOP)
    facts = cluster.wait_for(job, "FAILED", timeout=90)
    assert facts["ExitCode"] == "76:0"
    assert re.search(r"rank 1 on \S+ is stopped \(state T\) in step", log_of(run_dir)), log_of(run_dir)[-2000:]


def test_what_ranks_would_refuse_is_told_once_before_the_queue(cluster: SlurmCluster, folder: Path) -> None:
    path, run_dir = make_run(folder, "refused"), folder / "refused"
    done = fulltune(cluster, "submit", path, *TWO_NODES, "model.config.vocab_size=7", check=False)
    assert done.returncode == 65
    assert done.stderr.count("vocabulary mismatch") == 1
    assert not (run_dir / "job.json").exists(), "nothing was handed over"


@pytest.mark.long
def test_one_deepspeed_a_node_by_hand(undisturbed: Path, cluster: SlurmCluster, folder: Path) -> None:
    """slurm/train_deepspeed.sbatch as it is: preempted once, and the same bits."""
    path, run_dir = make_run(folder, "by-hand"), folder / "by-hand"
    run_dir.mkdir()
    script = ROOT / "slurm" / "train_deepspeed.sbatch"
    job = cluster.submit(
        "-N2", "--gpus-per-node=0", "--cpus-per-task=1", "-t", "30", f"--output={folder}/by-hand/slurm-1.log", script,
        path, env={**PYTHON, "RANKS_PER_NODE": "1"},
    )  # fmt: skip
    wait_for_step(run_dir, 2)
    preempt(cluster, job)
    assert last_step(run_dir) == max(metrics(run_dir)), "the preemption cost steps"
    wait_until(cluster, job, run_dir, "COMPLETED")
    assert_same(run_dir, undisturbed)


def test_nodes_are_looked_at_and_a_checkpoint_becomes_a_folder_by_hand(
    undisturbed: Path, cluster: SlurmCluster, folder: Path
) -> None:
    words = ("--gpus-per-node=0", "--mem=0", "-t", "10")
    looked = cluster.submit(
        *words, f"--output={folder}/nodes.log", ROOT / "slurm" / "check_nodes.sbatch", folder, env=PYTHON
    )
    cluster.wait_for(looked, "COMPLETED", "FAILED", timeout=120)
    told = (folder / "nodes.log").read_text()
    assert "2 nodes are alike" in told, told
    assert re.search(r"^ok +shared folder +the given folder is the same on all nodes$", told, re.MULTILINE), told
    assert re.search(r"^ok +way to the first node +open from 1 other node$", told, re.MULTILINE), told
    assert re.search(r"^ok +cores +all 2 nodes: ", told, re.MULTILINE), told
    exported = cluster.submit(
        "--mem=0", "--cpus-per-task=1", f"--output={folder}/export.log", ROOT / "slurm" / "export.sbatch", undisturbed,
        folder / "exported", env=PYTHON,
    )  # fmt: skip
    cluster.wait_for(exported, "COMPLETED", timeout=120)
    assert (folder / "exported" / "model.safetensors").is_file()


def test_a_store_is_made_in_shares_by_hand(cluster: SlurmCluster, folder: Path) -> None:
    """slurm/prepare.sbatch as a job array, and once more to join: the very store that one process makes."""
    path = make_run(folder, "shares")
    made = {found.relative_to(folder / "stores") for found in (folder / "stores").rglob("*") if found.is_file()}
    path.write_text(path.read_text().replace(str(folder / "stores"), str(folder / "joined")))
    words = ("--cpus-per-task=1", "--mem=0", f"--output={folder}/prepare-%A-%a.log", ROOT / "slurm" / "prepare.sbatch")
    shares = cluster.submit("--array=0-1", *words, path, env=PYTHON)
    join = cluster.submit(f"--dependency=afterok:{shares}", *words, path, env=PYTHON)
    cluster.wait_for(join, "COMPLETED", "FAILED", timeout=120)
    logs = "\n".join(log.read_text() for log in sorted(folder.glob("prepare-*.log")))
    joined = {found.relative_to(folder / "joined") for found in (folder / "joined").rglob("*") if found.is_file()}
    assert joined >= made, logs
    for name in made:
        if name.suffix != ".json":  # which say where and when, too
            assert (folder / "joined" / name).read_bytes() == (folder / "stores" / name).read_bytes(), name


def test_only_the_world_that_was_asked_for_starts(cluster: SlurmCluster, folder: Path) -> None:
    task = [
        sys.executable,
        "-m",
        "launcher.batch.rank_parent",
        "--ranks=2",
        "--ranks-per-node=1",
        "--master-addr=127.0.0.1",
    ]
    task += ["--master-port=1", f"--run-dir={folder}/worlds", "run.yaml"]
    environment = cluster.environment | PYTHON | {"DS_ACCELERATOR": "cpu"}
    for words in (["-N1", "-n1"], ["-N1", "-n2"], ["-N2", "-n3", "--overcommit"]):
        done = subprocess.run(["srun", *words, *task], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 78, (words, done.stderr)
        record = json.loads((folder / "worlds" / "ranks" / "exit-00000.json").read_text())
        assert "2 ranks, 1 a node, were asked for, and Slurm started" in record["message"]
    train = [sys.executable, "-m", "launcher.cli", "train", str(make_run(folder, "twice"))]
    done = subprocess.run(["srun", "-N2", *train], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 78
    assert "start it once a job, without srun" in done.stderr


@pytest.mark.long
def test_two_ranks_of_one_node(undisturbed: Path, cluster: SlurmCluster, folder: Path) -> None:
    """On one node the ranks share memory for their sums; the curve is the same to rounding."""
    path, run_dir = make_run(folder, "one-node"), folder / "one-node"
    fulltune(cluster, "submit", path, "--ranks-per-node", "2", "--cpus-per-rank", "1")
    job = int(json.loads((run_dir / "job.json").read_text())["job_id"])
    wait_until(cluster, job, run_dir, "COMPLETED")
    assert metrics(run_dir)[STEPS]["loss"] == pytest.approx(metrics(undisturbed)[STEPS]["loss"], rel=1e-3)


@pytest.mark.long
def test_stopped_before_it_could_listen_it_comes_back(undisturbed: Path, cluster: SlurmCluster, folder: Path) -> None:
    """TERM to the tasks at any moment of their start, as at the beginning of a grace period."""
    path, run_dir = make_run(folder, "early"), folder / "early"
    job = submit(cluster, path)
    for moment in (0.2, 1.0, 3.0):
        wait_until(cluster, job, run_dir, "RUNNING")
        seen = log_of(run_dir).count("starting: srun")
        deadline = time.monotonic() + 60
        while log_of(run_dir).count("starting: srun") == seen and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(moment)
        cluster.run("scancel", "--signal=TERM", str(job))
        cluster.wait_for(job, "PENDING", timeout=120)
    wait_until(cluster, job, run_dir, "COMPLETED")
    assert_same(run_dir, undisturbed)
