"""Starts real ranks for tests: one process group a call, on CPU, with a time limit and a clean /dev/shm."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from repository import PYTHON_PATH, ROOT


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


def start_ranks(
    world_size: int, *program: str | Path, output: int = subprocess.PIPE, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start `program` (a script, or "-m" and a module, and arguments) once a rank, in a session of its own."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size),
        "--master-addr", "127.0.0.1", "--master-port", str(free_port()), *map(str, program),
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=rank_environment(world_size) | dict(environment or {}), stdout=output, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def run_ranks(
    world_size: int,
    *program: str | Path,
    timeout_seconds: float = 600,
    expected_code: int = 0,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run `program` once a rank and return the output; AssertionError with it when it ends otherwise."""
    process = start_ranks(world_size, *program, environment=environment)
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"ranks did not end in {timeout_seconds} s:\n{output[-4000:]}") from None
    assert (process.returncode == 0) == (expected_code == 0), f"ended with {process.returncode}:\n{output[-6000:]}"
    return output


def kill_ranks(run_dir: Path, number: signal.Signals) -> None:
    """Send a signal to every rank that wrote its record into the run folder."""
    for record in sorted((run_dir / "ranks").glob("rank-*.json")):
        with contextlib.suppress(ProcessLookupError):
            os.kill(json.loads(record.read_text())["pid"], number)
