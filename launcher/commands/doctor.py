"""``fulltune doctor``: would a run start and last on these machines? Looks at all of them at once, changes nothing.

`launcher.doctor.node_facts` runs on every node and collects facts (`launcher.doctor.gather` starts it); `check_node`,
`check_job` and `check_run` turn facts into findings. Torch is not imported, so the answer takes seconds.
"""

import argparse
import dataclasses
import json
import os
import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from engine.errors import ConfigError
from engine.finding import Finding, failures, is_bad
from engine.zero.ds_config import resolve_ds_config
from launcher.doctor.check_job import check_job
from launcher.doctor.check_node import Needs, check_node
from launcher.doctor.gather import Answer, Target, gather, local_target, nonces, srun_target, ssh_target
from launcher.doctor.measure import measure
from launcher.job.hosts import Node
from launcher.job.job import Job
from launcher.job.run_config import Run, load_run
from launcher.start.dry_run import host_memory
from launcher.start.find_hosts import Hosts, find_hosts
from launcher.start.preflight import (
    CURRENT_DIR,
    NVME,
    RUN_DIR,
    SHARED,
    STORE_DIR,
    check_folders,
    check_in_use,
    check_run,
    folders_of,
)
from launcher.start.start import plan_job

_COLOURS = {"ok": "32", "warning": "33", "error": "31;1", "skipped": "2"}


@dataclass
class Checkup:
    """All that was found. `facts` come from the nodes that answered; `ds_config` is the run's resolved JSON."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    hosts: Hosts | None = None
    run: Run | None = None
    job: Job | None = None
    ds_config: dict[str, Any] | None = None
    folders: dict[str, Path] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all nodes."""
        return self.hosts.names if self.hosts is not None else ("localhost",)


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
    if arguments.measure and checkup.hosts is not None and not is_bad(checkup.findings):
        measured = measure(checkup.hosts, checkup.facts, *_to_write_in(checkup))
        checkup.findings += measured.findings
        measurements = measured.figures
    elif arguments.measure:
        checkup.findings.append(Finding("measurements", "skipped", "first mend what is wrong"))
    code = ConfigError.exit_code if is_bad(checkup.findings) else 0
    if arguments.json:
        values = {
            "exit_code": code,
            "findings": [dataclasses.asdict(finding) for finding in checkup.findings],
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
    _find_hosts(checkup, arguments)
    if checkup.run is not None:
        checkup.findings += [*check_run(checkup.run), check_in_use(checkup.run.config.run_dir)]
        checkup.folders = folders_of(checkup.run, checkup.ds_config)
    if is_folder and given is not None:
        checkup.folders = {SHARED: given.absolute()}
    # Where ranks would run is not known: this machine can be looked at all the same.
    hosts = checkup.hosts or Hosts((Node("localhost", (0,)),), False, None)
    if hosts.over_ssh:
        checkup.findings.append(_pdsh())
    answers = _gather(hosts, checkup.folders, arguments.wait_seconds)
    checkup.facts = {answer.node: answer.facts for answer in answers if answer.facts is not None}
    checkup.findings += check_job(answers, hosts.names[0], hosts.port, hosts.over_ssh)
    for node in hosts.nodes:
        if (facts := checkup.facts.get(node.name)) is not None:
            checkup.findings += check_node(facts, _needs(node, hosts, checkup))
            checkup.findings += check_folders(facts, checkup.run, len(hosts.nodes))
    return checkup


def _load(checkup: Checkup, path: Path, overrides: list[str]) -> None:
    try:
        checkup.run = load_run(path, overrides)
    except Exception as error:
        checkup.findings += failures("run file", error, "correct it: nothing else of the run could be checked")


def _find_hosts(checkup: Checkup, arguments: argparse.Namespace) -> None:
    """Find the nodes for the ranks and, with a run file, the job that `fulltune train` would start there."""
    try:
        checkup.hosts = find_hosts(arguments)
    except Exception as error:
        name = "hosts" if arguments.hostfile or arguments.include or arguments.exclude else "ranks"
        checkup.findings += failures(name, error)
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
        checkup.findings += failures("job", error)


def _pdsh() -> Finding:
    if shutil.which("pdsh") is None:
        return Finding("pdsh", "error", "not here, and DeepSpeed starts hosts through it", "apt-get install pdsh")
    return Finding("pdsh", "ok", "here")


def _needs(node: Node, hosts: Hosts, checkup: Checkup) -> Needs:
    """The run's needs on a node; the memory is that of the fullest node."""
    memory = None
    if checkup.run is not None and checkup.job is not None and checkup.ds_config is not None:
        memory = host_memory(checkup.run.config, checkup.job, checkup.ds_config)
    return Needs(
        ranks=len(node.slots),
        world_size=sum(len(each.slots) for each in hosts.nodes),
        uses_gpus=hosts.uses_gpus,
        slots=node.slots,
        host_bytes=None if memory is None else memory.bytes,
        host_rule="" if memory is None else memory.sum_text,
        uses_nvme=NVME in checkup.folders,
        cpu_on_purpose=os.environ.get("DS_ACCELERATOR") == "cpu",
    )


def _gather(hosts: Hosts, folders: dict[str, Path], limit_seconds: float) -> list[Answer]:
    """Have all nodes look, with files in the folders that must be shared for them to find."""
    shared = {name: _nearest(folders[name]) for name in (RUN_DIR, STORE_DIR, SHARED) if name in folders}
    here = {CURRENT_DIR: Path.cwd()} if hosts.over_ssh else {}
    with nonces(shared if len(hosts.nodes) > 1 else {}) as made:
        request = {
            "folders": {name: str(path) for name, path in (folders | here).items()},
            "nonces": made,
            "uses_nvme": NVME in folders,
            "nvme": str(folders[NVME]) if NVME in folders else None,
            "first": hosts.names[0],
            "port": hosts.port,
            "token": secrets.token_hex(8),
            "ssh_back": hosts.names[0] if hosts.over_ssh and len(hosts.nodes) > 1 else None,
        }
        return gather(_targets(hosts, request), hosts.names[0], hosts.port, hosts.address, limit_seconds)


def _targets(hosts: Hosts, request: Mapping[str, Any]) -> Sequence[Target]:
    if hosts.srun:
        return [srun_target(hosts.names, request)]
    if hosts.over_ssh:
        return [ssh_target(name, request) for name in hosts.names]
    return [local_target(hosts.names[0], request)]


def _nearest(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def print_table(findings: Sequence[Finding], nodes: Sequence[str], out: TextIO) -> None:
    """Write the table to `out`."""
    colours = has_colours(out)
    rows = merged(findings, nodes)
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        where = f"{row.node}: " if row.node else ""
        print(f"{_verdict(row, colours)}  {row.name:<{width}}  {where}{_text(row)}", file=out)


def has_colours(out: TextIO) -> bool:
    """True for a terminal whose user has not chosen plain text (https://no-color.org)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _verdict(row: Finding, colours: bool) -> str:
    text = f"{row.verdict:<7}"
    return f"\x1b[{_COLOURS[row.verdict]}m{text}\x1b[0m" if colours else text


def _text(row: Finding) -> str:
    text = f"{row.found}; {row.to_do}" if row.to_do else row.found
    # Some of it comes from other machines and files: nothing in it may act on the terminal.
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def merged(findings: Sequence[Finding], nodes: Sequence[str]) -> list[Finding]:
    """Equal findings of several nodes as one, in the order of the first; a lone node needs no name."""
    places: dict[Finding, list[str]] = {}
    for finding in findings:
        places.setdefault(dataclasses.replace(finding, node=""), []).append(finding.node)
    rows = []
    for finding, where in places.items():
        named = [node for node in where if node]
        if len(nodes) < 2 or not named:
            label = ""
        elif len(named) == len(nodes):
            label = f"all {len(nodes)} nodes"
        else:
            label = ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")
        rows.append(dataclasses.replace(finding, node=label))
    return rows
