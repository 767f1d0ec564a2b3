"""``fulltune train --restarts N``: after a crash or a hang, on from the newest checkpoint, without a person."""

import dataclasses
import sys
from pathlib import Path

from engine.arithmetic import newest_checkpoint, step_of
from engine.errors import INTERNAL, LOST_PEER, StorageError
from launcher.batch.slurm_job import run_slurm_job
from launcher.job.job import Job
from launcher.supervision.run import run_job
from launcher.supervision.supervisor import Stop

#: What another start can mend. The same configuration, data, numbers or security refusal would only come again.
RESTARTED = (INTERNAL, StorageError.exit_code, LOST_PEER)


def run_with_restarts(job: Job, restarts: int) -> tuple[int, str]:
    """Run a job up to 1 + `restarts` times; the last start's exit code and the line that explains it.

    Ends early when a stop was asked for, and when a restart got no further: no newer checkpoint
    since the restart before.
    """
    run = run_slurm_job if job.starts_through_srun else run_job
    stop = Stop()
    reached: int | None = None
    with stop.handling():
        code, message = run(job, stop)
        for number in range(1, restarts + 1):
            if code not in RESTARTED or stop.requests:
                break
            newest = _newest_step(job.run_dir)
            if reached is not None and newest <= reached:
                return (
                    code,
                    f"{message}; not restarted again: no newer checkpoint than step {newest} since the last one",
                )
            reached = newest
            where = f"after step {newest}" if newest >= 0 else "from the beginning: there is no checkpoint yet"
            print(f"fulltune: {message}", file=sys.stderr)
            print(f"fulltune: restart {number} of {restarts}, {where}", file=sys.stderr, flush=True)
            # What was there before this run is out of the way since its first start.
            job = dataclasses.replace(job, command=tuple(word for word in job.command if word != "--fresh"))
            code, message = run(job, stop)
    return code, message


def _newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint in the run folder; -1 without one."""
    newest = newest_checkpoint(run_dir)
    return -1 if newest is None else step_of(newest.name)
