"""Runs one job to its end: starts and watches `deepspeed`, hands signals on, returns the ranks' own exit code."""

import os
import subprocess
from pathlib import Path

from launcher.job.environment import remove_shared_memory
from launcher.job.job import Job, refuse_unsafe
from launcher.job.records import clear_records
from launcher.ssh.ranks import SSH_OPTIONS, FarRanks
from launcher.supervision.explain import conclude
from launcher.supervision.guard import Guard
from launcher.supervision.supervisor import Liveness, Stop, Supervision, liveness


def _tell_remote_ranks(job: Job, alive: Liveness) -> dict[str, str]:
    """Have DeepSpeed export to the hosts who supervises, by the file it was given for that; ssh's own variables."""
    refuse_unsafe(list(alive.environment.values()))
    with Path(job.environment["DS_ENV_FILE"]).open("a", encoding="utf-8") as file:
        file.write("".join(f"{key}={value}\n" for key, value in alive.environment.items()))
    options = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}"
    return {"PDSH_SSH_ARGS_APPEND": options.strip()}


def run_job(job: Job, stop: Stop | None = None) -> tuple[int, str]:
    """Run `job` to its end; (exit code, one line that explains it unless it is 0).

    INT, TERM, HUP and USR1 ask the ranks to save a checkpoint and end; a second INT kills them.
    `deepspeed` itself would pass none of them on. A dead or hanging rank ends the job. Nothing it
    started is left when this returns; were this process killed, the ranks would notice, and a guard
    would end what cannot. A caller that handles signals itself gives its `stop`.
    """
    if stop is None:
        with (stop := Stop()).handling():
            return run_job(job, stop)
    clear_records(job.run_dir)
    with liveness() as alive:
        environment = os.environ | job.environment | alive.environment
        far: FarRanks | None = None
        if job.starts_through_ssh:
            environment |= _tell_remote_ranks(job, alive)
            far = FarRanks(job.run_dir, alive.token, job.nodes)
        # A session of its own: a terminal's Ctrl-C then reaches us alone, and all of it can be found.
        process = subprocess.Popen(
            job.command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL if far else None
        )
        supervision = Supervision(
            process, job.run_dir, job.run_file, stop, alive.token, job.hang_seconds, job.num_ranks, far=far
        )
        guard: Guard | None = None
        try:
            mark = (job.run_dir, alive.token) if far else None
            guard = Guard(process.pid, (job.master_addr, job.master_port), alive.private_dir, environment, mark)
            supervision.stay()
        finally:
            supervision.end()
            remove_shared_memory(job.master_addr, job.master_port)
            if guard is not None:
                guard.dismiss()
    code, message = conclude(job.run_dir, job.num_ranks, process.returncode, supervision, job.memory_rule)
    return (130, "interrupted twice: killed, no checkpoint saved") if stop.at_once and code else (code, message)
