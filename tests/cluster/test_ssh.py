"""Several machines over ssh, for real: two hosts, DeepSpeed's pdsh, and what becomes of a job when something goes."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen

import pytest
from fault_runs import environment_of, make_run, started
from ranks import ROOT
from repository import SUPPORT
from ssh_hosts import NOBODY, SshHosts, children_of

from engine.ranks.heartbeat import page_path, read_page

CPU = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
TWO = "h1 slots=1\nh2 slots=1\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ssh")


@dataclass
class Job:
    """`fulltune train --hostfile`, or another command, on h1."""

    hosts: SshHosts
    process: "Popen[str]"
    run_dir: Path

    def rank(self, number: int) -> int:
        """The process of a rank, wherever it runs."""
        found = [
            pid
            for host in ("h1", "h2")
            for pid in self.hosts.processes(host)
            if f"RANK={number}".encode() in environment_of(pid) and self._is_rank(pid)
        ]
        assert len(found) == 1
        return found[0]

    def _is_rank(self, pid: int) -> bool:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b"engine" in words and any(word.startswith(str(self.run_dir).encode() + b"/") for word in words)

    def parent_of(self, pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    def step(self) -> int:
        pages = [read_page(page_path(self.run_dir, rank)) for rank in (0, 1)]
        return min(page.step if page is not None and page.phase == "step" else -1 for page in pages)

    def wait_until(self, happens: Callable[[], bool], timeout_seconds: float = 120) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not happens():
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.process.kill()
                raise AssertionError(f"it never happened:\n{self.process.communicate()[0][-4000:]}")
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.step() >= step)

    def signal(self, number: int) -> None:
        """To the command itself: what we have started is nsenter."""
        os.kill(children_of(self.process.pid)[0], number)

    def wait(self, timeout_seconds: float = 180) -> tuple[int, str]:
        """(exit code, all output)."""
        output, _ = self.process.communicate(timeout=timeout_seconds)
        return self.process.returncode, output

    def exits(self) -> dict[int, dict[str, object]]:
        paths = sorted((self.run_dir / "ranks").glob("exit-*.json"))
        return {int(path.stem.removeprefix("exit-")): json.loads(path.read_text()) for path in paths}


def start(hosts: SshHosts, run_file: Path, hostfile: str = TWO, *options: str, cwd: Path = ROOT, **env: str) -> Job:
    """`fulltune train` on h1, for the hosts of a hostfile."""
    path = run_file.with_suffix(".hosts")
    path.write_text(hostfile)
    words = ["fulltune", "train", run_file, "--hostfile", path, *options]
    return Job(hosts, hosts.start("h1", *words, env=CPU | env, cwd=cwd), run_file.with_suffix(""))


def nothing_is_left(hosts: SshHosts, within_seconds: float = 15) -> bool:
    """No process on any host, and no shared memory."""
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        memory = [name for host in hosts.living() for name in Path(f"/proc/{hosts.init(host)}/root/dev/shm").iterdir()]
        if not memory and not any(map(hosts.processes, hosts.living())):
            return True
        time.sleep(0.1)
    print(
        [
            (host, pid, Path(f"/proc/{pid}/cmdline").read_bytes())
            for host in hosts.living()
            for pid in hosts.processes(host)
        ],
        memory,
    )
    return False


def state_bytes(run_dir: Path, step: int) -> list[bytes]:
    files = sorted((run_dir / "checkpoints" / f"step-{step:08d}").glob("slices-*.safetensors"))
    assert len(files) == 2
    return [file.read_bytes() for file in files]


def newest_step(run_dir: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


def test_trained_to_the_end_as_on_one_machine(hosts: SshHosts, folder: Path) -> None:
    with started(make_run(folder, "local", steps=4)) as run:
        assert run.wait()[0] == 0
    job = start(hosts, make_run(folder, "far", steps=4))
    code, output = job.wait()
    assert code == 0, output
    assert nothing_is_left(hosts)
    assert [record["host"] for record in job.exits().values()] == ["h1", "h2"]
    assert not (folder / "far" / "deepspeed_env").exists(), "what far hosts were handed is gone with the job"
    assert "starting: " in output
    assert " --master_addr 10.77.0.1 " in output, "not the address that h1's own name means on h1"
    assert state_bytes(folder / "far", 4) == state_bytes(folder / "local", 4)


@pytest.mark.long
def test_plain_deepspeed_works_by_hand(hosts: SshHosts, folder: Path) -> None:
    run_file = make_run(folder, "by-hand", steps=3)
    run_file.with_suffix(".hosts").write_text(TWO)
    words = ["deepspeed", "--hostfile", run_file.with_suffix(".hosts"), "--module", "engine", run_file]
    output = hosts.run("h1", *words, env=CPU, cwd=ROOT)
    assert "step 3/3" in output
    assert nothing_is_left(hosts)
    assert newest_step(folder / "by-hand") == 3


LONG_RUN = {"steps": 100_000, "checkpoint": {"save_every_steps": 50_000}}


@pytest.mark.long
def test_ctrl_c_and_a_killed_rank_end_their_own_job_alone(hosts: SshHosts, folder: Path) -> None:
    (hosts.home / ".deepspeed_env").write_text("FROM_HOME=1\n")
    (folder / ".deepspeed_env").write_text("FROM_HERE=1\n")
    other = start(hosts, make_run(folder, "other", **LONG_RUN))
    other.wait_for_step(5)
    job = start(hosts, make_run(folder, "stopped", **LONG_RUN), cwd=folder)
    job.wait_for_step(20)
    seen = environment_of(job.rank(1))
    assert b"FROM_HOME=1" in seen
    assert b"OMP_NUM_THREADS=1" in seen
    assert b"FROM_HERE=1" not in seen
    job.signal(signal.SIGINT)
    began = time.monotonic()
    code, output = job.wait()
    print(f"ended {time.monotonic() - began:.1f} s after Ctrl-C")
    assert code == 75, output
    assert {record["code"] for record in job.exits().values()} == {75}
    assert newest_step(job.run_dir) >= 19

    job = start(hosts, make_run(folder, "killed", **LONG_RUN))
    job.wait_for_step(20)
    os.kill(job.rank(1), signal.SIGKILL)
    began = time.monotonic()
    code, output = job.wait()
    print(f"ended {time.monotonic() - began:.1f} s after the kill")
    assert code == 76, output
    assert re.search(r"fulltune: rank 1 on h2 was killed \(signal 9, SIGKILL\) in phase step, step \d+", output), output

    reached = other.step()
    other.wait_for_step(reached + 5)
    other.signal(signal.SIGINT)
    assert other.wait()[0] == 75
    assert nothing_is_left(hosts)


@pytest.mark.long
def test_a_host_that_dies_is_named(hosts: SshHosts, folder: Path) -> None:
    job = start(hosts, make_run(folder, "dead", **LONG_RUN), TWO, "--restarts", "1")
    job.wait_for_step(20)
    hosts.power_off("h2")
    began = time.monotonic()
    code, output = job.wait()
    print(f"ended {time.monotonic() - began:.1f} s after the host, with a restart")
    assert code == 76, output
    assert "fulltune: rank 1 on h2 is lost: ssh to h2 has ended, and no sign of life comes from there" in output
    assert output.splitlines()[-1].startswith("fulltune: rank 1 on h2 did not come up: ssh to h2 has ended"), output
    assert nothing_is_left(hosts)


@pytest.mark.long
def test_a_network_that_breaks(hosts: SshHosts, folder: Path) -> None:
    """Both hosts live, and the disk: the files say so, but no rank reaches another."""
    job = start(hosts, make_run(folder, "cut-off", **LONG_RUN), TWO, "--hang-seconds", "20")
    job.wait_for_step(120)
    hosts.cut_off("h2")
    began = time.monotonic()
    code, output = job.wait()
    print(f"ended {time.monotonic() - began:.1f} s after the network")
    assert code == 76, output
    assert output.splitlines()[-1].startswith("fulltune: no network leads to h2 any more: "), output
    assert nothing_is_left(hosts)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_lose_only_their_ssh_save_and_end(hosts: SshHosts, folder: Path, rank: int) -> None:
    """Also rank 0, which prints into it."""
    job = start(hosts, make_run(folder, f"no-ssh-{rank}", **LONG_RUN))
    job.wait_for_step(20)
    os.kill(hosts.ssh_server_of(job.rank(rank)), signal.SIGKILL)
    code, output = job.wait()
    assert code == 75, output
    assert f"fulltune: ssh to h{rank + 1} has ended: ranks save a checkpoint and end" in output
    assert nothing_is_left(hosts)


@pytest.mark.long
def test_a_far_rank_that_cannot_move_is_killed(hosts: SshHosts, folder: Path) -> None:
    """All ranks are on h2, so that none hears h1's signals; a second Ctrl-C does not wait, and spares other jobs."""
    other = start(hosts, make_run(folder, "spared", **LONG_RUN))
    other.wait_for_step(1)
    run_file = make_run(folder, "stuck", **LONG_RUN)
    job = start(hosts, run_file, "h1 slots=1\nh2 slots=2\n", "--include", "h2")
    job.wait_for_step(20)
    os.kill(job.rank(1), signal.SIGSTOP)
    job.signal(signal.SIGINT)
    time.sleep(1)
    job.signal(signal.SIGINT)
    code, output = job.wait()
    assert code == 130, output
    other.wait_for_step(other.step() + 3)
    other.signal(signal.SIGINT)
    assert other.wait()[0] == 75
    assert nothing_is_left(hosts)


@pytest.mark.long
@pytest.mark.parametrize("where", ["h1", "h2"])
def test_ranks_leave_when_the_supervisor_is_killed(hosts: SshHosts, folder: Path, where: str) -> None:
    """On both hosts, or on the other one alone."""
    more = [] if where == "h1" else ["--include", "h2"]
    hostfile = TWO if where == "h1" else "h1 slots=1\nh2 slots=2\n"
    job = start(hosts, make_run(folder, f"alone-{where}", **LONG_RUN), hostfile, *more)
    job.wait_for_step(20)
    job.signal(signal.SIGKILL)
    began = time.monotonic()
    job.wait()
    assert nothing_is_left(hosts, within_seconds=30)
    print(f"all gone {time.monotonic() - began:.1f} s after the kill")
    assert {record["code"] for record in job.exits().values()} == {75}
    assert newest_step(job.run_dir) >= 19


@pytest.mark.long
def test_ranks_leave_when_the_host_of_the_supervisor_dies(hosts: SshHosts, folder: Path) -> None:
    job = start(hosts, make_run(folder, "orphans", **LONG_RUN), "h1 slots=1\nh2 slots=2\n", "--include", "h2")
    job.wait_for_step(20)
    hosts.power_off("h1")
    began = time.monotonic()
    assert nothing_is_left(hosts, within_seconds=150)
    print(f"all gone {time.monotonic() - began:.1f} s after the supervisor's host")
    assert {record["code"] for record in job.exits().values()} == {75}


@pytest.mark.parametrize(
    ("hostfile", "told"),
    [
        ("h1 slots=1\nh22 slots=1\n", "host h22 does not answer over ssh: "),
        (f"h1 slots=1\n{NOBODY} slots=1\n", f"host {NOBODY} does not answer over ssh: "),
        ("h1 slots=1\nh1.local slots=1\n", "hosts h1 and h1.local are one machine"),
    ],
)
def test_hosts_that_are_not_there_are_refused(hosts: SshHosts, folder: Path, hostfile: str, told: str) -> None:
    job = start(hosts, make_run(folder, "refused"), hostfile)
    code, output = job.wait(60)
    assert code == 78, output
    assert output.splitlines()[-1].startswith(f"fulltune: error: {told}"), output
    assert not job.exits()
    assert nothing_is_left(hosts)


@pytest.mark.long
def test_a_host_that_is_not_what_it_should_be_is_refused(hosts: SshHosts, folder: Path) -> None:
    """Without the run folder; with fewer devices than slots (h1 believes in two GPUs); connected, but silent."""
    job = start(hosts, make_run(folder, "refused", run_dir="/run/tmp/refused"))
    code, output = job.wait(60)
    assert (code, output.splitlines()[-1]) == (
        78, "fulltune: error: host h2 does not see the run folder /run/tmp/refused: it must be shared by all hosts",
    )  # fmt: skip
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 0\necho 1\n")
    program.chmod(0o755)
    path = f"{program.parent}:{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
    job = start(hosts, make_run(folder, "refused"), "h2 slots=2\n", PATH=path, DS_ACCELERATOR="cuda")
    code, output = job.wait(60)
    assert (code, output.splitlines()[-1]) == (78, "fulltune: error: host h2: slots=2, but it has 0 GPU(s)")
    os.kill(hosts.sshd("h2"), signal.SIGSTOP)
    code, output = start(hosts, make_run(folder, "refused")).wait(60)
    assert code == 78, output
    assert output.splitlines()[-1].startswith("fulltune: error: host h2 does not answer over ssh: ")
    assert nothing_is_left(hosts)


def test_nothing_is_left_of_hosts_whose_maker_is_killed(hosts: SshHosts, tmp_path: Path) -> None:
    words = [sys.executable, str(SUPPORT / "clusters" / "ssh_hosts.py"), "sleep", "600"]
    maker = Popen(words, env=os.environ | {"TMPDIR": str(tmp_path)}, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
    deadline = time.monotonic() + 60
    while len(found := descendants(maker.pid)) < 9:  # a switch; of each host three; nsenter and what it runs
        assert time.monotonic() < deadline
        time.sleep(0.1)
    maker.kill()
    maker.wait()
    while any(environment_of(pid) for pid in found):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def descendants(pid: int) -> list[int]:
    return [found for child in children_of(pid) for found in (child, *descendants(child))]
