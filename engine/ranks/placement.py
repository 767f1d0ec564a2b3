"""Where a rank computes: its own cores, near its GPU, and as many threads. Called before torch is imported.

CPU Adam runs as many threads as it is told; ranks of one machine that are free to use every core push
each other's threads, and their memory, from one to the other. Imports without torch.
"""

import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SYSTEM = Path("/sys")
NVIDIA = Path("/proc/driver/nvidia/gpus")
#: 0: cores are left alone; 1: bound also where a rank gets a single one.
BIND_CORES = "FULLTUNE_BIND_CORES"
#: What rounds pinned buffers up to whole MiB; torch would take powers of two, up to twice the offloaded state.
PINNED_MEMORY = "pinned_max_round_threshold_mb:1"
#: A rank with a single core would share it with its own writer and loader threads: it is left unbound.
LEAST_CORES = 2


@dataclass(frozen=True)
class Placement:
    """The ranks of this machine and the cores of each, in local order; none if they are not bound, and why not.

    `refused_threads` is what OMP_NUM_THREADS said where no rank can follow it.
    """

    local_index: int
    cores: tuple[tuple[int, ...], ...]
    num_ranks: int
    num_cores: int
    num_nodes: int
    reason: str = ""
    refused_threads: str = ""

    @property
    def own(self) -> tuple[int, ...]:
        """The cores of this rank; empty if it is not bound."""
        return self.cores[self.local_index] if self.cores else ()


def plan_cores(environment: Mapping[str, str], mask: set[int], parent_mask: set[int]) -> Placement:
    """Which cores of `mask`, this rank's, each rank of this machine gets; `parent_mask`: of the launcher's process."""
    index, num_ranks, is_task = _local_place(environment)
    nodes = numa_nodes(mask)

    def unbound(reason: str) -> Placement:
        return Placement(index, (), num_ranks, len(mask), len(nodes), reason)

    if environment.get(BIND_CORES) == "0":
        return unbound(f"{BIND_CORES}=0")
    if num_ranks < 2 or index >= num_ranks:
        return unbound("a single rank")
    # A task of its own has what Slurm gave it; siblings under one launcher share what that has.
    if len(mask) < (os.cpu_count() or 1) if is_task else mask != parent_mask:
        return unbound("each rank has been given its own")
    cores = _near_gpus(environment, num_ranks, nodes) or _even_parts(_in_order(nodes), num_ranks)
    least = 1 if environment.get(BIND_CORES) == "1" else LEAST_CORES
    if min(map(len, cores)) < least:
        return unbound(f"fewer than {least} a rank")
    return Placement(index, cores, num_ranks, len(mask), len(nodes))


def place_rank(environment: MutableMapping[str, str]) -> Placement:
    """Bind this process to its cores and set what threads and pinned memory go by, unless the user has."""
    mask = os.sched_getaffinity(0)
    try:
        parent_mask = os.sched_getaffinity(os.getppid())
    except OSError:
        parent_mask = mask
    placement = plan_cores(environment, mask, parent_mask)
    if placement.own:
        os.sched_setaffinity(0, placement.own)
    share = len(placement.own) or max(1, placement.num_cores // _sharing(placement))
    asked = environment.get("OMP_NUM_THREADS", "").strip()
    is_number = re.fullmatch(r"[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", asked) is not None  # a list is for nested loops
    threads = int(asked.partition(",")[0]) if is_number else 0
    if (asked and not threads) or threads > (os.cpu_count() or 1):
        placement = replace(placement, refused_threads=asked)
    if not threads or placement.refused_threads or (placement.own and threads > len(placement.own)):
        environment["OMP_NUM_THREADS"] = str(share)
    if _gpu_addresses() and environment.get("DS_ACCELERATOR") != "cpu" and "PYTORCH_CUDA_ALLOC_CONF" not in environment:
        environment.setdefault("PYTORCH_ALLOC_CONF", PINNED_MEMORY)
    return placement


def describe(placement: Placement, environment: Mapping[str, str], ops_dir: Path) -> str:
    """What was set, in one line for the log."""
    if placement.cores:
        cores = "; ".join(map(_ranges, placement.cores))
        told = f"{placement.num_ranks} ranks here, each on its own cores of {placement.num_cores} ({cores})"
    elif placement.num_ranks > 1:
        told = f"{placement.num_ranks} ranks here, cores not bound ({placement.reason}), {placement.num_cores} to use"
    else:
        told = f"1 rank here, {placement.num_cores} cores"
    nodes = f"{placement.num_nodes} NUMA node{'s' if placement.num_nodes > 1 else ''}"
    pinned = environment.get("PYTORCH_ALLOC_CONF") or environment.get("PYTORCH_CUDA_ALLOC_CONF")
    pinned = f", pinned memory {pinned}" if pinned else ""
    refused = placement.refused_threads
    threads = f"{environment.get('OMP_NUM_THREADS')}{f' (not {refused}: no number of threads here)' if refused else ''}"
    return f"{told}, {nodes}, OMP_NUM_THREADS={threads}{pinned}, ops in {ops_dir}"


def numa_nodes(mask: set[int]) -> list[list[int]]:
    """The cores of `mask` by NUMA node, those of one physical core next to each other; one node if none is known."""
    nodes = []
    folders = sorted(SYSTEM.glob("devices/system/node/node[0-9]*"), key=lambda folder: int(folder.name[4:]))
    for folder in folders:
        cores = mask & set(_parse(_read(folder / "cpulist")))
        if cores:
            nodes.append(_by_physical_core(cores))
    known = {core for node in nodes for core in node}
    return nodes if known == mask else [_by_physical_core(mask)]


def _local_place(environment: Mapping[str, str]) -> tuple[int, int, bool]:
    """(place among the ranks of this machine, how many there are, whether Slurm started this rank as a task)."""

    def number(*names: str, default: int) -> int:
        found = next((environment[name] for name in names if environment.get(name, "").isdecimal()), None)
        return default if found is None else int(found)

    count = number("LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=1)
    names = (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    is_task = all(environment.get(ours) and environment.get(ours) == environment.get(theirs) for ours, theirs in names)
    # LOCAL_RANK is the number of the device, which per-task binding makes 0 everywhere.
    return number("SLURM_LOCALID" if is_task else "LOCAL_RANK", default=0), count, is_task


def _near_gpus(
    environment: Mapping[str, str], num_ranks: int, nodes: list[list[int]]
) -> tuple[tuple[int, ...], ...] | None:
    """The cores of each rank from the NUMA node of its GPU; None where that is not known of all of them."""
    addresses = _gpu_addresses()
    if environment.get("DS_ACCELERATOR") == "cpu" or len(nodes) < 2:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    numbers = [str(number) for number in range(len(addresses))] if visible is None else visible.split(",")
    devices = numbers[:num_ranks]
    if len(devices) < num_ranks or not all(n.strip().isdecimal() and int(n) < len(addresses) for n in devices):
        return None
    homes = [_read(SYSTEM / "bus/pci/devices" / addresses[int(number)] / "numa_node") for number in devices]
    by_home: dict[str, list[int]] = {}
    for rank, home in enumerate(homes):
        by_home.setdefault(home, []).append(rank)
    found: dict[int, tuple[int, ...]] = {}
    for home, ranks in by_home.items():
        near = set(_parse(_read(SYSTEM / f"devices/system/node/node{home}/cpulist"))) if home.isdecimal() else set()
        cores = [core for node in nodes for core in node if core in near]
        if len(cores) < LEAST_CORES * len(ranks):
            return None
        found |= dict(zip(ranks, _even_parts(cores, len(ranks)), strict=True))
    return tuple(found[rank] for rank in range(num_ranks))


def _gpu_addresses() -> list[str]:
    """PCI addresses of NVIDIA GPUs in the order of their numbers."""
    return sorted(path.name for path in NVIDIA.glob("*")) if NVIDIA.is_dir() else []


def _even_parts(cores: Sequence[int], count: int) -> tuple[tuple[int, ...], ...]:
    """Equal runs of cores; what is left over stays free for everybody else on the machine."""
    size = len(cores) // count
    if size >= 2 * LEAST_CORES:
        size -= size % 2  # both threads of a physical core go to one rank
    return tuple(tuple(sorted(cores[part * size : (part + 1) * size])) for part in range(count))


def _in_order(nodes: list[list[int]]) -> list[int]:
    return [core for node in nodes for core in node]


def _by_physical_core(cores: set[int]) -> list[int]:
    def key(core: int) -> tuple[int, int]:
        siblings = _parse(_read(SYSTEM / f"devices/system/cpu/cpu{core}/topology/thread_siblings_list"))
        return (min(siblings, default=core), core)

    return sorted(cores, key=key)


def _sharing(placement: Placement) -> int:
    return 1 if placement.reason == "each rank has been given its own" else placement.num_ranks


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _parse(text: str) -> list[int]:
    """`0-3,8` as numbers; what is no such list is none."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match:
            numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return numbers


def _ranges(cores: Sequence[int]) -> str:
    """The other way round."""
    parts: list[list[int]] = []
    for core in sorted(cores):
        if parts and core == parts[-1][1] + 1:
            parts[-1][1] = core
        else:
            parts.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
