"""``fulltune stop``: a run saves a checkpoint and ends, for good."""

import argparse
import contextlib
import os
import signal
from pathlib import Path

from engine.errors import MissingInputError
from launcher.job.runs import ask_slurm, find_runs, forbid_requeue, is_alive, read_record, slurm_facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")


def run(arguments: argparse.Namespace) -> int:
    """Stop the run."""
    return stop_run(arguments.run_dir)


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
