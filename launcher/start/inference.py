"""Starts the processes of an evaluation or of predictions with a model folder: one a GPU, or one on the CPU."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import IO

from data_prep.progress import Progress
from data_prep.token_store import TokenStore, open_rows
from engine.errors import FulltuneError
from engine.inference.plan import Plan, error_path
from launcher.job.environment import job_environment
from launcher.job.hosts import local_gpus


def run_plan(plan: Plan, folder: Path, label: str) -> Plan:
    """Do the work of `plan` in `folder` on every device of this machine; returns it as it was done.

    Standard output stays free for results: what is said about the work goes to standard error.

    The first process that fails ends the others, and its error is raised here.
    """
    gpus = local_gpus()
    num_rows = open_rows(TokenStore.open(Path(plan.store)), plan.row_tokens).num_rows
    plan = replace(plan, workers=max(1, min(len(gpus), num_rows)))
    plan.write(folder)
    bar = Progress(label, num_rows, True, "rows")
    with redirect_stdout(sys.stderr), _processes(folder, plan.workers, gpus) as processes, bar:
        readers = [threading.Thread(target=_count, args=(process.stdout, bar)) for process in processes]
        for reader in readers:
            reader.start()
        failed = _wait(processes)
        for reader in readers:
            reader.join()
        if failed is not None:
            raise _error(error_path(folder, failed), processes[failed].returncode)
    return plan


@contextmanager
def _processes(folder: Path, number: int, gpus: tuple[int, ...]) -> "Iterator[list[subprocess.Popen[str]]]":
    """The processes, each with its device; none is left behind."""
    common = os.environ | job_environment(number, bool(gpus))
    processes: list[subprocess.Popen[str]] = []
    try:
        for worker in range(number):
            own = {"RANK": str(worker)} | ({"CUDA_VISIBLE_DEVICES": str(gpus[worker])} if gpus else {})
            command = [sys.executable, "-m", "engine.inference.worker", str(folder), str(worker)]
            processes.append(subprocess.Popen(command, env=common | own, stdout=subprocess.PIPE, text=True))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _count(lines: IO[str] | None, bar: Progress) -> None:
    """Count the rows that a process says it has done."""
    assert lines is not None
    for line in lines:
        with _LOCK:
            bar.advance(int(line))


_LOCK = threading.Lock()


def _wait(processes: "list[subprocess.Popen[str]]") -> int | None:
    """Wait for all; the number of the first that failed, after which the others are ended, or None."""
    running = dict(enumerate(processes))
    while running:
        for number, process in list(running.items()):
            try:
                code = process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            if code:
                for other in running.values():
                    other.kill()
                return number
            del running[number]
    return None


def _error(path: Path, code: int) -> FulltuneError:
    """The error that a process left, with its exit code; one of our words for a process that left none."""
    try:
        left = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        how = f"was killed by signal {-code}, perhaps for lack of memory" if code < 0 else f"ended with code {code}"
        return FulltuneError(f"a process of the model {how}")
    error = FulltuneError(left["message"])
    error.exit_code = left["code"]
    return error
