"""What `fulltune submit` writes, what a Slurm task makes of its environment, and what run folders remember."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from repository import ROOT
from run_files import RUN_FILE
from slurm_scripts import arguments_of, header, options

from engine.errors import ConfigError, MissingInputError
from launcher import cli
from launcher.batch import batch_script, rank_parent, slurm_job
from launcher.commands import status, submit
from launcher.job import runs
from launcher.job.job import Job
from launcher.job.run_config import load_run
from launcher.supervision.supervisor import Stop, Supervision


def scripts(run_dir: str = "/runs/one", **given: object) -> list[str]:
    request = batch_script.check_request(options(**given), Path(run_dir))
    return [
        batch_script.training_script(request, Path(run_dir)),
        batch_script.preparation_script(request, Path(run_dir)),
    ]


def test_the_script_asks_for_what_was_asked_for() -> None:
    training, preparation = scripts(
        gpus_per_node=8,
        ranks_per_node=None,
        cpus_per_rank=12,
        partition="gpu,gpu-low",
        account="lab",
        time="2-12:00:00",
    )
    asked = header(training)
    assert asked == {
        "job-name": "one", "nodes": "2", "gpus-per-node": "8", "ntasks-per-node": "8", "cpus-per-task": "12", "mem": "0",
        "time": "2-12:00:00", "partition": "gpu,gpu-low", "account": "lab", "requeue": "", "open-mode": "append",
        "output": "/runs/one/slurm-%j.log", "signal": "TERM@180",
    }  # fmt: skip
    assert arguments_of(training) == ["/runs/one/submitted.yaml", "--ranks-per-node", "8"]
    assert "gpus-per-node" not in header(preparation)
    assert header(preparation)["ntasks"] == "1"
    assert arguments_of(preparation) == ["/runs/one/submitted.yaml"]
    assert "EDIT" not in re.sub(r"^# `fulltune submit.*$", "", training + preparation, flags=re.MULTILINE)


def test_restarts_are_handed_to_the_supervisor() -> None:
    assert arguments_of(scripts(restarts=3)[0])[-2:] == ["--restarts", "3"]
    assert arguments_of(scripts(restarts=3)[1]) == ["/runs/one/submitted.yaml"]


def test_whole_nodes_unless_cores_are_counted() -> None:
    assert "exclusive" in header(scripts()[0])
    assert "exclusive" not in header(scripts(cpus_per_rank=4)[0])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"ranks_per_node": None}, "--ranks-per-node R"),
        ({"ranks_per_node": 0}, "--ranks-per-node R"),
        ({"gpus_per_node": 2, "ranks_per_node": 4}, "--ranks-per-node 4"),
        ({"nodes": 0}, "--nodes"),
        ({"nodes": -1}, "--nodes"),
        ({"stop_seconds": 0}, "--stop-seconds"),
        ({"restarts": -1}, "--restarts"),
        ({"site": Path("/nowhere/site.sh")}, "--site"),
        ({"time": "tomorrow"}, "--time"),
        ({"time": "3"}, "--time 3: the ranks are asked to stop 180 s before it"),
        ({"partition": "gpu\n#SBATCH --wrap=x"}, "--partition"),
        ({"account": "lab\n"}, "--account"),
        ({"name": "-name"}, "--name"),
    ],
)
def test_what_cannot_be_asked_for_is_named(given: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        scripts(**given)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("5", 300), ("5:07", 307), ("2:05:07", 7507), ("1-2", 93600), ("1-2:03", 93780), ("1-2:03:04", 93784)],
)
def test_times_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert batch_script.seconds_of(time) == seconds


def test_a_canary_would_have_been_noticed(tmp_path: Path) -> None:
    """The check of names (test_names.py) can fail: without the character set a run folder's name is a command."""
    script = scripts()[0].replace("/runs/one/submitted.yaml", f"$(touch {tmp_path}/canary)")
    environment = {"PATH": "/usr/bin:/bin"}
    subprocess.run(["bash"], input=script, text=True, capture_output=True, env=environment)
    assert (tmp_path / "canary").exists()


def make_run_file(tmp_path: Path) -> Path:
    text = RUN_FILE.replace("run_dir: run", f"run_dir: {tmp_path}/run")
    text = text.replace("more/*.jsonl", "records.jsonl").replace("records.jsonl", f"{tmp_path}/records.jsonl")
    (tmp_path / "run.yaml").write_text(text)
    (tmp_path / "records.jsonl").write_text('{"text": "some words"}\n')
    return tmp_path / "run.yaml"


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run_file(tmp_path)
    words = ["submit", str(path), "--nodes", "2", "--gpus-per-node", "4", "--dry-run", "seed=5"]
    assert cli.main(words) == 0
    assert "#SBATCH --nodes=2" in capsys.readouterr().out
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["records.jsonl", "run.yaml"]


def fake_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A program in sbatch's place: what a cluster refuses cannot be had from a healthy one."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name in ("sbatch", "scancel", "scontrol"):
        (folder / name).write_text(
            f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/calls\n{body if name == "sbatch" else ""}'
        )
        (folder / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_refused_training_job_takes_its_preparation_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(
        tmp_path, monkeypatch, 'case "$*" in *train.sbatch*) echo "no such account" >&2; exit 1;; esac\necho 41\n'
    )
    words = ["submit", str(make_run_file(tmp_path)), "--ranks-per-node", "1", "--prepare"]
    assert cli.main(words) == 70
    assert "`sbatch` refused: no such account" in capsys.readouterr().err
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "scancel 41"
    assert not (tmp_path / "run" / "job.json").exists()


def test_what_would_be_missed_after_the_queue_is_named_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(tmp_path, monkeypatch, "echo 42\n")
    words = ["submit", str(make_run_file(tmp_path)), "--ranks-per-node", "1"]
    assert cli.main([*words, "data.train=recrods.jsonl"]) == MissingInputError.exit_code
    assert "train records: recrods.jsonl: no such file" in capsys.readouterr().err
    assert not (tmp_path / "calls").exists()
    fake_sbatch(tmp_path, monkeypatch, "echo 'Unable to contact slurm controller' >&2; exit 1\n")
    assert cli.main(words) == ConfigError.exit_code
    assert "no Slurm controller answers here" in capsys.readouterr().err


def test_overrides_go_into_the_file_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sbatch(tmp_path, monkeypatch, "echo 42\n")
    value = f"$(touch {tmp_path}/canary) '\" ; x"
    words = ["submit", str(make_run_file(tmp_path)), "--ranks-per-node", "1", f"data.text_field={json.dumps(value)}"]
    words[-1] = f"model.config.note={json.dumps(value)}"
    assert cli.main(words) == 0
    assert load_run(tmp_path / "run" / "submitted.yaml", []).config.model.config == {
        "model_type": "llama",
        "note": value,
    }
    assert "touch" not in (tmp_path / "run" / "train.sbatch").read_text()
    assert "touch" not in (tmp_path / "calls").read_text()
    record = runs.read_record(tmp_path / "run")
    assert record is not None
    assert (record.job_id, record.log) == (42, f"{tmp_path}/run/slurm-42.log")


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no `sbatch` here"):
        submit._sbatch(["x"], {"PATH": str(tmp_path)}, 0o077)


TASK = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2", "SLURMD_NODENAME": "n2", "SLURM_GPUS_ON_NODE": "4",
}  # fmt: skip


@pytest.mark.parametrize(("visible", "local_rank"), [("0,1,2,3", "1"), ("3", "0"), ("MIG-abc", "0")])
def test_a_rank_takes_its_own_device_whether_it_sees_one_or_all(visible: str, local_rank: str) -> None:
    placed = rank_parent.rank_environment(TASK | {"CUDA_VISIBLE_DEVICES": visible}, 8, 4, "10.0.0.1", 29501)
    assert placed == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": local_rank, "LOCAL_SIZE": "4", "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29501",
    }  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"SLURM_STEP_NUM_TASKS": "7"},
        {"SLURM_STEP_NUM_NODES": "1"},
        {"SLURM_LOCALID": "2"},
        {"SLURM_PROCID": ""},
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": ""},
        {"SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "0"},
    ],
)
def test_another_world_than_the_one_asked_for_is_refused(changed: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        rank_parent.rank_environment({"CUDA_VISIBLE_DEVICES": "0,1,2,3"} | TASK | changed, 8, 4, "a", 1)


def test_a_cpu_rank_asks_for_no_device() -> None:
    task = {**TASK, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    assert rank_parent.rank_environment(task, 8, 4, "a", 1)["LOCAL_RANK"] == "1"


def test_a_refused_world_is_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in TASK.items():
        monkeypatch.setenv(key, value)
    words = [
        "--ranks=9",
        "--ranks-per-node=4",
        "--master-addr=a",
        "--master-port=1",
        f"--run-dir={tmp_path}",
        "run.yaml",
    ]
    assert rank_parent.main(words) == 78
    record = json.loads((tmp_path / "ranks" / "exit-00005.json").read_text())
    assert record["code"] == 78
    assert "9 ranks, 4 a node, were asked for, and Slurm started 8 tasks on 2 nodes" in record["message"]


ALLOCATION = slurm_job.Allocation(7, ("n1", "n2"), "10.0.0.1", 16, 0, None, False)


def test_one_task_a_rank() -> None:
    job = slurm_job.plan_slurm_job(ALLOCATION, Path("/r"), Path("/r/run.yaml"), ["--debug"], ranks_per_node=4)
    assert job.num_ranks == 8
    assert job.command[:2] == ("srun", "--kill-on-bad-exit=1")
    for word in ("--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=4", "--master-addr=10.0.0.1"):
        assert word in job.command
    assert job.command[-2:] == ("/r/run.yaml", "--debug")
    assert job.environment["DS_ACCELERATOR"] == "cpu"
    with pytest.raises(ConfigError, match="--cpus-per-task"):
        slurm_job.plan_slurm_job(ALLOCATION, Path("/r"), Path("/r/run.yaml"), [], ranks_per_node=17)


def explain_end(job: Job, srun_code: int) -> tuple[int, str]:
    """The verdict on what `ended` left behind, after an `srun` that is over."""
    process = subprocess.Popen(["true"])
    process.wait()
    return slurm_job._explain_end_of_step(
        job, srun_code, Supervision(process, job.run_dir, job.run_file, Stop(), "token")
    )


def ended(tmp_path: Path, rank: int, code: int | None, killed_by: int = 0, asked: bool = False) -> None:
    """Leave what a rank and its parent leave: a record, or a note of the signal that ended it."""
    (tmp_path / "ranks").mkdir(exist_ok=True)
    start = {"rank": rank, "pid": 1, "host": "n"}
    (tmp_path / "ranks" / f"rank-{rank:05d}.json").write_text(json.dumps(start))
    if code is not None:
        record = {"rank": rank, "code": code, "phase": "training", "message": "its words", "time": 50.0}
        (tmp_path / "ranks" / f"exit-{rank:05d}.json").write_text(json.dumps(record))
    if killed_by:
        note = {"rank": rank, "signal": killed_by, "asked": asked, "host": "n", "time": float(rank)}
        slurm_job.killed_path(tmp_path, rank).write_text(json.dumps(note))


def test_the_verdict_is_the_ranks_own(tmp_path: Path) -> None:
    """`srun` ends with 137 when it killed the other ranks, whatever the first one said."""
    job = slurm_job.plan_slurm_job(ALLOCATION, tmp_path, tmp_path / "run.yaml", [], ranks_per_node=1)
    assert explain_end(job, 1)[0] == 70, "no rank started"
    assert explain_end(job, 143)[0] == 75, "the tasks were asked to stop before there was a rank"
    ended(tmp_path, 0, 79)
    ended(tmp_path, 1, None)
    code, message = explain_end(job, 137)
    assert (code, "its words" in message) == (79, True)
    ended(tmp_path, 0, 70)
    ended(tmp_path, 1, None, killed_by=9)
    code, message = explain_end(job, 137)
    assert code == 76
    assert "rank 1 was killed (signal 9, SIGKILL)" in message
    ended(tmp_path, 0, 79)
    note = {"rank": 1, "signal": 9, "asked": False, "host": "n", "time": 51.0}
    slurm_job.killed_path(tmp_path, 1).write_text(json.dumps(note))
    assert explain_end(job, 137)[0] == 79, "rank 1 was ended because rank 0 had failed"
    ended(tmp_path, 0, 70)
    ranks = tmp_path / "ranks"
    lost = json.loads((ranks / "exit-00000.json").read_text()) | {
        "traceback": 'File "x/torch/distributed/y.py", line 1'
    }
    (ranks / "exit-00000.json").write_text(json.dumps(lost))
    (ranks / "exit-00001.json").unlink(missing_ok=True)
    code, message = explain_end(job, 137)
    assert (code, "rank 1 was killed (signal 9, SIGKILL)" in message) == (76, True), "its peer was faster to say so"
    for rank in range(2):
        ended(tmp_path, rank, 0)
    slurm_job.killed_path(tmp_path, 1).unlink()
    assert explain_end(job, 0) == (0, "")


def test_a_node_that_says_nothing_is_asked_for(tmp_path: Path) -> None:
    job = slurm_job.plan_slurm_job(ALLOCATION, tmp_path, tmp_path / "run.yaml", [], ranks_per_node=2)
    assert slurm_job._silent_nodes(job) == ["n1", "n2"]
    for rank in range(3):
        ended(tmp_path, rank, 70)
    assert slurm_job._silent_nodes(job) == ["n2"]
    ended(tmp_path, 3, None, killed_by=9)
    assert slurm_job._silent_nodes(job) == [], "its parent has spoken for rank 3, so the node lives"


def test_ranks_that_were_stopped_while_they_started_have_lost_nothing(tmp_path: Path) -> None:
    job = slurm_job.plan_slurm_job(ALLOCATION, tmp_path, tmp_path / "run.yaml", [], ranks_per_node=1)
    ended(tmp_path, 0, None, killed_by=15, asked=True)
    ended(tmp_path, 1, 75)
    assert explain_end(job, 143)[0] == 75
    ended(tmp_path, 1, 65)
    assert explain_end(job, 143)[0] == 65, "another rank failed by itself"
    ended(tmp_path, 1, None, killed_by=11)
    (tmp_path / "ranks" / "exit-00001.json").unlink()
    assert explain_end(job, 143)[0] == 76, "and one crashed"
    ended(tmp_path, 1, None, killed_by=9)
    (tmp_path / "ranks" / "exit-00001.json").unlink()
    assert explain_end(job, 143)[0] == 75, "and `srun` killed the other one after it"


def test_signals_before_the_rank_is_there_reach_it(tmp_path: Path) -> None:
    """The parent hears TERM while it starts, the rank gets it, and the parent ends well when the rank has saved."""
    code = (
        "import os, signal, sys, time\n"
        "from launcher.batch import rank_parent\n"
        "task = rank_parent._Task()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "child = 'import time; time.sleep(60)'\n"
        "print(task.run([sys.executable, '-c', child], os.environ), task.handed_on)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=50)
    assert done.stdout.split("\n")[0] == "-15 [15]", done.stderr


def test_gpus_decide_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with_gpus = slurm_job.Allocation(7, ("n1", "n2"), "10.0.0.1", 16, 8, 1, False)
    job = slurm_job.plan_slurm_job(with_gpus, Path("/r"), Path("/r/run.yaml"), [])
    assert job.num_ranks == 16
    assert "DS_ACCELERATOR" not in job.environment
    with pytest.raises(ConfigError, match=r"8 GPU"):
        slurm_job.plan_slurm_job(with_gpus, Path("/r"), Path("/r/run.yaml"), [], ranks_per_node=9)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"SLURM_JOB_ID": "1;x"}, "SLURM_JOB_ID"),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "4"}, "once a job"),
    ],
)
def test_an_environment_that_is_none_of_slurm(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        slurm_job.read_allocation(environment)


@pytest.mark.parametrize(("text", "count"), [("8", 8), ("8(x2)", 8), ("8(x2),4", 4)])
def test_the_poorest_node_counts(text: str, count: int) -> None:
    assert slurm_job._fewest({"X": text}, "X") == count
    with pytest.raises(ConfigError):
        slurm_job._fewest({"X": f"{text};"}, "X")


def test_a_local_run_is_known_by_more_than_its_number(tmp_path: Path) -> None:
    runs.record_start(tmp_path, False)
    record = runs.read_record(tmp_path)
    assert record is not None
    assert runs.is_alive(record)
    assert status._state(tmp_path)[0] == "running"
    reused = runs.JobRecord(host=record.host, pid=record.pid, started_ticks=1)
    assert not runs.is_alive(reused), "another process has the number now"
    with pytest.raises(ConfigError, match="elsewhere"):
        runs.is_alive(runs.JobRecord(host="elsewhere", pid=1, started_ticks=1))
    assert {field.name for field in fields(record)} == json.loads((tmp_path / "job.json").read_text()).keys()


def test_a_run_that_has_ended_is_told_in_the_words_of_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not in those of the ranks that lost a peer."""
    runs.write_record(tmp_path, runs.JobRecord(host=os.uname().nodename, pid=1, started_ticks=0))
    ended(tmp_path, 0, 70)
    ended(tmp_path, 1, 76)
    (tmp_path / "ranks" / "rank-00000.log").write_text("Connection reset\n")
    runs.record_outcome(tmp_path, 76, "rank 1 was killed")
    assert cli.main(["status", str(tmp_path)]) == 0
    assert "failed (76)" in capsys.readouterr().out
    assert cli.main(["logs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "Connection reset\nfulltune: rank 1 was killed\n"
    for code, word in ((0, "complete"), (75, "stopped"), (130, "interrupted")):
        runs.record_outcome(tmp_path, code, "")
        cli.main(["status", str(tmp_path)])
        assert word in capsys.readouterr().out
    runs.record_start(tmp_path, False)
    assert runs.read_outcome(tmp_path) is None


def test_status_without_slurm_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.write_record(tmp_path, runs.JobRecord(host="n", job_id=7))
    monkeypatch.setenv("PATH", str(tmp_path))
    state, where = status._state(tmp_path)
    assert state == "unknown"
    assert "there is no `scontrol` here" in where


def test_a_local_run_is_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        ticks, host = runs.start_ticks(process.pid), os.uname().nodename
        runs.write_record(tmp_path, runs.JobRecord(host=host, pid=process.pid, started_ticks=ticks))
        assert cli.main(["status", str(tmp_path)]) == 0
        assert "running" in capsys.readouterr().out
        assert cli.main(["stop", str(tmp_path)]) == 0
        assert process.wait(timeout=10) == -15
    finally:
        process.kill()
        process.wait()
    assert cli.main(["stop", str(tmp_path)]) == MissingInputError.exit_code


def test_logs_follow_a_local_run_to_its_end(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "4"])
    log = tmp_path / "ranks" / "rank-00000.log"
    log.parent.mkdir()
    log.write_text("first\n")
    ticks, host = runs.start_ticks(process.pid), os.uname().nodename
    runs.write_record(tmp_path, runs.JobRecord(host=host, pid=process.pid, started_ticks=ticks))
    command = [sys.executable, "-m", "launcher.cli", "logs", "-f", str(tmp_path)]
    following = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert following.stdout is not None
    assert following.stdout.readline() == "first\n"
    with log.open("a") as file:
        file.write("second\n")
    assert following.stdout.readline() == "second\n"
    process.wait()
    assert following.wait(timeout=20) == 0


def test_what_is_complete_is_exactly_that_run_file(tmp_path: Path) -> None:
    path = make_run_file(tmp_path)
    run = load_run(path, [])
    assert not runs.is_complete(run)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    runs.record_complete(run)
    assert runs.is_complete(run)
    assert not runs.is_complete(load_run(path, ["duration.steps=11"])), "a longer run is another"
    shutil.rmtree(checkpoint)
    assert not runs.is_complete(run), "its checkpoint is gone"


def test_nothing_writes_through_a_planted_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / f".job.json.{os.getpid()}").symlink_to(tmp_path / "target")
    runs.record_start(tmp_path, False)
    assert (tmp_path / "target").read_text() == "precious"
    assert (tmp_path / "job.json").stat().st_mode & 0o117 == 0
