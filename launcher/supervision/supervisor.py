"""Stays with a running job: passes requests to stop on, and sees ranks that fail, die or hang."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from engine.errors import SUPERVISED, SUPERVISOR_FIFO
from launcher.job.hosts import is_local
from launcher.job.job import LEAST_SECONDS
from launcher.job.processes import (
    death_signal,
    end_processes,
    is_running,
    session_and_children,
    session_members,
    signal_processes,
)
from launcher.job.records import RankStart, failed_before, read_exits, read_starts
from launcher.ssh.mailbox import request
from launcher.ssh.ranks import SshRanks
from launcher.supervision.hang import Hang, HangWatch, write_stacks
from launcher.supervision.out_of_memory import MemoryWatch

_POLL_SECONDS = 0.2
_LOOK_SECONDS = 0.5
# Ranks that outlive the launcher get this long to save and end before they are killed.
_GRACE_SECONDS = 30.0
# Once a rank has failed or is dead, the others can do nothing useful any more.
_AFTER_FAILURE_SECONDS = 5.0
# What Slurm needs to end a step on all nodes.
_END_OF_STEP_SECONDS = 15.0
#: Phases in which there is nothing to save, and how long ranks may stay in them after a request to stop.
STARTING = ("start", "run file", "import", "rendezvous", "set-up")
_STARTING_SECONDS = 60.0
#: Give up on ranks that have not started this long after the first.
MISSING_SECONDS = 900.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass
class Stop:
    """The stop signals received so far; filled by signal handlers."""

    requests: list[int] = field(default_factory=list)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """As a signal handler."""
        self.requests.append(number)

    @property
    def at_once(self) -> bool:
        """A second Ctrl-C. Repeated TERM is no such thing: batch systems send several."""
        return self.requests.count(signal.SIGINT) > 1

    @contextlib.contextmanager
    def handling(self) -> Iterator[None]:
        """INT, TERM, HUP and USR1 are remembered here inside of the body."""
        before = {}
        for number in _STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                before[number] = signal.signal(number, self.handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Liveness:
    """A token that names the supervisor, and a FIFO whose readers see its end when the supervisor is gone."""

    token: str
    private_dir: Path

    @property
    def environment(self) -> dict[str, str]:
        """For the job. The FIFO has a name because `deepspeed` closes what its children could inherit."""
        return {
            SUPERVISED: f"{socket.gethostname()}/{self.token}",
            SUPERVISOR_FIFO: str(self.private_dir / "alive"),
        }


@contextlib.contextmanager
def liveness() -> Iterator[Liveness]:
    """Hold a new FIFO open for as long as the body runs or this process lives."""
    with tempfile.TemporaryDirectory(prefix="fulltune-", ignore_cleanup_errors=True) as folder:
        fifo = Path(folder) / "alive"
        os.mkfifo(fifo, 0o600)
        descriptor = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            yield Liveness(secrets.token_hex(8), Path(folder))
        finally:
            os.close(descriptor)


@dataclass
class Findings:
    """Observations of the supervisor that are not in the ranks' own records."""

    #: Ranks that vanished without a record while no other had failed: the killed ones. `deepspeed` often reports
    #: another rank, because it may notice the peer that fails next before the killed one.
    died_first: list[int] = field(default_factory=list)
    #: Signals that ended ranks of this machine, as far as they were seen.
    signals: dict[int, int] = field(default_factory=dict)
    hang: Hang | None = None
    hang_file: Path | None = None
    #: The ranks got a request to stop while they were starting, and did not come to a place where they could stop.
    stopped_starting: bool = False
    #: Ranks that never came up although others did.
    missing: list[int] = field(default_factory=list)
    #: The rank that hung, after a look at all stacks.
    culprit: int = -1


class Supervision:
    """A job under supervision, from its start until `end` has made sure that no process of it is left."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        run_dir: Path,
        run_file: Path,
        stop: Stop,
        token: str,
        hang_seconds: float = LEAST_SECONDS,
        num_ranks: int = 0,
        is_srun: bool = False,
        ssh_ranks: SshRanks | None = None,
    ):
        """`num_ranks` that do not all come up are a hang; 0: unknown. `is_srun`: the process is `srun`.

        `srun` hands USR1 on to every rank of every node, but not TERM: it kills the ranks. `ssh_ranks` are all
        ranks, also those of this machine, if the process starts them by ssh.
        """
        self._process = process
        self._num_ranks = num_ranks
        self._is_srun = is_srun
        self._run_dir = run_dir
        self._run_file = run_file
        self.stop = stop
        self._token = token
        self.ssh_ranks = ssh_ranks
        self._failed_since: float | None = None
        #: Whether the job did not end by itself.
        self.gave_up = False
        self._announced = False
        self._terminated: set[int] = set()
        self._first_start = 0.0
        self._stop_requested_at = 0.0
        self._starts: list[RankStart] = []
        self.hangs = HangWatch(run_dir, hang_seconds or 1e9)
        self.memory = MemoryWatch()
        self.findings = Findings()

    @property
    def pids(self) -> dict[int, int]:
        """The ranks of this machine that have started."""
        return {start.rank: start.pid for start in self._starts if is_local(start.host)}

    def stay(self) -> None:
        """Wait for the end of the process, or for a reason to end it. Does not end it: `end` does."""
        looked_last = 0.0
        looked = time.time()
        while self._process.poll() is None and not self.stop.at_once:
            now = time.monotonic()
            if now - looked_last >= _LOOK_SECONDS:
                looked_last = now
                self._look(looked, now)
                looked = time.time()
            has_waited = self._failed_since is not None and now - self._failed_since >= _AFTER_FAILURE_SECONDS
            if has_waited or self.findings.hang or self.findings.missing or (self.ssh_ranks and self.ssh_ranks.lost):
                return
            if len(self._starts) < self._num_ranks:  # one that dies at once shall be known before it is gone
                self._starts = read_starts(self._run_dir)
            for rank, pid in self.pids.items():
                if number := death_signal(pid):
                    self.findings.signals[rank] = number
            if self.stop.requests:
                self._pass_on()
                if self._is_stuck_starting(now):
                    self.findings.stopped_starting = True
                    return
            time.sleep(_POLL_SECONDS)
        self._look(looked, time.monotonic())

    def end(self) -> None:
        """Leave no survivor: TERM, time to save, KILL. Without that time where nothing can be saved any more."""
        findings = self.findings
        is_failed = self._failed_since is not None or findings.hang is not None
        hopeless = is_failed or findings.stopped_starting or bool(findings.missing)
        self.gave_up = self._process.poll() is None
        if self.gave_up and self._is_srun:
            # It ends the ranks of all nodes, which would outlive it if it were killed.
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_OF_STEP_SECONDS)

        def grace_seconds() -> float:
            return 0.0 if hopeless or self.stop.at_once else _GRACE_SECONDS

        if self.ssh_ranks is not None:
            self.ssh_ranks.end(self._process, grace_seconds)
            silent = self.ssh_ranks.silent_since(self._failed_since) if findings.hang is None else set()
            findings.died_first = sorted({*findings.died_first, *silent})
        if left := end_processes(self._members, self._terminate, grace_seconds):
            print(
                f"fulltune: these processes cannot be killed, the kernel waits for a device: {left}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_AFTER_FAILURE_SECONDS)
        self.memory.close()

    def _members(self) -> list[int]:
        """The processes of the job left on this machine; ranks that another daemon started are not of the session."""
        self._starts = read_starts(self._run_dir)
        members = session_members if self.ssh_ranks is None else session_and_children
        return sorted({*members(self._process.pid), *self._living_ranks()})

    def _terminate(self) -> None:
        """Send TERM to each rank once, so that it saves and ends. Its children get none: it may need them."""
        new = [pid for pid in self._living_ranks() if pid not in self._terminated]
        signal_processes(new, signal.SIGTERM)
        self._terminated |= set(new)

    def _living_ranks(self) -> list[int]:
        return [pid for pid in self.pids.values() if is_running(pid) and self._is_ours(pid)]

    def _look(self, looked_before: float, now: float) -> None:
        """Once over everything: who is there, who is gone, who hangs, how much memory they have."""
        self._starts = read_starts(self._run_dir)
        pids = self.pids
        exits = read_exits(self._run_dir)
        self._look_for_missing(now)
        if not self.findings.died_first and not failed_before(self._run_dir, looked_before):
            gone = [rank for rank, pid in pids.items() if not is_running(pid)]
            if gone:
                exits = read_exits(self._run_dir)  # what they wrote just before
            self.findings.died_first = [rank for rank in gone if rank not in exits]
        if self.ssh_ranks is not None:
            self.ssh_ranks.look(self._process)
            self.findings.signals |= self.ssh_ranks.killed
            self.findings.died_first = sorted({*self.findings.died_first, *self.ssh_ranks.killed, *self.ssh_ranks.lost})
        failed = any(record.code not in (0, 75) for record in exits.values())
        if self._failed_since is None and (failed or self.findings.died_first):
            self._failed_since = now
        self.memory.look([pid for rank, pid in pids.items() if rank not in exits])
        living = {rank: pid for rank, pid in pids.items() if rank not in exits and is_running(pid)}
        self.hangs.look(self._starts, living, now)
        if self._failed_since is not None or self._process.poll() is not None:
            return
        hang = self.hangs.find_hang(set(exits))
        if hang is not None and self.findings.hang is None:
            request(self._run_dir, "dump", self._token)
            self.findings.hang = hang
            self.findings.hang_file, self.findings.culprit = write_stacks(
                self._run_dir,
                living,
                hang,
                {rank: self.hangs.beats[rank] for rank in self.hangs.beats if rank not in exits},
            )

    def _look_for_missing(self, now: float) -> None:
        """Ranks that do not come up, long after others did."""
        started = {start.rank for start in self._starts}
        self._first_start = self._first_start or (now if started else 0.0)
        if self._first_start and now - self._first_start >= MISSING_SECONDS:
            self.findings.missing = [rank for rank in range(self._num_ranks) if rank not in started]

    def _is_stuck_starting(self, now: float) -> bool:
        """True if no rank has reached its first step, where it would stop, long after the request to stop."""
        self._stop_requested_at = self._stop_requested_at or now
        beats = [beat for rank, beat in self.hangs.beats.items() if rank in {start.rank for start in self._starts}]
        is_starting = all(beat.phase in STARTING for beat in beats)
        return is_starting and now - self._stop_requested_at >= _STARTING_SECONDS

    def _pass_on(self) -> None:
        """Make every rank stop, also the ranks of this machine that have come up since."""
        if not self._announced:
            self._announced = True
            print("fulltune: stopping: ranks save a checkpoint and end (Ctrl-C again kills them)", file=sys.stderr)
            if self._is_srun:
                self._process.send_signal(signal.SIGUSR1)
            if self.ssh_ranks is not None:
                self.ssh_ranks.request("stop")
        if not self._is_srun:
            self._terminate()

    def _is_ours(self, pid: int) -> bool:
        """Still the rank, and not a process that got its number later."""
        with contextlib.suppress(OSError):
            return str(self._run_file).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return False
