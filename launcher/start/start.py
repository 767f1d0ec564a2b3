"""``fulltune train``: store, compiled ops, resolved run file, then `deepspeed` under supervision."""

import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.arithmetic import newest_checkpoint, step_of
from engine.errors import INTERNAL, LOST_PEER, STOPPED_WITH_CHECKPOINT, ConfigError, FulltuneError, StorageError
from engine.finding import Finding, refuse
from engine.ranks.stop import check_not_held, is_held
from engine.zero.ds_config import needs_async_io, resolve_ds_config
from engine.zero.prebuild import extensions_dir, make_ops_dir, missing_ops
from launcher.batch import slurm_job
from launcher.job import runs
from launcher.job.environment import job_environment, remote_environment
from launcher.job.hostfile import read_hostfile
from launcher.job.hosts import filter_nodes, is_local, local_node
from launcher.job.job import DEFAULT_PORT, LEAST_SECONDS, Job, free_port, hostfile_command, local_command, owned_run_dir
from launcher.job.run_config import DataRun, Run, write_resolved
from launcher.ssh.check_hosts import check_hosts
from launcher.start.dry_run import memory_rule
from launcher.start.preflight import check_prepared, check_run
from launcher.supervision.run import run_job
from launcher.supervision.supervisor import Stop

#: Exit codes after which another start can succeed. Wrong configuration, data or numbers would only fail again.
RESTARTED = (INTERNAL, StorageError.exit_code, LOST_PEER)


def plan_job(
    run: Run,
    *,
    ranks: int | None = None,
    ranks_per_node: int | None = None,
    hostfile: Path | None = None,
    include: str | None = None,
    exclude: str | None = None,
    master_port: int | None = None,
    engine_flags: list[str] | None = None,
    hang_seconds: float = LEAST_SECONDS,
) -> Job:
    """Decide what runs where. Starts and writes nothing; ConfigError for what cannot work.

    Inside a Slurm allocation all of it is used, unless `ranks` or `hostfile` is given.
    """
    run.config.check_trainable()
    flags = engine_flags or []
    if slurm_job.is_inside(os.environ) and ranks is None and hostfile is None:
        job = _in_allocation(run, ranks_per_node, master_port, flags)
    elif ranks_per_node is not None:
        raise ConfigError("--ranks-per-node is for Slurm jobs: on one machine --ranks says how many")
    elif hostfile is None:
        if include or exclude:
            raise ConfigError("--include and --exclude choose from a hostfile: give --hostfile HOSTS")
        job = _on_this_machine(run, ranks, master_port, flags)
    else:
        if ranks is not None:
            raise ConfigError("--ranks is for this machine alone: with --hostfile, slots=N says how many")
        job = _through_hostfile(run, hostfile, include, exclude, master_port, flags)
    rule = memory_rule(run.config, job, resolve_ds_config(run.config, job.num_ranks))
    return dataclasses.replace(job, memory_rule=rule, hang_seconds=hang_seconds)


def _in_allocation(run: Run, ranks_per_node: int | None, master_port: int | None, flags: list[str]) -> Job:
    """The job on all nodes of the Slurm allocation that this process runs in."""
    allocation = slurm_job.read_allocation(os.environ)
    # A job that comes back goes on; it does not start over again.
    comes_back = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    kept = [flag for flag in flags if not (comes_back and flag == "--fresh")]
    return slurm_job.plan_slurm_job(
        allocation, run.config.run_dir, run.resolved_path, kept, ranks_per_node, master_port
    )


def _on_this_machine(run: Run, ranks: int | None, master_port: int | None, flags: list[str]) -> Job:
    node, uses_gpus = local_node(ranks)
    port = master_port or free_port()
    command = local_command(node, port, [str(run.resolved_path), *flags])
    environment = job_environment(len(node.slots), uses_gpus)
    return Job(run.config.run_dir, run.resolved_path, (node,), command, environment, port)


def _through_hostfile(
    run: Run, hostfile: Path, include: str | None, exclude: str | None, master_port: int | None, flags: list[str]
) -> Job:
    """The job on the chosen hosts of a hostfile, which may be this machine alone."""
    nodes = filter_nodes(read_hostfile(hostfile), include, exclude)
    # The other machines are taken to be like this one; each rank finds its own device anyway.
    _, uses_gpus = local_node(None)
    port = master_port or (free_port() if all(is_local(node.name) for node in nodes) else DEFAULT_PORT)
    selection = ["--include", include] if include else ["--exclude", exclude] if exclude else []
    engine_arguments = [str(run.resolved_path), *flags]
    command = hostfile_command(
        hostfile.absolute(), nodes, selection, port, engine_arguments, run_dir=run.config.run_dir
    )
    environment = job_environment(max(len(node.slots) for node in nodes), uses_gpus)
    return Job(run.config.run_dir, run.resolved_path, tuple(nodes), command, environment, port)


def array_part(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """The share of the input that this task of a Slurm job array takes, (i, n) from 1; None outside of one.

    Raises ConfigError for an array whose task numbers have no regular step.
    """
    count = int(environment.get("SLURM_ARRAY_TASK_COUNT") or 1)
    if count == 1:
        return None
    task, lowest, highest, step = (
        int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "STEP")
    )
    place, rest = divmod(task - lowest, max(step, 1))
    if rest or (highest - lowest) // max(step, 1) + 1 != count:
        raise ConfigError("the Slurm array must be a plain range such as --array=0-7, so that shares can be numbered")
    return place + 1, count


def prepare_store(run: DataRun, part: tuple[int, int] | None = None) -> None:
    """Make the token store of the run file, or a `part` of it, unless it is there already."""
    from data_prep.prepare import prepare

    prepare(run.data, run.values["data"], run.task, part=part)


def start(
    run: Run, job: Job, restarts: int = 0, master_port: int | None = None, here: Sequence[Finding] = ()
) -> tuple[int, str]:
    """Prepare what is missing, then run `job` to its end, again after crashes; (exit code, one line unless it is 0).

    `master_port`: where ranks of several hosts shall meet, if a person has chosen it. `here`: findings about
    this machine, to be printed together with those about the run; RefusedError if anything would break it.
    """
    check_not_held(run.config.run_dir)
    if job.starts_through_srun and "--fresh" not in job.command and runs.is_complete(run):
        print(f"{run.config.run_dir}: already complete, nothing to do", flush=True)
        return 0, ""
    with owned_run_dir(run.config.run_dir, run.config.share_with_group):
        runs.record_start(run.config.run_dir, job.starts_through_srun)
        try:
            code, message = _prepare_and_run(run, job, restarts, master_port, here)
        except FulltuneError as error:
            runs.record_outcome(run.config.run_dir, error.exit_code, str(error))
            raise
        runs.record_outcome(run.config.run_dir, code, message)
    if code == 0:
        print(f"{run.config.run_dir}: complete", flush=True)
    return code, message


def _prepare_and_run(
    run: Run, job: Job, restarts: int, master_port: int | None, here: Sequence[Finding]
) -> tuple[int, str]:
    if job.starts_through_ssh:
        job = _on_hosts(job, master_port)
    uses_nvme = needs_async_io(run.config)
    ops_are_missing = not job.starts_through_srun and _ops_are_missing(job, uses_nvme)
    before = [*here, *check_run(run, may_download=True)]
    _tell(before)
    prepare_store(run)
    _tell([finding for finding in check_prepared(run) if finding not in before])
    write_resolved(run)
    if job.starts_through_srun:
        _print_command(job)
        code, message = run_with_restarts(job, restarts)
        if code == 0:
            runs.record_complete(run)
        elif code == STOPPED_WITH_CHECKPOINT and is_held(run.config.run_dir):
            # Brought back it could only refuse to start.
            runs.forbid_requeue(int(os.environ["SLURM_JOB_ID"]))
            message += f"; on hold: remove {run.config.run_dir / 'HOLD'} and submit it again"
        return code, message
    if ops_are_missing:
        _prebuild(job.environment, uses_nvme)
    if job.starts_through_ssh:
        ours = job.environment | remote_environment(job.run_dir, job.environment)
        job = dataclasses.replace(job, environment=ours)
    _print_command(job)
    try:
        return run_with_restarts(job, restarts)
    finally:
        (job.run_dir / "deepspeed_env").unlink(missing_ok=True)


def _tell(findings: Sequence[Finding]) -> None:
    """Print a line for each warning. RefusedError with all errors, if there is one."""
    for finding in findings:
        if finding.verdict == "warning":
            print(f"warning: {finding.name}: {finding.text}", flush=True)
    refuse(findings)


def _on_hosts(job: Job, master_port: int | None) -> Job:
    """The job after a check of its hosts: with the address of the first one, and a port that is free there."""
    address, port = check_hosts(job.nodes, job.run_dir, job.environment)
    words = {"--master_addr": address, "--master_port": str(master_port or port)}
    command = [words.get(before, word) for before, word in zip(("", *job.command), job.command, strict=False)]
    return dataclasses.replace(job, command=tuple(command), master_port=master_port or port)


def _print_command(job: Job) -> None:
    print(f"starting: {shlex.join(job.command)}", flush=True)


def _ops_are_missing(job: Job, uses_nvme: bool) -> bool:
    """True if an op has to be compiled on this machine. CannotWriteError if there is no place for it."""
    folder = Path(job.environment.get("TORCH_EXTENSIONS_DIR") or extensions_dir())
    if not missing_ops(folder, job.environment.get("DS_ACCELERATOR") != "cpu", uses_nvme):
        return False
    make_ops_dir(folder)
    return True


def _prebuild(environment: dict[str, str], uses_nvme: bool) -> None:
    """Compile DeepSpeed's ops in a process of its own."""
    command = [sys.executable, "-m", "engine.zero.prebuild", *(["--nvme"] if uses_nvme else [])]
    result = subprocess.run(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        kind = ConfigError if result.returncode == ConfigError.exit_code else FulltuneError
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no reason given"]
        ours = [line for line in lines if line.startswith("fulltune: error: ")]
        said = ours[-1].removeprefix("fulltune: error: ") if ours else f"compiling DeepSpeed's ops failed: {lines[-1]}"
        raise kind(said)


def run_with_restarts(job: Job, restarts: int) -> tuple[int, str]:
    """Run a job up to 1 + `restarts` times; the last start's exit code and the line that explains it.

    Ends early after a request to stop, and when a restart got no further: no newer checkpoint
    since the restart before.
    """
    run = slurm_job.run_slurm_job if job.starts_through_srun else run_job
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
