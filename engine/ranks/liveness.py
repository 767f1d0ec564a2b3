"""A rank notices by itself that it shall not live on: launcher dead, supervisor dead, job given up, STOP or HOLD.

`deepspeed` closes what its children could inherit, so the supervisor's pipe is a FIFO with a name,
which nothing is ever written to: its end of file says that the supervisor is gone. Imports without torch.
"""

import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, NoReturn

from engine.errors import SUPERVISED, SUPERVISOR_FIFO
from engine.ranks import heartbeat
from engine.ranks.stop import StopSignal

SHARED_MEMORY_DIR = Path("/dev/shm")  # noqa: S108 - where DeepSpeed's CPU collectives put their segments
#: Ranks without a supervisor get this long to commit and end.
ALONE_SECONDS = 10.0
_POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1


def end_with_parent(ask: Callable[[str], None]) -> None:
    """Have the kernel send TERM to this process when its parent, the launcher, dies; `ask` if it is dead already.

    Call it after the handler of TERM is there.
    """
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it died before it could be told
        ask("the launcher is gone")


def supervisor() -> tuple[str, str]:
    """(host, token) of the supervisor that started this job; empty strings without one."""
    host, _, token = os.environ.get(SUPERVISED, "").rpartition("/")
    return host, token


class Watch:
    """A thread of the rank that turns what happens outside into a request to stop, or an end.

    `leave` ends the process with a message; it is called when nothing else has worked. Files in the
    run folder: STOP and HOLD stop the run (rank 0 looks); ``ranks/dump`` and ``ranks/leave``, with
    the supervisor's token, are for ranks of other machines than its own.
    """

    def __init__(
        self, run_dir: Path, rank: int, stop: StopSignal, stacks: IO[str] | None, leave: Callable[[str], NoReturn]
    ):
        self._run_dir = run_dir
        self._rank = rank
        self._stop = stop
        self._stacks = stacks
        self._leave = leave
        host, self._token = supervisor()
        self._is_far = bool(self._token) and host != socket.gethostname()
        self._fifo = _open_fifo()
        self._is_alone = bool(self._token) and not self._is_far and self._fifo is None
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def _run(self) -> None:
        poll = select.poll()
        if self._fifo is not None:
            poll.register(self._fifo, 0)  # the hang-up is always reported
        dumped = False
        while True:
            if self._is_alone:  # it was gone before this rank came up
                self._end_alone()
            if self._fifo is None:
                time.sleep(_POLL_SECONDS)
            elif poll.poll(_POLL_SECONDS * 1000):
                self._end_alone()
            self._stop.look_at_clock()
            with contextlib.suppress(OSError):  # a run folder that does not answer now may do so later
                self._look_for_files()
            if self._is_far:
                with contextlib.suppress(OSError):
                    heartbeat.flush()
                if not dumped and self._is_told("dump") and self._stacks is not None:
                    dumped = True
                    faulthandler.dump_traceback(self._stacks)
                if self._is_told("leave"):
                    self._leave("told to leave by the supervisor")

    def _look_for_files(self) -> None:
        if self._rank == 0 and not self._stop.asked:
            for name in ("STOP", "HOLD"):
                if (self._run_dir / name).exists():
                    self._stop.ask(f"the file {name}")

    def _end_alone(self) -> NoReturn:
        self._stop.ask("the supervisor is gone")
        time.sleep(ALONE_SECONDS)
        self._leave("the supervisor is gone and no checkpoint could be committed in time")

    def _is_told(self, what: str) -> bool:
        try:
            return (self._run_dir / "ranks" / what).read_text() == self._token
        except OSError:
            return False


def _open_fifo() -> int | None:
    """The supervisor's FIFO; None without one, or on another machine than its own."""
    path = os.environ.get(SUPERVISOR_FIFO)
    if not path:
        return None
    try:
        # Only while the supervisor has it open can it be opened for writing; and a FIFO that nobody ever wrote to
        # would not report its end.
        writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(writer)
    except OSError:
        return None


def remove_shared_memory() -> None:
    """Remove this rank's segment of DeepSpeed's CPU collectives, which it never removes itself.

    The name is DeepSpeed's: user, rendezvous address, port and rank.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    rank = os.environ.get("RANK", "0")
    for segment in SHARED_MEMORY_DIR.glob(f"deepspeed_allreduce_buffer*_{address}_{port}_{rank}"):
        segment.unlink(missing_ok=True)
