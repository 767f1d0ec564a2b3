"""``fulltune verify``: reads a run's checkpoints and compares them with what was written. It starts nothing."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from engine.arithmetic import list_checkpoints
from engine.errors import DataError, MissingInputError

_GB = 1000.0**3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")


def run(arguments: argparse.Namespace) -> int:
    """Read every byte of every checkpoint and print a verdict on each.

    The exit code is 0 when all are sound, else DataError's. MissingInputError when there is none.
    """
    from engine.checkpoint.format import best_checkpoint, known_run_id  # these bring torch along
    from engine.run_folder import RunFolder

    run_dir: Path = arguments.run_dir
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise MissingInputError(f"{run_dir}: there is no checkpoint in it")
    best, run_id = best_checkpoint(run_dir), RunFolder(run_dir, 0).recorded_run_id() or known_run_id(run_dir)
    damaged = 0
    for path in checkpoints:
        try:
            size_bytes = _verify(path, run_id)
        except DataError as error:
            damaged += 1
            print(f"{path.name}  REFUSED  {error}")
            continue
        print(f"{path.name}  sound  {size_bytes / _GB:.3f} GB{'  best' if path == best else ''}")
    if damaged:
        print(
            f"{damaged} of {len(checkpoints)} cannot be used; a resume takes the newest that is sound", file=sys.stderr
        )
    return DataError.exit_code if damaged else 0


def _verify(path: Path, run_id: str) -> int:
    from engine.checkpoint.reader import CheckpointReader
    from engine.tensor_files.reader import verify_blocks

    reader = CheckpointReader(path)
    reader.check_no_extra_files()
    if reader.manifest.run_id != run_id:
        raise DataError(f"{path}: belongs to another run ({reader.manifest.run_id}, this one is {run_id})")
    total = sum(record.size_bytes for record in reader.records.values())
    with tqdm(total=total, desc=path.name, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for file, record in reader.records.items():
            verify_blocks(file, record)
            bar.update(record.size_bytes)
    return total
