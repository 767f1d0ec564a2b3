"""``fulltune doctor --measure``: runs `measure_rank` where training would run, and compares its figures."""

import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.doctor.device_figures import FIGURES, Reference, reference
from launcher.doctor.node_facts import join
from launcher.job.environment import remote_environment, remove_shared_memory
from launcher.job.finding import Finding
from launcher.job.hosts import Node
from launcher.job.job import free_port, hostfile_command, local_command
from launcher.job.processes import session_members, signal_processes
from launcher.start.find_hosts import Hosts

_LIMIT_SECONDS = 240.0
#: A node this much slower than the median holds the others up.
_STRAGGLER_SHARE = 0.75
#: Figures that a node's ranks share: its own is their sum. Of the others it is the slowest rank's.
_SHARED = ("host memory", "CPU Adam")
_RANK_BYTES = 3 * 2**29


@dataclass(frozen=True)
class Figure:
    """A measurement of a node, in the unit of `FIGURES`, and its expected value."""

    name: str
    node: str
    value: float
    expected: Reference


@dataclass
class Measured:
    """The measurements as plain values, and the findings about them."""

    findings: list[Finding] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)


def measure(hosts: Hosts, facts: Mapping[str, Any], folder: Path | None, nvme: Path | None) -> Measured:
    """Run the measurements and compare them; a failure of theirs is a finding too.

    `folder` and `nvme` are where writing is measured. All nodes must have equally many ranks.
    """
    if len({len(node.slots) for node in hosts.nodes}) > 1:
        return Measured([Finding("measurements", "skipped", "the nodes have different numbers of ranks")])
    ranks = len(hosts.nodes[0].slots)
    free = min(facts[name]["memory"]["available_bytes"] for name in hosts.names)
    if free < ranks * _RANK_BYTES:
        found = f"they take {ranks * _RANK_BYTES / 2**30:.0f} GiB a node, and {free / 2**30:.1f} GiB are free"
        return Measured([Finding("measurements", "skipped", found)])
    words = ["--ranks-per-node", str(ranks)]
    for option, path in (("--folder", folder), ("--nvme", nvme)):
        words += [option, str(path)] if path is not None else []
    port = hosts.port or free_port()
    with tempfile.TemporaryDirectory(prefix="fulltune-measure-") as scratch:
        command = _command(hosts, port, words)
        environment = {**hosts.environment}
        if hosts.over_ssh:
            environment |= remote_environment(Path(scratch), environment)
        print(f"measuring: {shlex.join(command)}", file=sys.stderr, flush=True)
        rows, problem = _run(command, environment)
    remove_shared_memory("*" if hosts.srun else "127.0.0.1", port)
    if rows is None:
        to_do = "a run would fare no better; see what was printed above"
        return Measured([Finding("measurements", "error", problem, to_do)])
    figures = collect(rows, hosts.nodes, facts)
    return Measured(compare(figures), [asdict(figure) for figure in figures])


def _command(hosts: Hosts, port: int, words: list[str]) -> tuple[str, ...]:
    """The argv that starts the ranks as `fulltune train` would, with another module."""
    module = "launcher.doctor.measure_rank"
    if hosts.srun:
        return (*hosts.srun, sys.executable, "-m", module, *words, "--master", f"{hosts.address}:{port}")
    if hosts.hostfile is not None:
        return hostfile_command(hosts.hostfile, list(hosts.nodes), list(hosts.selection), port, words, module)
    return local_command(hosts.nodes[0], port, words, module)


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[list[list[float | None]] | None, str]:
    """The figures of every rank, or None and why there are none. What else it prints is passed on."""
    process = subprocess.Popen(
        command, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        encoding="utf-8", errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"not done within {_LIMIT_SECONDS:.0f} s"
    finally:
        signal_processes(session_members(process.pid), signal.SIGKILL)
        process.wait()
    pieces: dict[str, list[str]] = {"measured": []}
    rows: list[list[float | None]] | None = None
    for line in output.splitlines():
        try:
            # pdsh puts the host's name before every line.
            values = join(pieces, line[line.index("{") :])
        except (ValueError, KeyError):
            print(line, file=sys.stderr)
            continue
        rows = values["figures"] if values is not None else rows
    if rows is None or process.returncode:
        return None, f"the ranks ended with code {process.returncode}"
    return rows, ""


def collect(rows: Sequence[Sequence[float | None]], nodes: Sequence[Node], facts: Mapping[str, Any]) -> list[Figure]:
    """Figures of nodes from those of their ranks, with what each should come to."""
    found = []
    first = 0
    for node in nodes:
        count = len(node.slots)
        own = rows[first : first + count]
        first += count
        values: dict[str, float] = {}
        for number, name in enumerate(FIGURES):
            given = [value for row in own if (value := row[number]) is not None and math.isfinite(value)]
            if given:
                values[name] = sum(given) if name in _SHARED else min(given)
        for name, value in values.items():
            expected = reference(name, facts[node.name], count, values)
            found.append(Figure(name, node.name, value, expected))
    return found


def compare(figures: Sequence[Figure]) -> list[Finding]:
    """Each figure against what the device should give, and against the same of the other nodes."""
    return [_compare(figure, [other.value for other in figures if other.name == figure.name]) for figure in figures]


def _compare(figure: Figure, of_all_nodes: Sequence[float]) -> Finding:
    text = f"{_number(figure.value)} {FIGURES[figure.name]}"
    usual = statistics.median(of_all_nodes)
    expected = figure.expected
    if expected.value is None:
        text += ", no reference"
    else:
        text += f", {figure.value / expected.value:.0%} of {_number(expected.value)} ({expected.source})"
        if figure.value < expected.healthy_share * expected.value:
            to_do = f"a healthy one gives {expected.healthy_share:.0%} or more: is something else running there?"
            return Finding(figure.name, "warning", text, to_do, figure.node)
    if figure.value < _STRAGGLER_SHARE * usual:
        to_do = f"the nodes' median is {_number(usual)}: the others will wait for it"
        return Finding(figure.name, "warning", text, to_do, figure.node)
    return Finding(figure.name, "ok", text, node=figure.node)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
