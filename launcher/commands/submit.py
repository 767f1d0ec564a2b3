"""``fulltune submit``: the batch scripts of a run, or of the runs of a sweep, handed to `sbatch`."""

import argparse
import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

from engine.errors import CannotWriteError, ConfigError, FulltuneError
from engine.file_modes import FOLDER_MODE, refuse_foreign, set_umask, umask_for
from engine.finding import Finding, exit_code, failures, not_there_yet, refuse
from engine.run_file import dump_yaml
from engine.zero.ds_config import resolve_ds_config
from launcher.batch.batch_script import Request, check_request, common, preparation_script, training_script
from launcher.commands.arguments import add_run_file, add_sweep, checked_run
from launcher.doctor.check_here import check_here
from launcher.job import runs
from launcher.job.run_config import Run
from launcher.start.preflight import check_in_use, check_run
from launcher.start.sweep import found_of_all, is_done, load_sweep, table_of

_CPUS_OF_PREPARATION = 8
# Slurm signals up to a minute late, and the ranks end a micro-batch first.
_STOP_SECONDS = 180


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run file, and the options for Slurm."""
    add_run_file(parser)
    add = parser.add_argument
    add("--nodes", type=int, default=1, metavar="N", help="default: 1")
    add("--gpus-per-node", type=int, default=0, metavar="G", help="a rank each; 0 (default): CPU ranks")
    add("--ranks-per-node", type=int, metavar="R", help="default: G; needed on CPUs")
    add("--cpus-per-rank", type=int, metavar="C", help="default: the nodes whole (--exclusive)")
    add("--mem", default="0", metavar="SIZE", help="memory of each node, such as 64G; default: all of it")
    add("--time", metavar="TIME", help="limit, such as 24:00:00 or 2-12; a longer run comes back by itself")
    add("--stop-seconds", type=int, default=_STOP_SECONDS, metavar="S",
        help=f"save and requeue so long before the limit (default: {_STOP_SECONDS})")  # fmt: skip
    for option in ("partition", "account", "qos", "reservation", "constraint"):
        add(f"--{option}", metavar="NAME", help="as in sbatch")
    add("--name", metavar="NAME", help="of the job (default: the run folder's)")
    add("--site", type=Path, metavar="FILE", help="shell file read first on the nodes: modules, network variables")
    add("--restarts", type=int, default=0, metavar="N", help="after a crash or a hang, go on within the job, N times")
    add("--prepare", action="store_true", help="make the token store in a CPU job first; training waits for it")
    add("--prepare-partition", metavar="NAME", help="where (default: as --partition)")
    add("--prepare-cpus", type=int, default=_CPUS_OF_PREPARATION, metavar="C",
        help=f"default: {_CPUS_OF_PREPARATION}")  # fmt: skip
    add("--prepare-time", metavar="TIME", help="default: as --time")
    add("--dry-run", action="store_true", help="print the scripts; write and submit nothing")
    add_sweep(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the run's batch scripts and submit them, or print them."""
    if arguments.sweep:
        return _sweep(arguments)
    run = checked_run(arguments)
    return _submit(run, check_request(arguments, run.config.run_dir), arguments.dry_run)


def _sweep(arguments: argparse.Namespace) -> int:
    """Submit a job for each run of a sweep that is neither done nor on its way; print how they compare."""
    sweep = load_sweep(arguments.run_file, arguments.overrides, arguments.sweep, shares_store=True)
    set_umask(sweep.combinations[0].run.share_with_group)
    waiting = [one for one in sweep.combinations if not is_done(one.run) and not _is_alive(one.run.config.run_dir)]
    requests = [check_request(arguments, one.run.config.run_dir) for one in waiting]
    findings = found_of_all(
        dataclasses.replace(sweep, combinations=tuple(waiting)),
        lambda run: _findings(run, requests[0].nodes * requests[0].ranks_per_node),
    )
    if not arguments.dry_run:
        refuse(findings)
    codes = [_submit(one.run, request, arguments.dry_run) for one, request in zip(waiting, requests, strict=True)]
    if not arguments.dry_run:
        print(f"\n{table_of(sweep)}\nthe same command shows this table again, and submits what is not done")
    return max(codes, default=0)


def _is_alive(run_dir: Path) -> bool:
    record = runs.read_record(run_dir)
    return record is not None and not runs.has_ended_elsewhere(run_dir, record) and runs.is_alive(record)


def _submit(run: Run, request: Request, dry_run: bool) -> int:
    """Write the scripts of a run into its folder and submit them; returns the exit code."""
    findings = _findings(run, request.nodes * request.ranks_per_node)
    run_dir = run.config.run_dir
    scripts = [("prepare.sbatch", preparation_script(request, run_dir))] if request.prepare else []
    scripts.append(("train.sbatch", training_script(request, run_dir)))
    if dry_run:
        for name, text in scripts:
            print(f"# {run_dir / name}\n{text}")
        findings = [not_there_yet(finding) for finding in findings]
        _print(findings, "error", "warning", "skipped")
        return exit_code(findings)
    _refuse_running(run_dir)
    _print(findings, "warning")
    refuse(findings)
    refuse_foreign(run_dir, run.config.share_with_group)
    try:
        run_dir.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWriteError(f"run_dir {run_dir}: cannot be created: {error.strerror}") from error
    values = run.config.model_dump(mode="json") | {"data": run.data.model_dump(mode="json")}
    runs.write_private(
        run_dir / "submitted.yaml", f"# What `fulltune submit` was given, resolved.\n{dump_yaml(values)}"
    )
    for name, text in scripts:
        runs.write_private(run_dir / name, text)
    job_ids = _hand_over([run_dir / name for name, _ in scripts], request, umask_for(run.config.share_with_group))
    log = run_dir / f"slurm-{job_ids[-1]}.log"
    first = job_ids[0] if request.prepare else None
    record = runs.JobRecord(host=os.uname().nodename, job_id=job_ids[-1], prepare_job_id=first, log=str(log))
    runs.write_record(run_dir, record)
    if request.prepare:
        print(f"preparing: Slurm job {job_ids[0]}, log {run_dir / f'slurm-prepare-{job_ids[0]}.log'}")
    after = f", after job {job_ids[0]}" if request.prepare else ""
    print(f"training: Slurm job {job_ids[-1]}{after}, log {log}")
    print(f"look with: fulltune status {shlex.quote(str(run_dir))}; fulltune logs -f {shlex.quote(str(run_dir))}")
    return 0


def _findings(run: Run, num_ranks: int) -> list[Finding]:
    """All that would be found out only after the queue, as far as this machine can know it."""
    found = []
    try:
        run.config.check_trainable()
        resolve_ds_config(run.config, num_ranks)
    except FulltuneError as error:
        found += failures("job", error)
    return [*found, *check_here(run, None), *check_run(run), check_in_use(run.config.run_dir)]


def _print(findings: list[Finding], *verdicts: str) -> None:
    """A line on stderr for each finding of these verdicts."""
    for finding in findings:
        if finding.verdict in verdicts:
            print(f"fulltune: {finding.verdict}: {finding.name}: {finding.text}", file=sys.stderr)


def _refuse_running(run_dir: Path) -> None:
    record = runs.read_record(run_dir)
    if record is not None and _is_alive(run_dir):
        who = f"Slurm job {record.job_id}" if record.job_id is not None else f"process {record.pid}"
        raise CannotWriteError(f"run_dir {run_dir}: {who} has it; `fulltune stop {run_dir}`, or choose another")


def _hand_over(scripts: list[Path], request: Request, umask: int) -> list[int]:
    """`sbatch` each, the next after the one before; their ids. If one is refused, those before it are cancelled."""
    # An option given here wins over its variable, such as SBATCH_PARTITION; other variables may be a site's defaults.
    given = [name for name in common(request) if getattr(request, name) is not None]
    environment = {key: value for key, value in os.environ.items() if key not in {f"SBATCH_{n.upper()}" for n in given}}
    job_ids: list[int] = []
    for script in scripts:
        after = [f"--dependency=afterok:{job_ids[-1]}", "--kill-on-invalid-dep=yes"] if job_ids else []
        try:
            job_ids.append(_sbatch([*after, str(script)], environment, umask))
        except FulltuneError:
            for job_id in job_ids:
                runs.slurm_command("scancel", str(job_id), check=False)
            raise
    return job_ids


def _sbatch(words: list[str], environment: dict[str, str], umask: int) -> int:
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *words], env=environment, capture_output=True, text=True, timeout=120, check=False,
            stdin=subprocess.DEVNULL, umask=umask,  # the job inherits it, for its log
        )  # fmt: skip
    except FileNotFoundError:
        raise ConfigError("there is no `sbatch` here: submit on a Slurm cluster's login node") from None
    except subprocess.TimeoutExpired:
        raise FulltuneError(
            "`sbatch` did not answer within two minutes; look with squeue before trying again"
        ) from None
    if any(words in done.stderr for words in ("contact slurm controller", "resolve_ctls", "Could not establish")):
        raise ConfigError("no Slurm controller answers here: submit on a login node of the cluster")
    job_id = done.stdout.strip().partition(";")[0]
    if done.returncode or not job_id.isdecimal():
        raise FulltuneError(f"`sbatch` refused: {' '.join((done.stderr or done.stdout).split())}")
    return int(job_id)
