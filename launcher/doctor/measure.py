"""``fulltune doctor --measure``: runs `measure_rank` where training would run, and compares its figures with those that
healthy devices reach: the makers' figures for GPUs, and a share of them.
"""

import math
import os
import re
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

from engine.finding import Finding
from launcher.doctor.node_facts import join
from launcher.job.environment import remote_environment, remove_shared_memory
from launcher.job.hosts import Node
from launcher.job.job import free_port, hostfile_command, local_command
from launcher.job.processes import session_members, signal_processes
from launcher.start.find_hosts import Hosts


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 arithmetic in TFLOP/s, memory in GB/s, and NVLink in GB/s each way (None: GPUs meet over PCIe)."""

    bf16_tflops: float
    memory_gb_s: float
    nvlink_gb_s: float | None


# The first pattern that fits the name that nvidia-smi gives.
_GPUS: tuple[tuple[str, Gpu], ...] = (
    (r"\bGB200|\bB200|\bGB300|\bB300", Gpu(2250, 8000, 900)),
    (r"\bGH200", Gpu(989, 4000, 450)),
    (r"\bH200", Gpu(989, 4800, 450)),
    (r"\bH100 NVL", Gpu(835, 3900, None)),
    (r"\bH100 PCIe", Gpu(756, 2000, None)),
    (r"\bH100 80GB|\bH800", Gpu(989, 3350, 450)),
    (r"\bA100-SXM4-80GB|\bA800-SXM4", Gpu(312, 2039, 300)),
    (r"\bA100-SXM4", Gpu(312, 1555, 300)),
    (r"\bA100 80GB PCIe", Gpu(312, 1935, None)),
    (r"\bA100-PCI", Gpu(312, 1555, None)),
    (r"\bL40S", Gpu(362, 864, None)),
    (r"\bL40\b", Gpu(181, 864, None)),
    (r"\bL4\b", Gpu(121, 300, None)),
    (r"\bA40\b", Gpu(150, 696, None)),
    (r"\bA10\b|\bA10G", Gpu(125, 600, None)),
    (r"RTX 6000 Ada", Gpu(364, 960, None)),
    (r"RTX A6000", Gpu(155, 768, None)),
    (r"RTX 5090", Gpu(210, 1792, None)),
    (r"RTX 4090", Gpu(165, 1008, None)),
    (r"RTX 3090", Gpu(71, 936, None)),
)
#: What is measured, in order, and its unit.
FIGURES = {
    "matrix product": "TFLOP/s", "host memory": "GB/s", "CPU Adam": "M parameters/s", "device memory": "GB/s",
    "to device": "GB/s", "from device": "GB/s", "all-gather in a node": "GB/s", "reduce-scatter in a node": "GB/s",
    "all-gather between nodes": "GB/s", "reduce-scatter between nodes": "GB/s", "storage write": "GB/s",
    "NVMe write": "GB/s",
}  # fmt: skip
_PCIE_LANE_GB_S = {"3": 0.985, "4": 1.969, "5": 3.938, "6": 7.56}
#: Bytes that CPU Adam moves for a parameter: reads master, gradient and two moments, writes all but the gradient.
ADAM_BYTES_PER_PARAMETER = 28


def known_gpu(name: str) -> Gpu | None:
    """The figures of a GPU by the name nvidia-smi gives it; None for one that is not in the table."""
    return next((gpu for pattern, gpu in _GPUS if re.search(pattern, name)), None)


def pcie_gb_s(facts: Mapping[str, str]) -> float | None:
    """GB/s in one direction over the PCIe link of slot and GPU."""
    lane = _PCIE_LANE_GB_S.get(facts["pcie.link.gen.max"])
    width = facts["pcie.link.width.max"]
    return lane * int(width) if lane is not None and width.isdecimal() else None


@dataclass(frozen=True)
class Reference:
    """The expected value of a measurement, its source, and the share of it that is still healthy."""

    value: float | None
    source: str
    healthy_share: float = 0.5


def reference(name: str, facts: Mapping[str, Any], ranks: int, measured: Mapping[str, float]) -> Reference:
    """The reference for a measurement of the node with these facts; `measured` has its other figures."""
    gpus = facts["gpus"]["gpus"]
    gpu = known_gpu(gpus[0]["name"]) if gpus else None
    match name:
        case "matrix product" if gpu is not None:
            return Reference(gpu.bf16_tflops, f"{gpus[0]['name']}")
        case "device memory" if gpu is not None:
            return Reference(gpu.memory_gb_s, f"{gpus[0]['name']}", 0.7)
        case "to device" | "from device" if gpus:
            return Reference(
                pcie_gb_s(gpus[0]), f"PCIe {gpus[0]['pcie.link.gen.max']} x{gpus[0]['pcie.link.width.max']}"
            )
        case "CPU Adam":
            bound = measured["host memory"] * 1e3 / ADAM_BYTES_PER_PARAMETER
            return Reference(bound, f"memory bandwidth / {ADAM_BYTES_PER_PARAMETER} bytes")
        case "all-gather in a node" | "reduce-scatter in a node" if gpu is not None and gpu.nvlink_gb_s is not None:
            return Reference(gpu.nvlink_gb_s, "NVLink")
        case "all-gather between nodes" | "reduce-scatter between nodes":
            return _network(facts["machine"], ranks, bool(gpus))
        case _:
            return Reference(None, "")


def _network(machine: Mapping[str, Any], ranks: int, uses_gpus: bool) -> Reference:
    """A rank's share of the node's link, as all of them use it at once."""
    infiniband = sum(machine["infiniband_gbit"].values())
    if infiniband and uses_gpus:
        return Reference(infiniband / 8 / ranks, f"InfiniBand, {infiniband:.0f} Gbit/s")
    if machine["ethernet_mbit"]:
        return Reference(
            machine["ethernet_mbit"] / 8e3 / ranks, f"Ethernet, {machine['ethernet_mbit'] / 1e3:.0f} Gbit/s"
        )
    return Reference(None, "")


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
