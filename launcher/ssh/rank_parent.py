"""The parent of one rank that ssh started: hands the supervisor's requests on to the rank and writes heartbeats.

`deepspeed` starts ``python -m launcher.ssh.rank_parent`` once a rank on every host of a hostfile. ssh carries no
signals, and the processes that it started outlive it, so requests come through the run folder (launcher.ssh.mailbox).
A parent still works when its rank is stuck or stopped: it kills the rank when the job is over, and notes which
signal ended it. The parent's own code is 0 when the rank stopped with a checkpoint, because `deepspeed` would kill the
others otherwise. The honest codes are in the ranks' exit records.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from engine.errors import COMPLETE, INTERNAL, STOPPED_WITH_CHECKPOINT, ConfigError
from engine.file_modes import set_umask
from engine.ranks.liveness import end_with_parent, remove_shared_memory, supervisor
from engine.ranks.rank_record import write_json
from launcher.ssh.mailbox import (
    OVER,
    alive_path,
    is_requested,
    killed_path,
    read_heartbeat,
    supervisor_path,
    write_heartbeat,
)

_POLL_SECONDS = 0.2
_SAY_SECONDS = 1.0
#: After a request to leave, a rank gets this long to write its exit record.
_LEAVE_SECONDS = 2.0
#: The supervisor's host is taken for gone after this; ranks that stop then get as long as Slurm gives by default.
_ALONE_SECONDS = 60.0
_GRACE_SECONDS = 30.0
_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run this rank to its end; the code that `deepspeed` shall see."""
    arguments, engine_flags = _arguments(argv)
    rank, token = int(os.environ.get("RANK", "0")), supervisor()[1]
    parent = _Parent(arguments.run_dir, rank, token)  # first of all: until here a signal kills
    end_with_parent(parent.stop)
    set_umask()
    record = arguments.run_dir / "ranks" / f"exit-{rank:05d}.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    if os.environ.get("WORLD_SIZE") != str(arguments.ranks):
        message = f"{arguments.ranks} ranks were asked for, and deepspeed started {os.environ.get('WORLD_SIZE')}"
        _write_exit_record(record, rank, ConfigError.exit_code, message)
        return ConfigError.exit_code
    code = parent.run([sys.executable, "-m", "engine", arguments.run_file, *engine_flags])
    remove_shared_memory()
    if code < 0:
        note = {"rank": rank, "signal": -code, "asked": -code in parent.asked, "time": time.time()}
        write_json(killed_path(arguments.run_dir, rank), note | {"host": socket.gethostname()})
        return 128 - code
    if not record.exists():
        _write_exit_record(
            record, rank, code or INTERNAL, f"ended with code {code} before it could say why: see what it printed"
        )
    return 0 if code in (COMPLETE, STOPPED_WITH_CHECKPOINT) else code


class _Parent:
    """Hands signals and the supervisor's requests on to the rank, also those that come before it has started."""

    def __init__(self, run_dir: Path, rank: int, token: str):
        self._run_dir, self._rank, self._token = run_dir, rank, token
        #: Signals that the rank was sent from here.
        self.asked: set[int] = set()
        self._child: subprocess.Popen[bytes] | None = None
        self._count = 0
        self._said = 0.0
        self._word = ("", "")
        self._silent_seconds = 0.0
        self._looked = time.monotonic()
        self._left: float | None = None
        for number in _HANDED_ON:
            signal.signal(number, self._hand_on)

    def stop(self, _reason: str) -> None:
        """Have the rank stop."""
        self._send(signal.SIGTERM)

    def run(self, command: list[str]) -> int:
        """Run the rank to its end; its code as Popen gives it."""
        self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        for number in list(self.asked):
            self._child.send_signal(number)
        while (code := self._child.poll()) is None:
            self._look(time.monotonic())
            time.sleep(_POLL_SECONDS)
        return code

    def _look(self, now: float) -> None:
        if now - self._said >= _SAY_SECONDS:
            self._said, self._count = now, self._count + 1
            write_heartbeat(alive_path(self._run_dir, self._rank), self._token, self._count)
        passed, self._looked = min(now - self._looked, _SAY_SECONDS), now
        word = read_heartbeat(supervisor_path(self._run_dir))
        self._silent_seconds = 0.0 if word != self._word else self._silent_seconds + passed
        self._word = word
        is_over = (
            word[0] not in ("", self._token) or word[1] == OVER or is_requested(self._run_dir, "leave", self._token)
        )
        if is_over or self._silent_seconds >= _ALONE_SECONDS + _GRACE_SECONDS:
            self._left = self._left or now
            if now - self._left >= _LEAVE_SECONDS:
                self._send(signal.SIGKILL)
        elif signal.SIGTERM not in self.asked and self._shall_stop():
            self._send(signal.SIGTERM)

    def _shall_stop(self) -> bool:
        return self._silent_seconds >= _ALONE_SECONDS or is_requested(self._run_dir, "stop", self._token)

    def _hand_on(self, number: int, _frame: FrameType | None) -> None:
        self._send(number)

    def _send(self, number: int) -> None:
        self.asked.add(number)
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(number)


def _write_exit_record(record: Path, rank: int, code: int, message: str) -> None:
    values = {"rank": rank, "code": code, "phase": "start", "message": message, "host": socket.gethostname()}
    write_json(record, values | {"time": time.time()})


def _arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m launcher.ssh.rank_parent", description=__doc__)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    parser.add_argument("run_file")
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    sys.exit(main())
