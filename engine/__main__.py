"""One rank of a training job: ``deepspeed --module engine RUN.yaml [key=value ...]``.

The launcher starts this once a rank. What it did is written into ``run_dir/ranks`` (see
`engine.ranks.rank_record`), because a launcher's exit code does not always tell the truth.
"""

import argparse
import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from engine.config import RunConfig
from engine.errors import (
    COMPLETE,
    INTERNAL,
    LOST_PEER,
    OTHER_RANK_FAILED,
    STOPPED_WITH_CHECKPOINT,
    FulltuneError,
    StoppedError,
)
from engine.file_modes import set_umask
from engine.ranks import heartbeat
from engine.ranks.liveness import Watch, end_with_parent, remove_shared_memory
from engine.ranks.placement import describe, place_rank
from engine.ranks.rank_record import RankRecord
from engine.ranks.stop import StopSignal
from engine.run_file import RunFile, load_run_file, with_absolute_paths


def main() -> None:
    """Run this rank to its end; leaves the process with the designed exit code."""
    stop = StopSignal()  # first of all: until here a signal kills
    if "RANK" in os.environ:  # a launcher is the parent, not the shell of somebody who logs out
        end_with_parent(stop.ask)
    set_umask()
    heartbeat.enter("run file")
    arguments = _arguments()
    rank = int(os.environ.get("RANK", "0"))
    record = RankRecord(rank)
    try:
        given = load_run_file(arguments.run_file, arguments.overrides)
        run_file = RunFile(given.path, with_absolute_paths(given.values), given.places, given.faults)
        config = run_file.parse(RunConfig)
        set_umask(config.share_with_group)
        record.begin(config.run_dir)
        stop.limit_time(os.environ)
        _watch(config.run_dir, rank, stop, record)
        _train(run_file, config, arguments.fresh, stop, record)
        code, message, trace = COMPLETE, "", ""
    except Exception as error:
        code, message, trace = _explain(error, rank, record, arguments.debug)
    if code in (COMPLETE, STOPPED_WITH_CHECKPOINT) and rank == 0:
        with contextlib.suppress(OSError):
            (config.run_dir / "STOP").unlink(missing_ok=True)  # it has done its work; HOLD stays
    record.end(code, message, trace, stop.reason)
    if "torch" not in sys.modules:
        sys.exit(code)
    from engine.ranks.distributed import leave

    leave(code)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="engine", description=__doc__)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--fresh", action="store_true", help="start over; earlier results are put aside")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    return parser.parse_intermixed_args()


def _watch(run_dir: Path, rank: int, stop: StopSignal, record: RankRecord) -> None:
    def leave(message: str) -> NoReturn:
        record.end(LOST_PEER, message, asked_by=stop.reason)
        remove_shared_memory()
        os._exit(LOST_PEER)

    Watch(run_dir, rank, stop, record.stacks, leave)


def _train(run_file: RunFile, config: RunConfig, fresh: bool, stop: StopSignal, record: RankRecord) -> None:
    heartbeat.enter("import")
    placement = place_rank(os.environ)  # before torch starts its threads
    import torch

    from engine.zero.ds_config import needs_async_io
    from engine.zero.prebuild import extensions_dir, load_ops_once

    uses_gpus = os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
    load_ops_once(uses_gpus, needs_async_io(config))
    placed = describe(placement, os.environ, extensions_dir())
    if os.environ.get("RANK", "0") == "0":
        print(placed, flush=True)
    else:
        record.log(placed)
    from engine.ranks.distributed import start_ranks
    from engine.setup import quiet_libraries, set_up
    from engine.train import train

    quiet_libraries()
    heartbeat.enter("rendezvous")
    ranks = start_ranks(str(config.run_dir))
    heartbeat.enter("set-up")
    training, progress, log = set_up(run_file, config, ranks, fresh)
    heartbeat.enter("step", progress.step)
    try:
        train(training, progress, log, stop)
        heartbeat.enter("end")
        log.ended()
    except StoppedError:
        heartbeat.enter("end")
        log.ended()
        raise
    finally:
        log.close()
        training.zero.remove_swap_files()
    import torch.distributed as dist

    dist.barrier()


def _explain(error: Exception, rank: int, record: RankRecord, debug: bool) -> tuple[int, str, str]:
    """Print the error for a person, unless a supervisor will, once in the job: (exit code, message, traceback)."""
    code = int(getattr(error, "exit_code", INTERNAL))
    expected = isinstance(error, FulltuneError) or hasattr(error, "exit_code")
    message = str(error) if expected else f"{type(error).__name__}: {error}"
    trace = "" if expected and not debug else traceback.format_exc()
    told = f"rank {rank}, in phase {heartbeat.current().phase}:\n{trace}" if trace else ""
    if record.is_read:
        record.log(told + message)
    else:
        if told:
            print(told, file=sys.stderr, flush=True)
        if message != OTHER_RANK_FAILED and (rank == 0 or not record.told_by_rank_zero(message)):
            who = "" if rank == 0 else f"rank {rank}: "
            print(f"fulltune: error: {who}{message}", file=sys.stderr, flush=True)
    return code, message, trace


if __name__ == "__main__":
    main()
