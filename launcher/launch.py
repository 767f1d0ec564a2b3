"""Starts `deepspeed` and stays with it: signals reach the ranks, the exit code is the ranks' own."""

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from engine.errors import SUPERVISED, CannotWriteError, ConfigError
from launcher.environment import remove_shared_memory
from launcher.hosts import Node, is_local
from launcher.verdict import clear_records, failed_before, judge, read_exits, read_starts

DEFAULT_PORT = 29500
_POLL_SECONDS = 0.2
# Ranks that outlive the launcher get this long to save and end before they are killed.
_GRACE_SECONDS = 30.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# DeepSpeed hands these to a remote shell unquoted.
_SHELL_SAFE = re.compile(r"[\w@%+=:,./-]*")
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


@dataclass(frozen=True)
class Job:
    """One start of the engine: what runs where. `command` is the complete `deepspeed` or `srun` argv."""

    run_dir: Path
    run_file: Path
    nodes: tuple[Node, ...]
    command: tuple[str, ...]
    environment: dict[str, str]
    master_port: int

    @property
    def num_ranks(self) -> int:
        """World size."""
        return sum(len(node.slots) for node in self.nodes)

    @property
    def starts_through_srun(self) -> bool:
        """Whether Slurm starts the ranks (see launcher.slurm)."""
        return self.command[0] == "srun"


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def deepspeed_program() -> str:
    """The `deepspeed` script of this very Python."""
    return str(Path(sys.executable).parent / "deepspeed")


def local_command(node: Node, master_port: int, engine_arguments: list[str]) -> tuple[str, ...]:
    """The argv for all ranks on this machine, on the node's devices."""
    if node.slots == tuple(range(len(node.slots))):
        where = ["--num_gpus", str(len(node.slots))]
    else:
        where = ["--include", f"localhost:{','.join(map(str, node.slots))}"]
    address = ["--master_addr", "127.0.0.1", "--master_port", str(master_port)]
    # Not even `error`: all it would tell is that a rank failed, and we say which and why.
    return (deepspeed_program(), "--log_level", "critical", *where, *address, "--module", "engine", *engine_arguments)


def hostfile_command(
    hostfile: Path, nodes: list[Node], selection: list[str], master_port: int, engine_arguments: list[str]
) -> tuple[str, ...]:
    """The argv for the hosts of a hostfile. `selection` is --include or --exclude with its value, or [].

    A single host needs care: DeepSpeed starts it right here whatever its name, unless forced.
    """
    where = ["--hostfile", str(hostfile), *selection]
    if all(is_local(node.name) for node in nodes) and len(nodes) == 1:
        where += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
    else:
        _refuse_unsafe([*engine_arguments, str(Path.cwd()), sys.executable])
        if len(nodes) == 1:
            where.append("--force_multi")
    port = ["--master_port", str(master_port)]
    return (deepspeed_program(), "--log_level", "error", *where, *port, "--module", "engine", *engine_arguments)


def _refuse_unsafe(words: list[str]) -> None:
    """Several hosts: DeepSpeed builds a shell command out of these without quoting."""
    for word in words:
        if not _SHELL_SAFE.fullmatch(word):
            raise ConfigError(f"`{word}` would reach remote shells unquoted: use letters, digits and . _ - / = only")
    for key, value in os.environ.items():
        if key.startswith(_EXPORTED) and re.search(r"[\"$`\\\n]", value):
            raise ConfigError(
                f"environment variable {key} would reach remote shells unquoted: remove $ ` \\ and quotes"
            )


@contextlib.contextmanager
def owned_run_dir(run_dir: Path) -> Iterator[None]:
    """Hold the run folder for one launcher of this machine; CannotWriteError if another has it."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / "launcher.lock").open("a")
    except OSError as error:
        raise CannotWriteError(f"run_dir {run_dir}: cannot be created: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotWriteError(f"run_dir {run_dir}: another `fulltune train` is using it") from None
        yield


@dataclass
class _Stop:
    """What the user or the system has asked for so far; filled by signal handlers."""

    requests: list[int] = field(default_factory=list)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        self.requests.append(number)

    @property
    def at_once(self) -> bool:
        """A second Ctrl-C. Repeated TERM is no such thing: batch systems send several."""
        return self.requests.count(signal.SIGINT) > 1


def run_job(job: Job) -> tuple[int, str]:
    """Run `job` to its end; (exit code, one line that explains it unless it is 0).

    INT, TERM, HUP and USR1 ask the ranks to save a checkpoint and end; a second INT kills them.
    `deepspeed` itself would pass none of them on. Nothing it started is left when this returns.
    """
    clear_records(job.run_dir)
    stop = _Stop()
    died_first: list[int] = []
    with _handling(stop):
        # A session of its own: a terminal's Ctrl-C then reaches us alone, and all of it can be found.
        environment = os.environ | job.environment | {SUPERVISED: "1"}
        process = subprocess.Popen(job.command, env=environment, start_new_session=True)
        try:
            died_first = _stay(process, job, stop)
        finally:
            _end_session(process.pid, stop)
            process.wait()
            remove_shared_memory("127.0.0.1", job.master_port)
    code, message = judge(job.run_dir, job.num_ranks, process.returncode, died_first)
    return (130, "interrupted twice: killed, no checkpoint saved") if stop.at_once and code else (code, message)


@contextlib.contextmanager
def _handling(stop: _Stop) -> Iterator[None]:
    before = {}
    for number in _STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
            before[number] = signal.signal(number, stop.handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stay(process: subprocess.Popen[bytes], job: Job, stop: _Stop) -> list[int]:
    """Wait for the end; pass a request to stop on to every rank of this host, also to late ones.

    Returns the ranks that vanished without a record while no other had failed: the killed ones, of
    which `deepspeed` often does not tell, because a peer that fails next may come first in its eyes.
    """
    told: set[int] = set()
    announced = False
    died_first: list[int] = []
    looked = time.time()
    while process.poll() is None:
        if stop.at_once:
            return died_first
        if not died_first and not failed_before(job.run_dir, looked):
            looked = time.time()
            died_first = _vanished(job)
        if stop.requests and not announced:
            announced = True
            print("fulltune: stopping: ranks save a checkpoint and end (Ctrl-C again kills them)", file=sys.stderr)
            if not any(is_local(node.name) for node in job.nodes):
                process.send_signal(signal.SIGINT)  # no rank here to tell: DeepSpeed ends the remote ones
        if stop.requests:
            told |= _tell_ranks(job, told)
        time.sleep(_POLL_SECONDS)
    return died_first


def _vanished(job: Job) -> list[int]:
    """Ranks of this host that have started, are gone, and left no exit record."""
    gone = [start.rank for start in read_starts(job.run_dir) if is_local(start.host) and not _is_running(start.pid)]
    exits = read_exits(job.run_dir) if gone else {}
    return [rank for rank in gone if rank not in exits]


def _is_running(pid: int) -> bool:
    fields = _stat_fields(Path(f"/proc/{pid}/stat"))
    return bool(fields) and fields[0] not in "ZX"


def _tell_ranks(job: Job, told: set[int]) -> set[int]:
    """TERM to ranks of this host that have started and were not told; returns their pids."""
    newly = set()
    for start in read_starts(job.run_dir):
        if start.pid in told or not is_local(start.host):
            continue
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{start.pid}/cmdline").read_bytes().split(b"\0")
            if str(job.run_file).encode() in words:  # still ours, not a process that got the number later
                os.kill(start.pid, signal.SIGTERM)
        newly.add(start.pid)
    return newly


def _end_session(session: int, stop: _Stop) -> None:
    """Leave no survivor: TERM, time to save, KILL."""
    deadline = time.monotonic() + _GRACE_SECONDS
    asked: set[int] = set()
    while members := _session_members(session):
        number = signal.SIGKILL if stop.at_once or time.monotonic() > deadline else signal.SIGTERM
        for pid in members:
            if number == signal.SIGKILL or pid not in asked:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                asked.add(pid)
        time.sleep(_POLL_SECONDS)


def _session_members(session: int) -> list[int]:
    """Living processes of a session, from /proc."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = _stat_fields(stat)
        if fields and int(fields[3]) == session and fields[0] not in "ZX":
            members.append(int(stat.parent.name))
    return members


def _stat_fields(path: Path) -> list[str]:
    """State, parent, group, session, ... of a process; [] if it is gone."""
    try:
        # "pid (name) state ppid ...": the name may hold anything, also blanks and parentheses.
        return path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
