"""Starts real ranks for tests: one process group a call, on CPU, with a time limit and a clean /dev/shm.

They are forked from one process that has imported everything; see tests/support/workers/rank_parent.py.
"""

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from repository import PYTHON_PATH, ROOT, WORKERS


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rank_environment(world_size: int) -> dict[str, str]:
    """Environment of CPU ranks, whatever devices this machine has."""
    from engine.zero.prebuild import tool_environment

    return (
        os.environ
        | tool_environment()
        | {
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world_size)),
            "PYTHONPATH": os.pathsep.join(map(str, PYTHON_PATH)),
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
    )


class Ranks:
    """Ranks that run. Those of a test that does not wait for them are killed."""

    def __init__(self, results: socket.socket, output: IO[str], port: int):
        self._results = results
        self._output = output
        self._port = port
        self.codes: list[int] = [1]
        started = results.recv(1 << 16)
        assert started, "the parent of ranks has ended; why stands among the output"
        self.pids: list[int] = json.loads(started)
        self.codes = []

    def wait(self, timeout_seconds: float = 600) -> str:
        """All their output; then `codes` are there. AssertionError, and none is left, when they do not end."""
        in_time = bool(select.select([self._results], [], [], timeout_seconds)[0])
        self.end()
        assert in_time, f"ranks did not end in {timeout_seconds} s:\n{self.output[-4000:]}"
        return self.output

    def __del__(self) -> None:
        self.end()

    def end(self) -> None:
        """Kill those that are left, and clear up after them."""
        if not self.codes:
            self._results.shutdown(socket.SHUT_WR)
            self.codes = json.loads(self._results.recv(1 << 16))
            self._results.close()
        for segment in Path("/dev/shm").glob(f"deepspeed_*_{self._port}_*"):
            segment.unlink(missing_ok=True)

    def all_pids(self) -> list[int]:
        """Of those that have not ended, as far as is known."""
        return [] if self.codes else self.pids

    @property
    def output(self) -> str:
        """What they have printed so far."""
        self._output.seek(0)
        return self._output.read()


class RankParent:
    """The process that ranks are forked from; it ends with this one."""

    def __init__(self, **variables: str) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Told to use one thread it starts no other, so that it may fork; each rank sets its own number.
        environment = rank_environment(1) | {"OMP_NUM_THREADS": "1"} | variables
        with theirs:
            command = [sys.executable, WORKERS / "rank_parent.py"]
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs)

    def start(self, world_size: int, *program: str | Path, together: bool = True, **variables: str) -> Ranks:
        """Start `program` (a script, or "-m" and a module, and arguments) once a rank, with these variables.

        When one fails the others are ended, as by a launcher; not `together` they are left alone, as by srun.
        """
        port = free_port()
        request = {
            "world_size": world_size, "port": port, "program": list(map(str, program)), "together": together,
            "environment": rank_environment(world_size) | variables,
        }  # fmt: skip
        output = tempfile.TemporaryFile("a+", errors="replace")  # noqa: SIM115 - open as long as the ranks run
        results, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._requests, [json.dumps(request).encode()], [output.fileno(), theirs.fileno()])
        return Ranks(results, output, port)


@functools.cache
def rank_parent() -> RankParent:
    """The parent that all tests of a process share; the first test that needs it starts it."""
    return RankParent()


def start_ranks(world_size: int, *program: str | Path) -> Ranks:
    """Start `program` once a rank."""
    return rank_parent().start(world_size, *program)


def run_ranks(
    world_size: int, *program: str | Path, timeout_seconds: float = 600, expected_codes: tuple[int, ...] | None = None
) -> str:
    """Run `program` once a rank and return the output; AssertionError with it when they end with other codes than 0."""
    ranks = start_ranks(world_size, *program)
    output = ranks.wait(timeout_seconds)
    assert ranks.codes == list(expected_codes or [0] * world_size), f"ended with {ranks.codes}:\n{output[-6000:]}"
    return output


def kill_ranks(run_dir: Path, number: signal.Signals) -> None:
    """Send a signal to every rank that wrote its record into the run folder."""
    for record in sorted((run_dir / "ranks").glob("rank-*.json")):
        with contextlib.suppress(ProcessLookupError):
            os.kill(json.loads(record.read_text())["pid"], number)
