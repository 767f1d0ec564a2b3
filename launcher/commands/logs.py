"""``fulltune logs``: what a run, or one of its ranks, has printed."""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from engine.errors import FulltuneError, MissingInputError
from launcher.job.runs import JobRecord, find_runs, is_alive, read_outcome, read_record

_POLL_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and which of its logs."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
    parser.add_argument("--rank", type=int, metavar="N", help="of one rank (default: of the job, or of rank 0)")


def run(arguments: argparse.Namespace) -> int:
    """Print the log."""
    return show_logs(arguments.run_dir, arguments.follow, arguments.rank)


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
