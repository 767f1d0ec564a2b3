"""``fulltune doctor``: would a run start and last on these machines? Looks at all of them at once, changes nothing.

`launcher.doctor.node_facts` runs on every node and collects facts (`launcher.doctor.gather` starts it); `judge_node`,
`judge_job` and `judge_run` turn facts into findings. Torch is not imported, so the answer takes seconds.
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

from engine.errors import ConfigError
from engine.zero.ds_config import resolve_ds_config
from launcher.doctor.gather import Answer, Target, ask, local_target, nonces, srun_target, ssh_target
from launcher.doctor.judge_job import judge_job
from launcher.doctor.judge_node import Needs, judge_node
from launcher.doctor.measure import measure
from launcher.doctor.table import merged, print_table
from launcher.job.finding import Finding, is_bad
from launcher.job.hosts import Node
from launcher.job.job import Job
from launcher.job.run_config import Run, load_run
from launcher.start.dry_run import host_memory
from launcher.start.place import Place, find_place
from launcher.start.preflight import CURRENT_DIR, NVME, RUN_DIR, SHARED, STORE_DIR, folders_of, judge_folders, judge_run
from launcher.start.start import plan_job


@dataclass
class Checkup:
    """All that was found. `facts` are those of the nodes that answered; `ds_config` is the resolved one of the run."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    place: Place | None = None
    run: Run | None = None
    job: Job | None = None
    ds_config: dict[str, Any] | None = None
    folders: dict[str, Path] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all nodes that were asked."""
        return self.place.names if self.place is not None else ("localhost",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, the machines as for `train`, and how to look."""
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
    parser.add_argument(
        "--wait-seconds",
        type=float,
        default=8.0,
        metavar="S",
        help="how long to wait for the nodes' answers (default 8)",
    )
    parser.add_argument("--json", action="store_true", help="print everything found as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Check, measure with --measure, print the findings. The exit code is 78 when something would break the run."""
    checkup = examine(arguments)
    measurements: list[Any] = []
    if arguments.measure and checkup.place is not None and not is_bad(checkup.findings):
        measured = measure(checkup.place, checkup.facts, *_to_write_in(checkup))
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
        print_table(checkup.findings, checkup.names, sys.stdout)
        _print_verdict(checkup)
    return code


def _to_write_in(checkup: Checkup) -> tuple[Path | None, Path | None]:
    """Folders that exist and where the run writes: for checkpoints, and for optimizer states on NVMe."""
    if checkup.run is None:
        return None, None
    return _nearest(checkup.run.config.run_dir), checkup.folders.get(NVME)


def _print_verdict(checkup: Checkup) -> None:
    rows = merged(checkup.findings, checkup.names)
    count = {kind: sum(1 for row in rows if row.verdict == kind) for kind in ("error", "warning")}
    if count["error"]:
        print(f"\n{_some(count['error'], 'error')} that would break the run, {_some(count['warning'], 'warning')}")
        return
    alike = not any(each.name in ("differences", "versions") and each.verdict != "ok" for each in checkup.findings)
    if len(checkup.names) > 1 and alike:
        print(f"\n{len(checkup.names)} nodes are alike; {_some(count['warning'], 'warning')}")
    else:
        print(f"\nnothing would break the run; {_some(count['warning'], 'warning')}")


def _some(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def examine(arguments: argparse.Namespace) -> Checkup:
    """All checks, none of which stops the others."""
    checkup = Checkup()
    given: Path | None = arguments.run_file
    is_folder = given is not None and given.is_dir()
    if given is not None and not is_folder:
        _load(checkup, given, arguments.overrides)
    _place(checkup, arguments)
    if checkup.run is not None:
        checkup.findings += judge_run(checkup.run)
        checkup.folders = folders_of(checkup.run, checkup.ds_config)
    if is_folder and given is not None:
        checkup.folders = {SHARED: given.absolute()}
    # Where ranks would run is not known: this machine can be looked at all the same.
    place = checkup.place or Place((Node("localhost", (0,)),), False, None)
    if place.over_ssh:
        checkup.findings.append(_pdsh())
    answers = _ask(place, checkup.folders, arguments.wait_seconds)
    checkup.facts = {answer.node: answer.facts for answer in answers if answer.facts is not None}
    checkup.findings += judge_job(answers, place.names[0], place.port, place.over_ssh)
    for node in place.nodes:
        if (facts := checkup.facts.get(node.name)) is not None:
            checkup.findings += judge_node(facts, _needs(node, place, checkup))
            checkup.findings += judge_folders(facts, checkup.run, len(place.nodes))
    return checkup


def _load(checkup: Checkup, path: Path, overrides: list[str]) -> None:
    try:
        checkup.run = load_run(path, overrides)
    except Exception as error:
        checkup.findings.append(_failure("run file", error, "correct it: nothing else of the run could be checked"))


def _place(checkup: Checkup, arguments: argparse.Namespace) -> None:
    """Where ranks would run and, with a run file, what `fulltune train` would start there."""
    try:
        checkup.place = find_place(arguments)
    except Exception as error:
        name = "hosts" if arguments.hostfile or arguments.include or arguments.exclude else "ranks"
        checkup.findings.append(_failure(name, error))
        return
    if checkup.run is None:
        return
    try:
        checkup.job = plan_job(
            checkup.run, ranks=arguments.ranks, ranks_per_node=arguments.ranks_per_node, hostfile=arguments.hostfile,
            include=arguments.include, exclude=arguments.exclude, master_port=arguments.master_port,
        )  # fmt: skip
        checkup.ds_config = resolve_ds_config(checkup.run.config, checkup.job.num_ranks)
    except Exception as error:
        checkup.findings.append(_failure("job", error))


def _failure(name: str, error: Exception, to_do: str = "") -> Finding:
    if not isinstance(getattr(error, "exit_code", None), int):
        raise error  # a defect of ours, told as one
    return Finding(name, "error", " ".join(str(error).split()), to_do)


def _pdsh() -> Finding:
    if shutil.which("pdsh") is None:
        return Finding("pdsh", "error", "not here, and DeepSpeed starts hosts through it", "apt-get install pdsh")
    return Finding("pdsh", "ok", "here")


def _needs(node: Node, place: Place, checkup: Checkup) -> Needs:
    """What the run asks of a node; of the memory, what the fullest node needs."""
    memory = None
    if checkup.run is not None and checkup.job is not None and checkup.ds_config is not None:
        memory = host_memory(checkup.run.config, checkup.job, checkup.ds_config)
    return Needs(
        ranks=len(node.slots),
        world_size=sum(len(each.slots) for each in place.nodes),
        uses_gpus=place.uses_gpus,
        slots=node.slots,
        host_bytes=None if memory is None else memory.bytes,
        host_rule="" if memory is None else memory.sum_text,
        uses_nvme=NVME in checkup.folders,
        cpu_on_purpose=os.environ.get("DS_ACCELERATOR") == "cpu",
    )


def _ask(place: Place, folders: dict[str, Path], limit_seconds: float) -> list[Answer]:
    """Have all nodes look, with files in the folders that must be shared for them to find."""
    shared = {name: _nearest(folders[name]) for name in (RUN_DIR, STORE_DIR, SHARED) if name in folders}
    here = {CURRENT_DIR: Path.cwd()} if place.over_ssh else {}
    with nonces(shared if len(place.nodes) > 1 else {}) as made:
        request = {
            "folders": {name: str(path) for name, path in (folders | here).items()},
            "nonces": made,
            "uses_nvme": NVME in folders,
            "nvme": str(folders[NVME]) if NVME in folders else None,
            "first": place.names[0],
            "port": place.port,
            "token": secrets.token_hex(8),
            "ssh_back": place.names[0] if place.over_ssh and len(place.nodes) > 1 else None,
        }
        return ask(_targets(place, request), place.names[0], place.port, place.address, limit_seconds)


def _targets(place: Place, request: Mapping[str, Any]) -> Sequence[Target]:
    if place.srun:
        return [srun_target(place.names, request)]
    if place.over_ssh:
        return [ssh_target(name, request) for name in place.names]
    return [local_target(place.names[0], request)]


def _nearest(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.is_dir())
