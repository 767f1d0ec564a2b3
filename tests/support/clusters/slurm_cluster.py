"""A real Slurm of two nodes on this machine, in a folder of its own: munged, slurmctld and two slurmd.

Everything runs under one keeper process that adopts what its children leave behind and ends all of
it when it is told to, or when whoever started it is gone: no daemon, step or job is left. By hand,
with a shell inside the cluster: ``python tests/support/clusters/slurm_cluster.py``.
"""

import contextlib
import ctypes
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")
_SUBREAPER, _DEATH_SIGNAL = 36, 1  # PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# Waits in a job's shortest way to come back: Slurm's own is two minutes.
_CREDENTIAL_SECONDS = 2
KILL_WAIT_SECONDS = 30

_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=cred_expire={credential},socket={folder}/munge.sock
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort={port}
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=1
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
KillWait={kill_wait}
SlurmdTimeout=20
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 RealMemory=8000
PartitionName=normal Nodes=n1,n2 Default=YES State=UP PriorityTier=1 GraceTime=0 OverTimeLimit=0
PartitionName=patient Nodes=n1,n2 State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes=n1,n2 State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str:
    """The reason that no cluster can be started here, installing Slurm first where that is allowed; "" if it can."""
    if not sys.platform.startswith("linux"):
        return "a Slurm cluster needs Linux"
    if os.getuid() != 0:
        return "a Slurm cluster of two nodes on one machine needs root: slurmd starts jobs as their users"
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if not missing:
        return ""
    if shutil.which("apt-get") is None:
        return f"not installed, and there is no apt-get here: {', '.join(missing)}"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
        done = subprocess.run(
            ["apt-get", "-qq", *words], env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        if done.returncode and words[0] == "install":
            return f"apt-get install slurm-wlm munge failed: {' '.join(done.stderr.split())[-300:]}"
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    return f"slurm-wlm and munge are installed but lack {', '.join(missing)}" if missing else ""


@dataclass
class SlurmCluster:
    """A running cluster; `environment` makes the Slurm commands of this machine talk to it."""

    folder: Path
    environment: dict[str, str]
    keeper: "subprocess.Popen[str]"

    def run(self, *words: str | Path, check: bool = True, timeout: float = 120, **more: Any) -> str:
        """The output of a command inside the cluster's environment; AssertionError if it fails."""
        done = subprocess.run(
            [str(word) for word in words], env=self.environment | more.pop("env", {}), capture_output=True, text=True,
            timeout=timeout, check=False, stdin=subprocess.DEVNULL, **more,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def submit(self, *words: str | Path, **more: Any) -> int:
        """`sbatch` with these words; the job's id."""
        return int(self.run("sbatch", "--parsable", *words, **more).split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, ..."""
        text = self.run("scontrol", "show", "job", "-o", str(number))
        return dict(re.findall(r"(\w[\w:/]*)=(\S*)", text))

    def wait_for(self, number: int, *states: str, timeout: float = 180) -> dict[str, str]:
        """Wait until the job is in one of these states; its facts. AssertionError with the reason otherwise."""
        deadline = time.monotonic() + timeout
        while (facts := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is {facts} instead of {states}; {self.tail()}"
            time.sleep(0.2)
        return facts

    def release(self, number: int) -> None:
        """Let a requeued job start: Slurm waits two minutes, to be sure that its old credentials are worth nothing."""
        time.sleep(2 * _CREDENTIAL_SECONDS)
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)

    def tail(self) -> str:
        """The end of the daemons' logs, for a failing test."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    def cancel_all(self) -> None:
        """End every job, wait for it, and bring both nodes back."""
        deadline = time.monotonic() + KILL_WAIT_SECONDS + 30
        self.run("scancel", "--partition=normal,patient,high", "--signal=KILL", "--full", check=False)
        while numbers := self.run("squeue", "-h", "-o", "%i").split():
            self.run("scancel", *numbers, check=False)
            assert time.monotonic() < deadline, f"jobs {numbers} do not end; {self.tail()}"
            time.sleep(0.5)
        self.tell("start")
        self.wait_until_idle()

    def wait_until_idle(self, timeout: float = 60) -> None:
        """Wait until both nodes can take jobs."""
        deadline = time.monotonic() + timeout
        while (states := self.run("sinfo", "-h", "-N", "-p", "normal", "-o", "%T").split()) != ["idle", "idle"]:
            if any("down" in state or "drain" in state for state in states):
                self.run("scontrol", "update", f"NodeName={','.join(NODES)}", "State=RESUME", check=False)
            assert time.monotonic() < deadline, f"nodes are {states}; {self.tail()}"
            time.sleep(0.3)

    def tell(self, line: str) -> str:
        """A word to the keeper: `start` the daemons that do not run, or `kill n2`: the node with all that it runs."""
        assert self.keeper.stdin is not None
        assert self.keeper.stdout is not None
        self.keeper.stdin.write(line + "\n")
        self.keeper.stdin.flush()
        return self.keeper.stdout.readline()

    def processes(self) -> list[int]:
        """Every process of the cluster: daemons, steps and what the jobs started."""
        return [pid for pid in _descendants(self.keeper.pid) if pid != self.keeper.pid]


@contextlib.contextmanager
def running_cluster(folder: Path | None = None) -> Iterator[SlurmCluster]:
    """Start a cluster, wait until both nodes are idle, and end all of it afterwards."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir=folder) as name:
        path = Path(name)
        keeper = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "keep", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        environment = inherited | {"SLURM_CONF": str(path / "slurm.conf")}
        environment["PATH"] = f"{Path(sys.executable).parent}:{_PATH}"
        cluster = SlurmCluster(path, environment, keeper)
        try:
            assert keeper.stdout is not None
            assert keeper.stdout.readline() == "started\n", cluster.tail()
            _wait_for_controller(cluster)
            cluster.wait_until_idle()
            yield cluster
        finally:
            assert keeper.stdin is not None
            keeper.stdin.close()
            keeper.wait(timeout=60)


def _wait_for_controller(cluster: SlurmCluster) -> None:
    deadline = time.monotonic() + 30
    while "UP" not in cluster.run("scontrol", "ping", check=False):
        assert time.monotonic() < deadline, cluster.tail()
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _keep(folder: Path) -> None:
    """The keeper: starts the daemons in the foreground as its children; ends everything at the end of its input."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_SUBREAPER, 1)
    libc.prctl(_DEATH_SIGNAL, signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    children: dict[str, subprocess.Popen[bytes]] = {}
    try:
        _write_files(folder)
        _start_daemons(folder, children)
        print("started", flush=True)
        while True:
            if not select.select([sys.stdin], [], [], 1.0)[0]:
                _reap(children)
                continue
            line = sys.stdin.readline()
            if not line:
                return
            word, _, name = line.strip().partition(" ")
            if word == "kill":
                _kill_node(folder, name, children[name])
            else:
                _start_daemons(folder, children)
            print("done", flush=True)
    finally:
        deadline = time.monotonic() + 30
        while pids := [pid for pid in _descendants(os.getpid()) if pid != os.getpid()]:
            _kill(pids)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)


def _write_files(folder: Path) -> None:
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    port, port1, port2 = _free_ports(3)
    values = {"host": os.uname().nodename, "folder": folder, "port": port, "port1": port1, "port2": port2}
    (folder / "slurm.conf").write_text(
        _CONFIG.format(**values, credential=_CREDENTIAL_SECONDS, kill_wait=KILL_WAIT_SECONDS)
    )


def _start_daemons(folder: Path, children: dict[str, "subprocess.Popen[bytes]"]) -> None:
    """Start the daemons that do not run."""
    commands = {
        "munged": [
            "munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.sock",
            f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed", "--num-threads=4",
        ],
        "slurmctld": ["slurmctld", "-D"],
        **{node: ["slurmd", "-D", "-N", node] for node in NODES},
    }  # fmt: skip
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _PATH, "HOME": os.environ.get("HOME", "/root")}
    for name, command in commands.items():
        if name in children and children[name].poll() is None:
            continue
        with (folder / f"{name}.out.log").open("ab") as output:
            children[name] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder,
                start_new_session=True,
            )  # fmt: skip
        if name == "munged":
            deadline = time.monotonic() + 10
            while not (folder / "munge.sock").exists() and time.monotonic() < deadline:
                time.sleep(0.02)


def _kill_node(folder: Path, node: str, daemon: "subprocess.Popen[bytes]") -> None:
    """As when the power goes: the node's daemon and, wherever they hang, all of its steps and their processes."""
    spool = str(folder / f"spool.{node}")
    sockets = {
        line.split()[6]
        for line in Path("/proc/net/unix").read_text().splitlines()
        if len(line.split()) == 8 and line.split()[7].startswith(spool)
    }
    steps = [pid for pid in _descendants(os.getpid()) if _sockets(pid) & sockets]
    _kill([daemon.pid])
    for step in steps:
        _kill(_descendants(step))
    daemon.wait()


def _sockets(pid: int) -> set[str]:
    """Inodes of the sockets that a process has open."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            found.update(re.findall(r"^socket:\[(\d+)\]$", str(link.readlink())))
    return found


def _reap(children: dict[str, "subprocess.Popen[bytes]"]) -> None:
    """Collect orphans that have ended, but leave the daemons to their objects."""
    ours = {child.pid for child in children.values()}
    for pid in _children_of(os.getpid()):
        if pid not in ours:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _parents() -> dict[int, int]:
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] not in "X":
                found[int(stat.parent.name)] = int(fields[1])
    return found


def _children_of(pid: int) -> list[int]:
    return [child for child, parent in _parents().items() if parent == pid]


def _descendants(pid: int) -> list[int]:
    """`pid` and everything below it."""
    parents, found, last = _parents(), {pid}, 0
    while len(found) != last:
        last = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return sorted(found)


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main() -> None:
    """`keep FOLDER` is the keeper; without arguments a shell inside a new cluster."""
    if sys.argv[1:2] == ["keep"]:
        _keep(Path(sys.argv[2]))
        return
    reason = why_not()
    if reason:
        sys.exit(reason)
    with running_cluster() as cluster:
        print(json.dumps({"SLURM_CONF": cluster.environment["SLURM_CONF"]}))
        command = sys.argv[1:] or [os.environ.get("SHELL", "/bin/bash")]
        subprocess.run(command, env=cluster.environment, check=False)


if __name__ == "__main__":
    main()
