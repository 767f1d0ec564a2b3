"""Runs one job to its end: starts and watches `deepspeed`, hands signals on, returns the ranks' own exit code."""

import os
import subprocess
from pathlib import Path

from launcher.job.environment import remove_shared_memory
from launcher.job.job import Job, refuse_unsafe
from launcher.job.records import clear_records
from launcher.ssh.ranks import SSH_OPTIONS, SshRanks
from launcher.supervision.explain import explain_end
from launcher.supervision.guard import Guard
from launcher.supervision.supervisor import Liveness, Stop, Supervision, liveness


def _export_to_hosts(job: Job, alive: Liveness) -> dict[str, str]:
    """Add the supervisor's variables to the file that DeepSpeed exports to the hosts. Returns variables for ssh."""
    refuse_unsafe(list(alive.environment.values()))
    with Path(job.environment["DS_ENV_FILE"]).open("a", encoding="utf-8") as file:
        file.write("".join(f"{key}={value}\n" for key, value in alive.environment.items()))
    options = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}"
    return {"PDSH_SSH_ARGS_APPEND": options.strip()}


def run_job(job: Job, stop: Stop | None = None) -> tuple[int, str]:
    """Run `job` to its end; (exit code, one line that explains it unless it is 0).

    On INT, TERM, HUP and USR1 the ranks save a checkpoint and end; a second INT kills them. (`deepspeed` itself
    passes none of these on.) A dead or hanging rank ends the job. No process of the job is left at the end. If
    this process is killed, the ranks notice it, and a guard ends those that cannot.
    A caller that handles signals itself gives its `stop`.
    """
    if stop is None:
        with (stop := Stop()).handling():
            return run_job(job, stop)
    clear_records(job.run_dir)
    with liveness() as alive:
        environment = os.environ | job.environment | alive.environment
        ssh_ranks: SshRanks | None = None
        if job.starts_through_ssh:
            environment |= _export_to_hosts(job, alive)
            ssh_ranks = SshRanks(job.run_dir, alive.token, job.nodes)
        # A session of its own: a terminal's Ctrl-C then reaches us alone, and all of it can be found.
        process = subprocess.Popen(
            job.command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL if ssh_ranks else None
        )
        supervision = Supervision(
            process, job.run_dir, job.run_file, stop, alive.token, job.hang_seconds, job.num_ranks, ssh_ranks=ssh_ranks
        )
        guard: Guard | None = None
        try:
            mark = (job.run_dir, alive.token) if ssh_ranks else None
            guard = Guard(process.pid, (job.master_addr, job.master_port), alive.private_dir, environment, mark)
            supervision.stay()
        finally:
            supervision.end()
            remove_shared_memory(job.master_addr, job.master_port)
            if guard is not None:
                guard.dismiss()
    code, message = explain_end(job.run_dir, job.num_ranks, process.returncode, supervision, job.memory_rule)
    return (130, "interrupted twice: killed, no checkpoint saved") if stop.at_once and code else (code, message)
