"""One rank of a training job: ``deepspeed --module engine RUN.yaml [key=value ...]``.

The launcher starts this once a rank. What it did is written to ``run_dir/ranks/exit-RRRRR.json``,
because a launcher's exit code does not always tell the truth.
"""

import argparse
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from engine.config import RunConfig
from engine.errors import COMPLETE, INTERNAL, OTHER_RANK_FAILED, SUPERVISED, FulltuneError
from engine.run_file import RunFile, load_run_file, with_absolute_paths


def main() -> None:
    """Run this rank to its end; leaves the process with the designed exit code."""
    arguments = _arguments()
    rank = int(os.environ.get("RANK", "0"))
    record = _RankRecord(rank)
    try:
        given = load_run_file(arguments.run_file, arguments.overrides)
        run_file = RunFile(given.path, with_absolute_paths(given.values), given.lines)
        config = run_file.parse(RunConfig)
        record.begin(config.run_dir)
        _train(run_file, config, arguments.fresh, record)
        code, message = COMPLETE, ""
    except Exception as error:
        code, message = _explain(error, rank, record, arguments.debug)
    record.end(code, message)
    if "torch" not in sys.modules:
        sys.exit(code)
    from engine.distributed import leave

    leave(code)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="engine", description=__doc__)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--fresh", action="store_true", help="start over; earlier results are put aside")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    return parser.parse_intermixed_args()


def _train(run_file: RunFile, config: RunConfig, fresh: bool, record: "_RankRecord") -> None:
    record.phase = "import"
    import torch

    from engine.ds_config import needs_async_io
    from engine.prebuild import load_ops_once

    uses_gpus = os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
    load_ops_once(uses_gpus, needs_async_io(config))
    from engine.distributed import StopSignal, start_ranks
    from engine.nvme_state import remove_swap_files
    from engine.setup import quiet_libraries, set_up
    from engine.train import train

    stop = StopSignal()
    quiet_libraries()
    record.phase = "rendezvous"
    ranks = start_ranks()
    record.phase = "set-up"
    training, progress, log = set_up(run_file, config, ranks, fresh)
    record.phase = "training"
    try:
        train(training, progress, log, stop)
    finally:
        log.close()
        remove_swap_files(training.engine.optimizer)
    record.phase = "end"
    import torch.distributed as dist

    dist.barrier()


class _RankRecord:
    """Files that tell a supervisor who runs here and how it ended."""

    def __init__(self, rank: int):
        self.phase = "run file"
        self._rank = rank
        self._folder: Path | None = None

    def begin(self, run_dir: Path) -> None:
        """Say that this rank runs. An unwritable folder is reported later, by its owner check."""
        import json
        import socket

        folder = run_dir / "ranks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"exit-{self._rank:05d}.json").unlink(missing_ok=True)
            (folder / f"rank-{self._rank:05d}.json").write_text(
                json.dumps({"rank": self._rank, "pid": os.getpid(), "host": socket.gethostname()}) + "\n"
            )
        except OSError:
            return
        self._folder = folder

    def end(self, code: int, message: str) -> None:
        """Say how it ended."""
        if self._folder is None:
            return
        try:
            self._write({"rank": self._rank, "code": code, "phase": self.phase, "message": message})
        except OSError as error:  # a full disk must not change the exit code
            print(f"rank {self._rank}: cannot record how it ended: {error}", file=sys.stderr, flush=True)

    @property
    def is_read(self) -> bool:
        """Whether somebody waits for this record and will tell its message."""
        return self._folder is not None and bool(os.environ.get(SUPERVISED))

    def told_by_rank_zero(self, message: str) -> bool:
        """Whether rank 0 ended with the same message, so that nobody needs to read it twice."""
        import json

        for _ in range(20):
            try:
                assert self._folder is not None
                return bool(json.loads((self._folder / "exit-00000.json").read_text())["message"] == message)
            except (OSError, ValueError, AssertionError):
                time.sleep(0.05)
        return False

    def _write(self, values: dict[str, Any]) -> None:
        from engine.distributed import write_json

        assert self._folder is not None
        write_json(self._folder / f"exit-{self._rank:05d}.json", values)


def _explain(error: Exception, rank: int, record: _RankRecord, debug: bool) -> tuple[int, str]:
    """Print the error for a person, unless a supervisor will, once in the job; returns (exit code, message)."""
    code = int(getattr(error, "exit_code", INTERNAL))
    expected = isinstance(error, FulltuneError) or hasattr(error, "exit_code")
    message = str(error) if expected else f"{type(error).__name__}: {error}"
    silent = record.is_read or message == OTHER_RANK_FAILED
    if debug or not expected:
        print(f"rank {rank}, while {record.phase}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    if not silent and (rank == 0 or not record.told_by_rank_zero(message)):
        who = "" if rank == 0 else f"rank {rank}: "
        print(f"fulltune: error: {who}{message}", file=sys.stderr, flush=True)
    return code, message


if __name__ == "__main__":
    main()
