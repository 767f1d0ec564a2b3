"""``fulltune status``: where the runs stand that this machine or Slurm knows, a line a run."""

import argparse
import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from engine.arithmetic import newest_checkpoint, step_of
from engine.errors import STOPPED_WITH_CHECKPOINT, FulltuneError, MissingInputError
from launcher.job.records import judge, read_starts
from launcher.job.runs import (
    COMPLETE,
    find_runs,
    is_alive,
    read_outcome,
    read_record,
    slurm_facts,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs to show."""
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run folders (default: those found here)")


def run(arguments: argparse.Namespace) -> int:
    """Print a table of the runs."""
    return show_status(arguments.runs)


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
