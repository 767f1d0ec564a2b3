"""Launching through the real `deepspeed`: argv, signals, honest exit codes, no survivors."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from repository import ROOT, WORKERS

from engine.errors import OTHER_RANK_FAILED, CannotWriteError, ConfigError, FulltuneError
from engine.zero.prebuild import extensions_dir, make_ops_dir
from launcher.job.environment import job_environment, remote_environment
from launcher.job.hosts import Node
from launcher.job.job import Job, deepspeed_program, free_port, hostfile_command, local_command, owned_run_dir
from launcher.job.records import clear_records, exit_code_of, read_starts
from launcher.ssh import check_hosts
from launcher.ssh.check_hosts import HostFacts
from launcher.start.start import _prebuild
from launcher.supervision.run import run_job

TWO = Node("localhost", (0, 1))


def make_job(tmp_path: Path, behaviour: str, command: tuple[str, ...] | None = None) -> Job:
    """A job of two worker ranks under the real deepspeed launcher."""
    run_file, port = tmp_path / "run.yaml", free_port()
    command = command or local_command(TWO, port, [str(run_file)])
    command = tuple("launch_worker" if word == "engine" else word for word in command)
    environment = job_environment(2, uses_gpus=False) | {"BEHAVIOUR": behaviour}
    environment["PYTHONPATH"] += f":{WORKERS}"
    return Job(tmp_path, run_file, (TWO,), command, environment, port)


def during(job: Job, act: Callable[[dict[int, int]], None]) -> threading.Thread:
    """Call `act` with {rank: pid} once every rank has started."""

    def wait_and_act() -> None:
        deadline = time.monotonic() + 90
        while len(starts := read_starts(job.run_dir)) < job.num_ranks and time.monotonic() < deadline:
            time.sleep(0.1)
        act({start.rank: start.pid for start in starts})

    thread = threading.Thread(target=wait_and_act, daemon=True)
    thread.start()
    return thread


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def write_exit(run_dir: Path, rank: int, code: int, message: str = "") -> None:
    (run_dir / "ranks").mkdir(exist_ok=True)
    record = {"rank": rank, "code": code, "phase": "training", "message": message}
    (run_dir / "ranks" / f"exit-{rank:05d}.json").write_text(json.dumps(record))


def write_start(run_dir: Path, rank: int) -> None:
    (run_dir / "ranks").mkdir(exist_ok=True)
    record = {"rank": rank, "pid": 1, "host": "elsewhere"}
    (run_dir / "ranks" / f"rank-{rank:05d}.json").write_text(json.dumps(record))


def test_local_command_is_plain_words() -> None:
    command = local_command(TWO, 29501, ["/runs/a b/run.yaml", "--fresh"])
    assert command[0] == deepspeed_program()
    assert Path(command[0]).exists()
    words = " ".join(command)
    assert "--num_gpus 2 --master_addr 127.0.0.1 --master_port 29501 --module engine" in words
    assert command[-2:] == ("/runs/a b/run.yaml", "--fresh")


def test_devices_that_are_not_the_first_are_included_by_number() -> None:
    command = local_command(Node("localhost", (2, 3)), 29501, ["run.yaml"])
    assert "--include" in command
    assert "localhost:2,3" in command
    assert "--num_gpus" not in command


def test_single_remote_host_is_forced_away_from_this_machine() -> None:
    remote = hostfile_command(Path("/h"), [Node("far-away", (0,))], [], 29500, ["/r/run.yaml"], run_dir=Path("/r"))
    assert "--force_multi" in remote
    assert "launcher.ssh.rank_parent" in remote
    local = hostfile_command(Path("/h"), [TWO], [], 29500, ["/r/run.yaml"], run_dir=Path("/r"))
    assert "--force_multi" not in local
    assert "launcher.ssh.rank_parent" not in local


@pytest.mark.parametrize("word", ["/r/$(touch x)/run.yaml", "/r/a;b/run.yaml", "/r/a b/run.yaml", "/r/`x`/run.yaml"])
def test_words_a_remote_shell_would_read_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="unquoted"):
        hostfile_command(Path("/h"), [Node("n1", (0,)), Node("n2", (0,))], [], 29500, [word])


def test_unsafe_environment_is_refused_for_several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG_FILE", "$(touch canary)")
    with pytest.raises(ConfigError, match="NCCL_DEBUG_FILE"):
        hostfile_command(
            Path("/h"), [Node("n1", (0,)), Node("n2", (0,))], [], 29500, ["/r/run.yaml"], run_dir=Path("/r")
        )


def test_hosts_are_told_apart_by_name_and_start() -> None:
    """Ranks know by a host's name whether the supervisor runs on it, so two machines may not share one."""
    here = check_hosts._boot_id()
    assert here == Path("/proc/sys/kernel/random/boot_id").read_text().strip() != ""
    versions = dict.fromkeys(check_hosts._PACKAGES, "1")
    a, b, ours = (
        HostFacts(name=name, boot=boot, gpus=0, read="", port=1, versions=versions, client_address="", own_address="")
        for name, boot in (("a", "first"), ("a", "second"), (socket.gethostname(), "second"))
    )
    one, two = Node("one", (0,)), Node("two", (0,))
    for nodes, facts, words in (
        ([one, two], [a, b], "hosts one and two both call themselves a: they need two names"),
        ([one, two], [a, a], "hosts one and two are one machine: name it once"),
        ([one], [ours], "as this one does: they need two names"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_hosts._check_alike(nodes, facts)
    check_hosts._check_alike([one, two], [a, dataclasses.replace(ours, boot=here)])


def test_environment_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    cores = len(os.sched_getaffinity(0))
    cpu = job_environment(cores, uses_gpus=False)
    assert cpu["OMP_NUM_THREADS"] == "1"
    assert cpu["DS_ACCELERATOR"] == "cpu"
    assert "PYTORCH_ALLOC_CONF" not in cpu
    assert cpu["PYTHONPATH"].split(":")[0] == str(ROOT)
    gpu = job_environment(1, uses_gpus=True)
    assert gpu["OMP_NUM_THREADS"] == str(cores)
    assert gpu["PYTORCH_ALLOC_CONF"] == "pinned_max_round_threshold_mb:1"
    assert "DS_ACCELERATOR" not in gpu
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert job_environment(1, uses_gpus=True)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("home", ["/proc/none", "/dev/null", "/proc/self/none"])
def test_a_home_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("HOME", home)
    with pytest.raises(
        CannotWriteError, match="compiled ops are kept there, below HOME: set TORCH_EXTENSIONS_DIR"
    ) as caught:
        make_ops_dir(extensions_dir())
    assert "\n" not in str(caught.value) and home in str(caught.value)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", f"{home}/ops")
    with pytest.raises(CannotWriteError, match="are kept there: set TORCH_EXTENSIONS_DIR to a folder of yours"):
        make_ops_dir(extensions_dir())


def test_a_user_without_a_home_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54_321)  # of nobody here, as in containers
    with pytest.raises(ConfigError, match="set HOME, or TORCH_EXTENSIONS_DIR to a folder of yours"):
        extensions_dir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions_dir() == tmp_path


def test_compiling_that_fails_is_one_line_and_no_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text(
        "#!/bin/sh\nprintf 'Traceback (most recent call last):\\n  File x\\nKeyError: 3\\n' >&2; exit 1\n"
    )
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(FulltuneError, match=r"^compiling DeepSpeed's ops failed: KeyError: 3$"):
        _prebuild({}, False)
    (tmp_path / "python").write_text(
        "#!/bin/sh\nprintf 'noise\\nfulltune: error: no compiler\\nmore\\n' >&2; exit 78\n"
    )
    with pytest.raises(ConfigError, match=r"^no compiler$"):
        _prebuild({}, False)


def test_remote_hosts_get_our_variables_and_no_file_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / ".deepspeed_env").write_text("NCCL_IB_HCA=mlx5\n\n")
    (here / ".deepspeed_env").write_text("EVIL=1\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    added = remote_environment(tmp_path, {"OMP_NUM_THREADS": "4", "TORCH_EXTENSIONS_DIR": "/mine"})
    text = Path(added["DS_ENV_FILE"]).read_text()
    assert text == "NCCL_IB_HCA=mlx5\nOMP_NUM_THREADS=4\n"
    (home / ".deepspeed_env").write_text("X=$(touch canary)\n")
    with pytest.raises(ConfigError, match="deepspeed_env:1"):
        remote_environment(tmp_path, {})


def test_only_all_zeros_are_success(tmp_path: Path) -> None:
    for rank in range(3):
        write_start(tmp_path, rank)
        write_exit(tmp_path, rank, 0)
    assert exit_code_of(tmp_path, 3, 0) == (0, "")
    assert exit_code_of(tmp_path, 4, 0)[0] == 76, "a rank without a record is not success, whatever deepspeed returned"


def test_agreeing_ranks_give_their_code(tmp_path: Path) -> None:
    for rank in range(2):
        write_exit(tmp_path, rank, 75, "stopped")
    assert exit_code_of(tmp_path, 2, 1)[0] == 75


@pytest.mark.parametrize("code_of_rank_2", [65, 75])
def test_the_rank_that_knows_the_reason_tells_it(tmp_path: Path, code_of_rank_2: int) -> None:
    write_exit(tmp_path, 0, 65, OTHER_RANK_FAILED)
    write_exit(tmp_path, 1, 65, "the weights are damaged")
    write_exit(tmp_path, 2, code_of_rank_2, OTHER_RANK_FAILED)
    code, message = exit_code_of(tmp_path, 3, 1)
    assert code == 65
    assert message.startswith("rank 1 ")
    assert message.endswith("the weights are damaged")


def test_the_cause_counts_not_its_consequence(tmp_path: Path) -> None:
    write_exit(tmp_path, 0, 76, "lost a peer")
    write_exit(tmp_path, 1, 79, "the loss is not finite")
    write_exit(tmp_path, 2, 75, "stopped")
    code, message = exit_code_of(tmp_path, 3, 1)
    assert code == 79
    assert "rank 1" in message
    assert "the loss is not finite" in message


@pytest.mark.parametrize(("launcher_code", "number"), [(247, 9), (-9, 9), (137, 9), (245, 11), (-15, 15)])
def test_a_killed_rank_is_named_with_its_signal(tmp_path: Path, launcher_code: int, number: int) -> None:
    for rank in range(2):
        write_start(tmp_path, rank)
    write_exit(tmp_path, 0, 76, "lost a peer")
    code, message = exit_code_of(tmp_path, 2, launcher_code)
    assert code == 76
    assert f"rank 1 was killed (signal {number})" in message


def test_a_killed_rank_is_the_cause_of_what_its_peers_report(tmp_path: Path) -> None:
    for rank in range(2):
        write_start(tmp_path, rank)
    write_exit(tmp_path, 0, 70, "Connection closed by peer")
    assert exit_code_of(tmp_path, 2, 247)[0] == 76
    assert exit_code_of(tmp_path, 2, 70, died_first=[1])[0] == 76, (
        "deepspeed noticed rank 0 first, the supervisor rank 1"
    )
    code, message = exit_code_of(tmp_path, 2, 70)  # rank 0 failed first and rank 1 was killed after it
    assert code == 70
    assert "rank 0" in message


def test_no_rank_started(tmp_path: Path) -> None:
    code, message = exit_code_of(tmp_path, 2, 1)
    assert code == 70
    assert "no rank of 2 started" in message


def test_half_written_record_is_no_record(tmp_path: Path) -> None:
    write_start(tmp_path, 0)
    (tmp_path / "ranks" / "exit-00000.json").write_text('{"rank": 0, "co')
    assert exit_code_of(tmp_path, 1, 0)[0] == 76


def test_verdict_by_hand(tmp_path: Path) -> None:
    write_start(tmp_path, 0)
    write_exit(tmp_path, 0, 75, "stopped")
    arguments = [sys.executable, "-m", "launcher.job.records"]
    end = [*arguments, "end", str(tmp_path), "--ranks", "1", "--code", "0"]
    result = subprocess.run(end, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 75
    assert result.stderr == "fulltune: stopped\n"
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        "run_dir: elsewhere\ntask: causal_lm\ndata: {store_dir: s, row_tokens: 8}\nmodel: {path: m}\n"
        "optimizer: {learning_rate: 1e-3}\nbatch: {global_rows: 8}\nduration: {steps: 10}\n"
    )
    start = subprocess.run(
        [*arguments, "start", str(run_file), f"run_dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert (start.returncode, start.stdout) == (0, f"{tmp_path}\n")
    assert subprocess.run(end, cwd=ROOT, capture_output=True).returncode == 70


def test_clearing_leaves_other_files(tmp_path: Path) -> None:
    write_start(tmp_path, 0)
    (tmp_path / "ranks" / "rank-00000.log").write_text("kept")
    clear_records(tmp_path)
    assert [path.name for path in (tmp_path / "ranks").iterdir()] == ["rank-00000.log"]


def test_one_launcher_a_run_folder(tmp_path: Path) -> None:
    with owned_run_dir(tmp_path), pytest.raises(CannotWriteError, match="another"), owned_run_dir(tmp_path):
        pass
    with owned_run_dir(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError), owned_run_dir(tmp_path / "file" / "run"):
        pass


@pytest.mark.ranks
def test_complete_run_through_a_hostfile_with_localhost(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=4\n")
    port = free_port()
    include = ["--include", "localhost:0,1"]
    command = hostfile_command(hostfile, [TWO], include, port, [str(tmp_path / "run.yaml")])
    job = make_job(tmp_path, "complete", command)
    write_exit(tmp_path, 1, 79, "a record of an earlier start")
    assert run_job(job) == (0, "")
    assert {start.rank for start in read_starts(tmp_path)} == {0, 1}


@pytest.mark.ranks
def test_killed_rank_is_told_and_leaves_no_survivor(tmp_path: Path) -> None:
    job = make_job(tmp_path, "wait")
    pids: dict[int, int] = {}

    def kill_rank_one(found: dict[int, int]) -> None:
        pids.update(found)
        os.kill(found[1], signal.SIGKILL)

    thread = during(job, kill_rank_one)
    code, message = run_job(job)
    thread.join()
    assert code == 76
    assert "rank 1 was killed (signal 9, SIGKILL)" in message
    assert not any(map(is_running, pids.values()))


@pytest.mark.ranks
def test_failing_rank_decides_the_code(tmp_path: Path) -> None:
    code, message = run_job(make_job(tmp_path, "fail"))
    assert code == 79
    assert "rank 1" in message


@pytest.mark.ranks
def test_term_reaches_ranks_that_deepspeed_would_not_tell(tmp_path: Path) -> None:
    job = make_job(tmp_path, "wait")
    pids: dict[int, int] = {}

    def stop_us(found: dict[int, int]) -> None:
        pids.update(found)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # batch systems send it several times

    before = signal.getsignal(signal.SIGTERM)
    thread = during(job, stop_us)
    code, message = run_job(job)
    thread.join()
    assert code == 75, message
    assert len(pids) == 2
    assert not any(map(is_running, pids.values()))
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.ranks
def test_killed_launcher_leaves_no_orphans(tmp_path: Path) -> None:
    job = make_job(tmp_path, "wait")
    pids: dict[int, int] = {}

    def kill_launcher(found: dict[int, int]) -> None:
        pids.update(found)
        os.kill(parent_of(found[0]), signal.SIGKILL)

    thread = during(job, kill_launcher)
    code, _ = run_job(job)
    thread.join()
    assert code == 75, "the ranks were asked to save and end; deepspeed itself returned 0"
    assert not any(map(is_running, pids.values()))
