"""A real rank, `python -m engine`, that does what FAULT says at a place of the program; also `fulltune` with such ranks.

FAULT is words ``what:rank:step``: ``slow`` micro-batches (0.25 s), ``slow_save`` (2 s a file), ``stuck_start``; and at the
data of one rank's step: ``raise``, ``raise_once`` (not at the next start), ``segv``, ``gil`` (busy with the GIL held), ``pipe`` (reads what nobody
writes), ``lock`` (waits for itself), ``alone`` (a collective that the others are not in), ``eat`` (all memory).

    python tests/support/workers/misbehaving_rank.py fulltune train run.yaml    # the command line, with these ranks
"""

import ctypes
import os
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn


def misbehave(what: str) -> None:
    """Do it, on this rank."""
    if what == "raise":
        raise RuntimeError("the data loader broke on purpose")
    if what == "raise_once":
        raised = next(Path(word) for word in sys.argv if word.endswith(".yaml")).parent / "raised"
        if not raised.exists():
            raised.touch()
            raise RuntimeError("the data loader broke once")
    if what == "segv":
        ctypes.string_at(0)
    if what == "gil":
        ctypes.PyDLL(None).sleep(10_000)
    if what == "pipe":
        reader, _writer = os.pipe()
        os.read(reader, 1)
    if what == "lock":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    if what == "alone":
        import torch

        torch.distributed.barrier()
    if what == "eat":
        kept = []
        while True:
            kept.append(os.urandom(1 << 20) * 64)


def install(faults: str) -> None:
    """Put the faults into the engine's functions."""
    import engine.checkpoint.save
    from engine.tasks import TASKS

    write_own = engine.checkpoint.save._write_own
    parsed = [word.split(":") for word in faults.split()]
    words = {word[0] for word in parsed}

    def faulty_batch(batch: Any, *arguments: Any) -> Any:
        from engine.ranks import heartbeat

        if "slow" in words:
            time.sleep(0.25)
        for what, *where in parsed:
            if where == [os.environ["RANK"], str(heartbeat.current().step)]:
                misbehave(what)
        return batch(*arguments)

    def slow_write_own(*arguments: Any) -> Any:
        records = write_own(*arguments)
        time.sleep(2.0)
        return records

    TASKS.update({name: replace(task, batch=partial(faulty_batch, task.batch)) for name, task in TASKS.items()})
    if "slow_save" in words:
        engine.checkpoint.save._write_own = slow_write_own


def as_rank() -> None:
    """`python -m engine`, once its modules are there."""
    import engine.__main__ as rank

    train = rank._train

    def with_faults(*arguments: Any) -> None:
        if os.environ.get("FAULT") == "stuck_start":
            while True:
                time.sleep(1)
        install(os.environ.get("FAULT", ""))
        train(*arguments)

    rank._train = with_faults
    rank.main()


def as_command_line() -> NoReturn:
    """`fulltune ...`, but its ranks are those of this file."""
    import launcher.start.start
    from launcher.cli import main
    from launcher.job.job import local_command

    def with_our_ranks(*arguments: Any) -> tuple[str, ...]:
        return tuple("misbehaving_rank" if word == "engine" else word for word in local_command(*arguments))

    launcher.start.start.local_command = with_our_ranks
    sys.exit(main(sys.argv[2:]))


if __name__ == "__main__":
    as_command_line() if sys.argv[1:2] == ["fulltune"] else as_rank()
