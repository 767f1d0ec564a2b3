"""``fulltune doctor``: would a run start and last on these machines? Looks at all of them at once, changes nothing.

Facts come from `launcher.node_facts` on every node (`launcher.gather`); what they mean is said by
`launcher.judge_node`, `judge_job` and `judge_run`. No torch: it answers in seconds.
"""

import argparse
import json
import os
import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.ds_config import nvme_path, resolve_ds_config
from engine.errors import ConfigError
from launcher import slurm
from launcher.doctor_table import merged, print_table
from launcher.finding import Finding, is_bad
from launcher.gather import Answer, Target, ask, local_target, nonces, srun_target, ssh_target
from launcher.hosts import Node, filter_nodes, is_local, local_node, read_hostfile
from launcher.judge_job import judge_job
from launcher.judge_node import Needs, judge_node
from launcher.judge_run import (
    CURRENT_DIR,
    NVME,
    RUN_DIR,
    STORE_DIR,
    folders_of,
    judge_folders,
    judge_run,
)
from launcher.launch import DEFAULT_PORT, Job
from launcher.plan import host_memory
from launcher.run_config import Run, load_run
from launcher.train import plan_job


@dataclass(frozen=True)
class Place:
    """Where ranks would run, and how those nodes are reached: here, over ssh, or through `srun`."""

    nodes: tuple[Node, ...]
    uses_gpus: bool
    port: int | None
    address: str | None = None
    over_ssh: bool = False
    through_srun: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the nodes, in order of their ranks."""
        return tuple(node.name for node in self.nodes)


@dataclass
class Checkup:
    """All that was found: `facts` by node."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()
    place: Place | None = None
    run: Run | None = None


def doctor(arguments: argparse.Namespace) -> int:
    """Check, measure if asked to, and say it; 0, or 78 when something would break the run."""
    checkup = examine(arguments)
    measurements: list[Any] = []
    if arguments.measure and checkup.place is not None and not is_bad(checkup.findings):
        from launcher.measure import measure

        measured = measure(checkup.place, checkup.facts, checkup.run)
        checkup.findings += measured.findings
        measurements = measured.figures
    elif arguments.measure:
        checkup.findings.append(Finding("measurements", "skipped", "first mend what is wrong"))
    code = ConfigError.exit_code if is_bad(checkup.findings) else 0
    if arguments.json:
        values = {
            "exit_code": code,
            "findings": [asdict(finding) for finding in checkup.findings],
            "measurements": measurements,
            "nodes": checkup.facts,
        }
        print(json.dumps(values, indent=2))
    else:
        print_table(checkup.findings, checkup.nodes, sys.stdout)
        _print_verdict(checkup)
    return code


def _print_verdict(checkup: Checkup) -> None:
    rows = merged(checkup.findings, checkup.nodes)
    count = {kind: sum(1 for row in rows if row.verdict == kind) for kind in ("error", "warning")}
    if count["error"]:
        print(f"\n{_some(count['error'], 'error')} that would break the run, {_some(count['warning'], 'warning')}")
        return
    alike = not any(each.name in ("differences", "versions") and each.verdict != "ok" for each in checkup.findings)
    if len(checkup.nodes) > 1 and alike:
        print(f"\n{len(checkup.nodes)} nodes are alike; {_some(count['warning'], 'warning')}")
    else:
        print(f"\nnothing would break the run; {_some(count['warning'], 'warning')}")


def _some(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def examine(arguments: argparse.Namespace) -> Checkup:
    """All checks, none of which stops the others."""
    checkup = Checkup()
    run_file, folder = _split(arguments.run_file)
    if run_file is not None:
        try:
            checkup.run = load_run(run_file, arguments.overrides)
        except Exception as error:
            checkup.findings.append(_failure("run file", error, "correct it; nothing else of the run could be checked"))
    job = None
    try:
        checkup.place = find_place(arguments)
        if checkup.run is not None:
            job = _plan(checkup.run, arguments)
    except Exception as error:
        name = "job" if checkup.place is not None else "hosts" if arguments.hostfile else "ranks"
        checkup.findings.append(_failure(name, error, ""))
    place = checkup.place or Place((Node("localhost", (0,)),), False, None)
    if checkup.run is not None:
        checkup.findings += judge_run(checkup.run)
    if place.over_ssh and len(place.nodes) > 1:
        checkup.findings.append(_pdsh())
    ds_config = _ds_config(checkup, job)
    answers = _ask(place, checkup.run, folder, ds_config)
    checkup.nodes = place.names
    checkup.facts = {answer.node: answer.facts for answer in answers if answer.facts is not None}
    checkup.findings += judge_job(answers, place.names[0], place.port, place.over_ssh)
    for node in place.nodes:
        if (facts := checkup.facts.get(node.name)) is not None:
            checkup.findings += judge_node(facts, _needs(node, place, checkup.run, job, ds_config))
            checkup.findings += judge_folders(facts, checkup.run, len(place.nodes))
    return checkup


def _split(given: Path | None) -> tuple[Path | None, Path | None]:
    """The argument as a run file, or as a folder that all nodes must share."""
    return (None, given.absolute()) if given is not None and given.is_dir() else (given, None)


def _failure(name: str, error: Exception, to_do: str) -> Finding:
    if not isinstance(getattr(error, "exit_code", None), int):
        raise error  # a defect of ours, told as one
    return Finding(name, "error", " ".join(str(error).split()), to_do)


def find_place(arguments: argparse.Namespace) -> Place:
    """Where `fulltune train` with the same options would run. ConfigError, MissingInputError."""
    if slurm.is_inside(os.environ) and arguments.hostfile is None and arguments.ranks is None:
        allocation = slurm.read_allocation(os.environ)
        job = slurm.plan_slurm_job(
            allocation, Path("run"), Path("run.yaml"), [], arguments.ranks_per_node, arguments.master_port
        )
        uses_gpus = job.environment.get("DS_ACCELERATOR") != "cpu"
        return Place(job.nodes, uses_gpus, job.master_port, allocation.address, through_srun=True)
    if arguments.hostfile is None:
        if arguments.include or arguments.exclude:
            raise ConfigError("--include and --exclude choose from a hostfile: give --hostfile HOSTS")
        node, uses_gpus = local_node(arguments.ranks)
        return Place((node,), uses_gpus, arguments.master_port)  # by default a free port is taken
    nodes = tuple(filter_nodes(read_hostfile(arguments.hostfile), arguments.include, arguments.exclude))
    uses_gpus = local_node(None)[1]
    is_here = len(nodes) == 1 and is_local(nodes[0].name)
    port = arguments.master_port or (None if is_here else DEFAULT_PORT)
    return Place(nodes, uses_gpus, port, over_ssh=not is_here)


def _plan(run: Run, arguments: argparse.Namespace) -> Job:
    """What `fulltune train` would start: raises what it would raise."""
    return plan_job(
        run, ranks=arguments.ranks, ranks_per_node=arguments.ranks_per_node, hostfile=arguments.hostfile,
        include=arguments.include, exclude=arguments.exclude, master_port=arguments.master_port,
    )  # fmt: skip


def _ds_config(checkup: Checkup, job: Job | None) -> dict[str, Any] | None:
    if checkup.run is None or job is None:
        return None
    return resolve_ds_config(checkup.run.config, job.num_ranks)


def _pdsh() -> Finding:
    if shutil.which("pdsh") is None:
        return Finding("pdsh", "error", "not here, and DeepSpeed starts hosts through it", "apt-get install pdsh")
    return Finding("pdsh", "ok", "here")


def _needs(node: Node, place: Place, run: Run | None, job: Job | None, ds_config: Mapping[str, Any] | None) -> Needs:
    world_size = sum(len(each.slots) for each in place.nodes)
    memory = None
    if run is not None and job is not None and ds_config is not None:
        memory = host_memory(run.config, job, dict(ds_config))
    return Needs(
        len(node.slots), world_size, place.uses_gpus, node.slots,
        None if memory is None else memory.bytes, "" if memory is None else memory.sum_text,
        ds_config is not None and nvme_path(dict(ds_config)) is not None,
    )  # fmt: skip


def _ask(place: Place, run: Run | None, folder: Path | None, ds_config: Mapping[str, Any] | None) -> list[Answer]:
    """Have all nodes look, with files in the shared folders for them to find."""
    folders = {} if run is None else folders_of(run, ds_config)
    shared = {name: _nearest(folders[name]) for name in (RUN_DIR, STORE_DIR) if name in folders}
    if folder is not None:
        folders, shared = {"folder": folder}, {"folder": folder}
    if place.over_ssh:
        folders[CURRENT_DIR] = Path.cwd()
    with nonces(shared if len(place.nodes) > 1 else {}) as made:
        request = {
            "folders": {name: str(path) for name, path in folders.items()},
            "nonces": made,
            "uses_nvme": NVME in folders,
            "nvme": str(folders[NVME]) if NVME in folders else None,
            "first": place.names[0],
            "port": place.port,
            "token": secrets.token_hex(8),
            "ssh_back": place.names[0] if place.over_ssh and len(place.nodes) > 1 else None,
        }
        return ask(_targets(place, request), place.names[0], place.port, place.address)


def _targets(place: Place, request: Mapping[str, Any]) -> Sequence[Target]:
    if place.through_srun:
        return [srun_target(place.names, request)]
    if place.over_ssh:
        return [ssh_target(name, request) for name in place.names]
    return [local_target(place.names[0], request)]


def _nearest(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "run_file", type=Path, nargs="?", metavar="RUN.yaml",
        help="also whether this run would work; or a folder, which all nodes must share",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="as for train")
    parser.add_argument(
        "--hostfile", type=Path, metavar="HOSTS", help="machines reached over ssh: lines `host slots=N`"
    )
    parser.add_argument("--include", metavar="SPEC", help="with --hostfile: only host1@host2:0,2")
    parser.add_argument("--exclude", metavar="SPEC", help="with --hostfile: not host1@host2:0,2")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks on this machine, as for train")
    parser.add_argument("--ranks-per-node", type=int, metavar="R", help="inside a Slurm job, as for train")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="port where ranks meet, as for train")
    parser.add_argument(
        "--measure", action="store_true",
        help="then measure, for about a minute: arithmetic, memory, CPU Adam, copies, collectives, storage",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print everything found as JSON")
