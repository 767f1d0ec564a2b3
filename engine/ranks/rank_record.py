"""What a rank leaves in the run folder: its start, its log, its stacks when asked, and how it ended.

``ranks/rank-00000.json`` (start), ``rank-00000.log`` (all that it printed), ``stacks-00000.txt``,
``beat-00000`` (see `engine.ranks.heartbeat`) and ``exit-00000.json``, because a launcher's exit code does
not always tell the truth. Imports without torch.
"""

import contextlib
import faulthandler
import io
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO, TextIO

from engine.file_modes import FILE_MODE
from engine.ranks import heartbeat
from engine.ranks.liveness import supervisor

#: Sent to a rank of the same machine, it writes the Python stacks of all its threads.
STACKS_SIGNAL = signal.SIGUSR2


class RankRecord:
    """Files that tell a supervisor who runs here, what it does and how it ended."""

    def __init__(self, rank: int):
        self._rank = rank
        self._folder: Path | None = None
        self._ending = threading.Lock()
        self._log: IO[str] | None = None
        #: Where Python's stacks go when they are asked for; None before `begin`.
        self.stacks: IO[str] | None = None

    def begin(self, run_dir: Path) -> None:
        """Say that this rank runs, and log what it prints. An unwritable folder is told later, by its owner check."""
        folder = run_dir / "ranks"
        start = {"rank": self._rank, "pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"exit-{self._rank:05d}.json").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a file system without shared mappings: no hang is found then
                heartbeat.open_page(heartbeat.page_path(run_dir, self._rank))
            self._log = _open_log(folder / f"rank-{self._rank:05d}.log")
            self.stacks = _open_private(folder / f"stacks-{self._rank:05d}.txt", os.O_TRUNC)
            write_json(folder / f"rank-{self._rank:05d}.json", start)
        except OSError:
            return
        self._folder = folder
        print(
            f"--- started {time.strftime('%Y-%m-%d %H:%M:%S')}, pid {start['pid']} on {start['host']}", file=self._log
        )
        faulthandler.enable(self._log)
        faulthandler.register(STACKS_SIGNAL, self.stacks, all_threads=True)
        if supervisor()[1] and self._rank != 0:
            os.dup2(self._log.fileno(), 1)
            os.dup2(self._log.fileno(), 2)
        else:
            sys.stdout, sys.stderr = _Tee(sys.stdout, self._log), _Tee(sys.stderr, self._log)

    def log(self, text: str) -> None:
        """Into the log of this rank alone."""
        if self._log is not None:
            print(text, file=self._log, flush=True)

    def end(self, code: int, message: str, trace: str = "", asked_by: str = "") -> None:
        """Say how it ended, once: what is said first stays."""
        if self._folder is None or not self._ending.acquire(blocking=False):
            return
        now = heartbeat.current()
        values = {
            "rank": self._rank, "code": code, "phase": now.phase, "step": now.step, "signal": asked_by or None,
            "message": message, "traceback": trace or None, "time": time.time(), "pid": os.getpid(),
            "host": socket.gethostname(), "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }  # fmt: skip
        with contextlib.suppress(OSError):  # a full disk: the launcher takes it for a rank that was killed
            write_json(self._folder / f"exit-{self._rank:05d}.json", values)

    @property
    def is_read(self) -> bool:
        """True if somebody waits for this record and will tell its message."""
        return self._folder is not None and bool(supervisor()[1])

    def told_by_rank_zero(self, message: str) -> bool:
        """True if rank 0 ended with the same message, so that nobody needs to read it twice."""
        for _ in range(20):
            try:
                assert self._folder is not None
                return bool(json.loads((self._folder / "exit-00000.json").read_text())["message"] == message)
            except (OSError, ValueError, AssertionError):
                time.sleep(0.05)
        return False


class _Tee(io.TextIOBase):
    """Writes to the terminal and to a log; what redraws a line, a progress bar, to the terminal alone."""

    def __init__(self, terminal: TextIO, log: IO[str]):
        self._terminal = terminal
        self._log = log

    def write(self, text: str) -> int:
        if "\r" not in text:
            with contextlib.suppress(OSError):  # a log on a full disk ends no run
                self._log.write(text)
        with contextlib.suppress(BrokenPipeError):  # nor does a terminal, or an ssh, that is gone
            self._terminal.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._terminal.flush()

    def isatty(self) -> bool:
        return self._terminal.isatty()

    def fileno(self) -> int:
        return self._terminal.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._terminal.encoding


def _open_log(path: Path) -> IO[str]:
    return _open_private(path, os.O_APPEND)


def _open_private(path: Path, how: int) -> IO[str]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | how, FILE_MODE)
    return open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: PTH123


def write_json(path: Path, values: object) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _open_private(temporary, os.O_TRUNC) as file:
        file.write(json.dumps(values, indent=2) + "\n")
    temporary.replace(path)
