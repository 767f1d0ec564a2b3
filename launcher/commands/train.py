"""``fulltune train``: prepare what is missing, then train; or print the plan."""

import argparse
import sys
from pathlib import Path

from engine.errors import FulltuneError, NumericalStopError
from engine.file_modes import set_umask
from engine.finding import Finding, exit_code, failures, not_there_yet, refuse
from launcher.commands.arguments import add_run_file, add_sweep, checked_run, positive_number
from launcher.doctor.check_here import check_here
from launcher.job import runs
from launcher.job.job import Job
from launcher.job.run_config import Run
from launcher.start.dry_run import describe_plan
from launcher.start.preflight import check_run
from launcher.start.start import plan_job, start
from launcher.start.sweep import HELD_OUT, found_of_all, is_done, load_sweep, table_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run file, where the ranks run, and what happens after a failure."""
    add_run_file(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would happen; write and start nothing")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="ranks on this machine (default: every GPU, or 2 on CPU)"
    )
    parser.add_argument(
        "--ranks-per-node", type=positive_number, metavar="R",
        help="inside a Slurm job: ranks of each node (default: every GPU)",
    )  # fmt: skip
    parser.add_argument("--hostfile", type=Path, metavar="HOSTS", help="several machines: lines `host slots=N`")
    parser.add_argument("--include", metavar="SPEC", help="with --hostfile: use only host1@host2:0,2")
    parser.add_argument("--exclude", metavar="SPEC", help="with --hostfile: leave out host1@host2:0,2")
    parser.add_argument("--master-port", type=_port, metavar="PORT", help="port where ranks meet (default: a free one)")
    parser.add_argument(
        "--restarts", type=_number, default=0, metavar="N",
        help="after a crash or a hang, go on from the newest checkpoint by itself, at most N times",
    )  # fmt: skip
    parser.add_argument(
        "--hang-seconds", type=_seconds, default=15.0, metavar="S",
        help="least time without a sign of life in a step that counts as a hang (default 15; 0: never)",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="start over even if the run folder holds a checkpoint")
    add_sweep(parser)


def run(arguments: argparse.Namespace) -> int:
    """Plan; then print the plan, or prepare and train."""
    if arguments.sweep:
        return _sweep(arguments)
    run = checked_run(arguments)
    try:
        job = _plan(run, arguments)
    except FulltuneError as error:
        others = [*check_here(run, None), *check_run(run)]
        if arguments.dry_run:
            _print(others)
            raise
        refuse([*failures("job", error), *others])
        raise
    if arguments.dry_run:
        print(describe_plan(run, job) + "\n")
        return _print([*check_here(run, job), *check_run(run)])
    code, message = start(run, job, arguments.restarts, arguments.master_port, check_here(run, job))
    if message:
        print(f"fulltune: {message}", file=sys.stderr)
    return code


def _sweep(arguments: argparse.Namespace) -> int:
    """Check all runs of a sweep, then train one after another those that are not done; print how they compare."""
    sweep = load_sweep(arguments.run_file, arguments.overrides, arguments.sweep)
    set_umask(sweep.combinations[0].run.share_with_group)
    if HELD_OUT in sweep.overrides:
        print(f"no validation records: a tenth of train is held out to choose by ({HELD_OUT})", flush=True)
    findings = found_of_all(sweep, lambda run: [*_check_job(run, arguments), *check_run(run)])
    if arguments.dry_run:
        first = sweep.combinations[0].run
        print(describe_plan(first, _plan(first, arguments)) + "\n")
        print("the same for each of:\n" + "\n".join(f"  {one.run.config.run_dir}" for one in sweep.combinations) + "\n")
        return _print(findings)
    refuse(findings)
    code, done = 0, 0
    for number, one in enumerate(sweep.combinations, 1):
        if is_done(one.run) and not arguments.fresh:
            done += runs.is_complete(one.run)
            continue
        print(f"sweep: run {number} of {len(sweep.combinations)}: {one.name}", flush=True)
        code, message = start(one.run, _plan(one.run, arguments), arguments.restarts, arguments.master_port)
        if message:
            print(f"fulltune: {message}", file=sys.stderr)
        if code == 0:
            runs.record_complete(one.run)
            done += 1
        elif code != NumericalStopError.exit_code:  # a learning rate that is too high says nothing about the others
            break
    print("\n" + table_of(sweep), flush=True)
    return 0 if code == NumericalStopError.exit_code and done else code


def _check_job(run: Run, arguments: argparse.Namespace) -> list[Finding]:
    """The findings about this machine for the start of a run, or why it cannot be planned."""
    try:
        return check_here(run, _plan(run, arguments))
    except FulltuneError as error:
        return [*failures("job", error), *check_here(run, None)]


def _plan(run: Run, arguments: argparse.Namespace) -> Job:
    return plan_job(
        run,
        ranks=arguments.ranks,
        ranks_per_node=arguments.ranks_per_node,
        hostfile=arguments.hostfile,
        include=arguments.include,
        exclude=arguments.exclude,
        master_port=arguments.master_port,
        engine_flags=[f"--{flag}" for flag in ("fresh", "debug") if getattr(arguments, flag)],
        hang_seconds=arguments.hang_seconds,
    )


def _print(findings: list[Finding]) -> int:
    """Print what was found for a dry run; the exit code is the one that the run would end with.

    Inputs may come to be between a dry run and the run, so those that are missing are warnings.
    """
    findings = [not_there_yet(finding) for finding in findings]
    for finding in findings:
        if finding.verdict != "ok":
            print(f"{finding.verdict}: {finding.name}: {finding.text}")
    return exit_code(findings)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"write a number, not {text}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"write a port from 1 to 65535, not {text}")
    return int(text)


def _seconds(text: str) -> float:
    if not text.replace(".", "", 1).isdecimal():
        raise argparse.ArgumentTypeError(f"write a number of seconds, not {text}")
    return float(text)
