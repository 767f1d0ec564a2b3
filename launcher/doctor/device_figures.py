"""Expected speeds of devices: makers' figures for GPUs, and the share of them that a healthy device reaches."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
