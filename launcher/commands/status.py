"""``fulltune status``, ``logs`` and ``stop``: runs that this machine or Slurm knows."""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.arithmetic import newest_checkpoint, step_of
from engine.errors import STOPPED_WITH_CHECKPOINT, FulltuneError, MissingInputError
from launcher.job.records import judge, read_starts
from launcher.job.runs import (
    COMPLETE,
    RECORD,
    JobRecord,
    ask_slurm,
    forbid_requeue,
    is_alive,
    read_outcome,
    read_record,
    slurm_facts,
)

_POLL_SECONDS = 1.0


def find_runs(named: list[Path]) -> list[Path]:
    """The run folders named, or those in and below the current folder that somebody has run."""
    if named:
        for path in named:
            if not path.is_dir():
                raise MissingInputError(f"{path}: no such run folder")
        return [path.absolute() for path in named]
    here = Path.cwd()
    return sorted(record.parent for depth in ("", "*/", "*/*/") for record in here.glob(f"{depth}{RECORD}"))


def show_status(named: list[Path]) -> int:
    """``fulltune status``: a line a run; returns the exit code."""
    folders = find_runs(named)
    if not folders:
        print("no run in this folder or in the two levels below it; name one: fulltune status RUN")
        return MissingInputError.exit_code
    lines = [("RUN", "STATE", "STEP", "LOSS", "CHECKPOINT", "WHERE")]
    for folder in folders:
        name = str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)
        state, where = _state(folder)
        step, loss = _last_step(folder)
        newest = newest_checkpoint(folder)
        lines.append(
            (
                name,
                state,
                step,
                loss,
                "-" if newest is None else str(step_of(newest.name)),
                where,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0


def _state(folder: Path) -> tuple[str, str]:
    """(state, where) of a run in words."""
    record = read_record(folder)
    if record is None:
        return "unknown", "-"
    if record.job_id is not None:
        where = f"Slurm job {record.job_id}"
        try:
            facts = slurm_facts(record.job_id)
        except FulltuneError as error:
            return "unknown", f"{where}: {error}"
        if facts.is_alive:
            more = [facts.nodes] if facts.nodes not in ("", "(null)") else []
            more += [facts.reason] if facts.state == "PENDING" else []
            more += [f"requeued {facts.restarts}x"] if facts.restarts not in ("", "0") else []
            return facts.state.lower(), ", ".join([where, *more])
        return _outcome(folder), where + (f" ({facts.state})" if facts.state else "")
    where = f"process {record.pid} on {record.host}"
    if record.host != socket.gethostname():
        return "unknown", where
    return ("running", where) if is_alive(record) else (_outcome(folder), record.host)


def _outcome(folder: Path) -> str:
    """How a run that has ended did, by what its start noted, else by its ranks' records."""
    words = {0: "complete", STOPPED_WITH_CHECKPOINT: "stopped", 130: "interrupted"}
    if (outcome := read_outcome(folder)) is not None:
        return words.get(outcome[0], f"failed ({outcome[0]})")
    ranks = len(read_starts(folder))
    if (folder / COMPLETE).exists():  # removed by the next start
        return "complete"
    if not ranks:
        return "never started"
    code, _ = judge(folder, ranks, 1)
    return words.get(code, f"failed ({code})")


def _last_step(folder: Path) -> tuple[str, str]:
    """(step, loss) of the last training line of metrics.jsonl."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return "-", "-"
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values: dict[str, Any] = json.loads(line)
            if values["kind"] == "train":
                return str(values["step"]), f"{values['loss']:.4f}"
    return "-", "-"


def show_logs(run_dir: Path, follow: bool, rank: int | None = None) -> int:
    """``fulltune logs``: what the job has printed, or one of its ranks; with `follow`, until it has ended.

    A local run prints where it was started: of that, rank 0's log is shown. Returns the exit code.
    """
    record = read_record(find_runs([run_dir])[0])
    if record is None:
        raise MissingInputError(f"{run_dir}: nobody has run it yet")
    path = run_dir / "ranks" / f"rank-{rank or 0:05d}.log"
    if rank is None and record.log is not None:
        path = Path(record.log)
    for text in _lines(path, record, follow):
        sys.stdout.write(text)
        sys.stdout.flush()
    outcome = read_outcome(run_dir)
    if rank is None and record.log is None and outcome is not None and outcome[1]:
        print(f"fulltune: {outcome[1]}", flush=True)  # a batch job's log has it already
    if not path.exists():
        print(f"fulltune: {path}: not there (yet)", file=sys.stderr)
    return 0


def _lines(path: Path, record: JobRecord, follow: bool) -> Iterator[str]:
    """The text of a log, and what is added to it while its job lives."""
    position = 0
    while True:
        try:
            alive = follow and is_alive(record)  # asked before reading, so that last words are not lost
        except FulltuneError:
            alive = True  # a controller that is restarted answers again later
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(position)
            while block := file.read(1 << 20):
                position += len(block)
                yield block.decode("utf-8", errors="replace")
        if not alive:
            return
        time.sleep(_POLL_SECONDS)


def stop_run(run_dir: Path) -> int:
    """``fulltune stop``: have a run save a checkpoint and end, for good; returns the exit code."""
    record = read_record(find_runs([run_dir])[0])
    if record is None or not is_alive(record):
        raise MissingInputError(f"{run_dir}: it does not run")
    if record.job_id is None:
        assert record.pid is not None
        os.kill(record.pid, signal.SIGTERM)
        print(f"process {record.pid} was asked to save a checkpoint and end")
        return 0
    job = str(record.job_id)
    if slurm_facts(record.job_id).state == "PENDING":
        first = record.prepare_job_id
        also = [str(first)] if first is not None and slurm_facts(first).is_alive else []
        ask_slurm("scancel", job, *also)
        print(f"Slurm job {job} had not started; cancelled" + (f", with the preparing job {first}" if also else ""))
        return 0
    # First it loses the right to come back, then it is asked to end: Slurm refuses to requeue it. The file is for a
    # job that has no ranks yet, whose store is being prepared.
    forbid_requeue(record.job_id)
    with contextlib.suppress(OSError):
        (run_dir / "STOP").touch()
    ask_slurm("scancel", "--signal=TERM", job)
    print(f"Slurm job {job} was asked to save a checkpoint and end; it does not come back")
    return 0
