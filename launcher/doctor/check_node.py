"""Checks of one node: limits, memory, /dev/shm, ops, GPUs. Pure functions of the node's facts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.finding import Finding

_GIB, _MIB = 2.0**30, 2.0**20
#: What DeepSpeed's CPU collectives take in /dev/shm for each rank, and what NCCL may.
CPU_SHM_BYTES_PER_RANK, GPU_SHM_BYTES_PER_RANK = 66 * 2**20, 32 * 2**20
# Measured on CPU ranks: rank 0 held 46 files among 2 ranks, 53 among 4, 60 among 6, and failed with 40 among 2.
_OPEN_FILES, _OPEN_FILES_PER_RANK, _OPEN_FILES_USUAL = 40, 4, 1024
# Measured: 10 threads of a rank and as many as it has cores; compilers and launchers besides. GPUs bring more.
_PROCESSES, _PROCESSES_PER_RANK, _PROCESSES_USUAL = 32, 24, 4096
#: The oldest driver for each major version of CUDA, from NVIDIA's release notes.
OLDEST_DRIVER = {"11": (450, 80), "12": (525, 60), "13": (580, 65)}
_BUSY_MIB = 1024


@dataclass(frozen=True)
class Needs:
    """The run's needs on one node. `host_bytes` is None where no rule gives the memory."""

    ranks: int
    world_size: int
    uses_gpus: bool
    slots: tuple[int, ...]
    host_bytes: float | None = None
    host_rule: str = ""
    uses_nvme: bool = False
    cpu_on_purpose: bool = False


def check_node(facts: Mapping[str, Any], needs: Needs) -> list[Finding]:
    """All findings about one node, in the order they are shown."""
    node = str(facts["node"])
    return [
        *_packages(facts["versions"], node),
        *_gpus(facts["gpus"], needs, node),
        *_cuda(facts["gpus"], facts["versions"], needs, node),
        *_cores(facts["machine"], needs, node),
        *check_memory(facts["memory"], needs, node),
        *_shared_memory(facts["shared_memory"], needs, node),
        *_limits(facts["limits"], facts["machine"], needs, node),
        *check_ops(facts["ops"], node),
    ]


def _packages(versions: Mapping[str, Any], node: str) -> Iterator[Finding]:
    missing = [name for name in versions if versions[name] is None and name != "torch CUDA"]
    if missing:
        yield Finding("packages", "error", f"not installed: {', '.join(missing)}", "run `make setup`", node)
        return
    shown = ("python", "torch", "deepspeed", "transformers")
    yield Finding("packages", "ok", ", ".join(f"{name} {versions[name]}" for name in shown), node=node)


def _gpus(gpus: Mapping[str, Any], needs: Needs, node: str) -> Iterator[Finding]:
    present = gpus["gpus"]
    if gpus["error"] is not None:
        advice = "reload the driver or reboot the node; `nvidia-smi` must work"
        yield Finding("GPUs", "error", f"{gpus['devices']} device files, but: {gpus['error']}", advice, node)
        return
    if not needs.uses_gpus:
        if present and not needs.cpu_on_purpose:
            found = f"{len(present)} here, and not used: the machine that starts the run has none"
            yield Finding("GPUs", "warning", found, "start it on one of the hosts", node)
        else:
            found = f"{len(present)} here, not used" if present else "none, ranks run on the CPU"
            yield Finding("GPUs", "ok", found, node=node)
        return
    if len(present) <= max(needs.slots):
        yield Finding(
            "GPUs", "error", f"{len(needs.slots)} slots up to number {max(needs.slots)}, and {len(present)} GPUs",
            "correct slots= in the hostfile, or the number of ranks", node,
        )  # fmt: skip
        return
    kinds = sorted({f"{gpu['name']} {gpu['memory.total']} MiB" for gpu in present})
    if len(kinds) > 1:
        yield Finding("GPUs", "warning", f"of different kinds: {', '.join(kinds)}", "all wait for the slowest", node)
    else:
        yield Finding("GPUs", "ok", f"{len(present)} x {kinds[0]}", node=node)
    used = [present[slot] for slot in needs.slots]
    busy = [gpu["index"] for gpu in used if gpu["memory.used"].isdecimal() and int(gpu["memory.used"]) > _BUSY_MIB]
    if busy:
        advice = "see `nvidia-smi` for whose they are"
        yield Finding("GPUs in use", "warning", f"GPU {', '.join(busy)} holds memory of other programs", advice, node)
    broken = [gpu["index"] for gpu in used if gpu.get("ecc", "0") not in ("0", "[N/A]", "N/A", "[Not Supported]")]
    if broken:
        advice = "reset the GPU or have it replaced"
        yield Finding("GPU memory", "error", f"uncorrected memory errors on GPU {', '.join(broken)}", advice, node)
    old = [gpu["index"] for gpu in used if gpu["compute_cap"].partition(".")[0] in ("5", "6", "7")]
    if old:
        yield Finding("bf16", "warning", f"GPU {', '.join(old)} has no bf16 units", "expect a slow run", node)


def _cuda(gpus: Mapping[str, Any], versions: Mapping[str, Any], needs: Needs, node: str) -> Iterator[Finding]:
    if not needs.uses_gpus or not gpus["gpus"]:
        return
    built_for, nvcc = versions["torch CUDA"], gpus["nvcc"]
    if built_for is None:
        found = f"torch {versions['torch']} cannot use GPUs"
        yield Finding("driver", "error", found, "install a torch for CUDA, or set DS_ACCELERATOR=cpu", node)
        return
    driver = gpus["gpus"][0]["driver_version"]
    oldest = OLDEST_DRIVER.get(built_for.partition(".")[0])
    have = tuple(int(part) for part in driver.split(".")[:2] if part.isdecimal())
    if oldest is not None and have < oldest:
        found = f"{driver} is too old for torch's CUDA {built_for}"
        advice = f"install driver {oldest[0]}.{oldest[1]} or newer, or a torch for an older CUDA"
        yield Finding("driver", "error", found, advice, node)
    else:
        yield Finding("driver", "ok", f"{driver} for CUDA {built_for}", node=node)
    if nvcc is None:
        yield Finding("nvcc", "ok", "not here, and not needed: CPU Adam is plain C++", node=node)
    elif nvcc.partition(".")[0] != built_for.partition(".")[0]:
        advice = "not needed by fulltune; DeepSpeed's CUDA ops will not compile with it"
        yield Finding("nvcc", "warning", f"CUDA {nvcc}, and torch was built for {built_for}", advice, node)
    else:
        yield Finding("nvcc", "ok", f"CUDA {nvcc} for torch's {built_for}", node=node)


def _cores(machine: Mapping[str, Any], needs: Needs, node: str) -> Iterator[Finding]:
    cores = machine["cores"]
    if cores < needs.ranks:
        advice = "fewer ranks, or a larger share of the node"
        yield Finding("cores", "warning", f"{cores} for {needs.ranks} ranks: they take turns", advice, node)
    else:
        yield Finding("cores", "ok", f"{cores} for {needs.ranks} rank{'s' if needs.ranks > 1 else ''}", node=node)


def check_memory(memory: Mapping[str, Any], needs: Needs, node: str) -> Iterator[Finding]:
    """The host memory of a node against what the rule says the run needs."""
    usable = min(memory["available_bytes"], memory["limit_bytes"])
    free = f"{usable / _GIB:.1f} GiB usable of {memory['total_bytes'] / _GIB:.1f}"
    if memory["cgroup"] and memory["limit_bytes"] < memory["total_bytes"]:
        free += f" (limit {memory['cgroup']})"
    if needs.host_bytes is None:
        yield Finding("host memory", "ok", f"{free}", node=node)
    elif needs.host_bytes > usable:
        advice = "more nodes, a smaller model, optimizer states on NVMe, or end what else runs there"
        found = f"the run needs about {needs.host_bytes / _GIB:.1f} GiB ({needs.host_rule}), and there are {free}"
        yield Finding("host memory", "error", found, advice, node)
    elif needs.host_bytes > 0.9 * usable:
        found = f"tight: about {needs.host_bytes / _GIB:.1f} GiB needed, {free}"
        yield Finding("host memory", "warning", found, "leave more room", node)
    else:
        yield Finding("host memory", "ok", f"about {needs.host_bytes / _GIB:.1f} GiB needed, {free}", node=node)


def _shared_memory(shared: Mapping[str, Any], needs: Needs, node: str) -> Iterator[Finding]:
    each = GPU_SHM_BYTES_PER_RANK if needs.uses_gpus else CPU_SHM_BYTES_PER_RANK
    # A single rank of a node has nobody to share memory with.
    needed = each * needs.ranks if needs.ranks > 1 else 0
    whose = "NCCL" if needs.uses_gpus else "DeepSpeed"
    free = f"{shared['free_bytes'] / _MIB:.0f} MiB free"
    if shared["error"] is not None:
        yield Finding("shared memory", "error", f"unusable: {shared['error']}", "mount or empty /dev/shm", node)
    elif shared["free_bytes"] < needed:
        # CPU ranks were seen to train with less: few of DeepSpeed's collectives touch the whole buffer.
        found = f"{free} in /dev/shm, and {whose} takes up to {needed / _MIB:.0f} for {needs.ranks} ranks"
        advice = "`mount -o remount,size=8G /dev/shm`; in a container --shm-size=8g or --ipc=host"
        yield Finding("shared memory", "warning", found, advice, node)
    else:
        yield Finding("shared memory", "ok", f"{free} in /dev/shm", node=node)
    if shared["left"]:
        found = f"{shared['left_bytes'] / _MIB:.0f} MiB in /dev/shm of runs that have ended"
        advice = f"rm {' '.join(shared['left'][:3])}{' ...' if len(shared['left']) > 3 else ''}"
        yield Finding("shared memory left", "warning", found, advice, node)


def _limits(limits: Mapping[str, Any], machine: Mapping[str, Any], needs: Needs, node: str) -> Iterator[Finding]:
    privileges = set(limits["capabilities"])
    least = _OPEN_FILES + _OPEN_FILES_PER_RANK * needs.world_size
    yield _limit(limits, "open files", least, _OPEN_FILES_USUAL, "-n", node)
    if limits["is_root"] or privileges & {"CAP_SYS_ADMIN", "CAP_SYS_RESOURCE"}:
        yield Finding("processes", "ok", "no limit for this user", node=node)
    else:
        least = _PROCESSES + _PROCESSES_PER_RANK * needs.ranks + machine["cores"] + (limits["threads"] or 0)
        yield _limit(limits, "processes", least, _PROCESSES_USUAL, "-u", node)
    locked = limits["locked memory"]
    has_infiniband = any(rate > 0 for rate in machine["infiniband_gbit"].values())
    if locked == -1 or "CAP_IPC_LOCK" in privileges or not (needs.uses_nvme or has_infiniband):
        text = (
            "no limit for this user" if locked == -1 or "CAP_IPC_LOCK" in privileges else f"{locked} bytes, not needed"
        )
        yield Finding("locked memory", "ok", text, node=node)
    else:
        why = "DeepSpeed locks its buffers for NVMe" if needs.uses_nvme else "InfiniBand locks what it sends"
        advice = "`ulimit -l unlimited`, or memlock in /etc/security/limits.conf"
        yield Finding("locked memory", "error", f"limited to {locked} bytes, and {why}", advice, node)
    if limits["address space"] != -1:
        found = f"limited to {limits['address space'] / _GIB:.2f} GiB a process"
        each = (needs.host_bytes or 0) / needs.ranks
        # CUDA reserves more than there is memory; a CPU rank only what it uses.
        is_bad = needs.uses_gpus or each > limits["address space"]
        yield Finding("address space", "error" if is_bad else "warning", found, "`ulimit -v unlimited`", node)
    if limits["file size"] != -1:
        found = f"limited to {limits['file size'] / _GIB:.2f} GiB: larger checkpoints will fail"
        yield Finding("file size", "warning", found, "`ulimit -f unlimited`", node)


def _limit(limits: Mapping[str, Any], name: str, least: int, usual: int, option: str, node: str) -> Finding:
    have = limits[name]
    advice = f"`ulimit {option} 65536`, or in /etc/security/limits.conf"
    if have != -1 and have < least:
        return Finding(name, "error", f"limited to {have}, and about {least} are needed", advice, node)
    if have != -1 and have < usual:
        return Finding(name, "warning", f"limited to {have}", advice, node)
    return Finding(name, "ok", "no limit" if have == -1 else f"limit {have}", node=node)


def check_ops(ops: Mapping[str, Any], node: str) -> Iterator[Finding]:
    """DeepSpeed's ops, and what compiling them needs."""
    if ops["folder"] is None:
        return
    missing_tools = [*ops["packages"], *([] if ops["has_ninja"] else ["ninja"])]
    if missing_tools:
        found = f"missing, and DeepSpeed's ops need it at every start: {', '.join(missing_tools)}"
        yield Finding("compiler", "error", found, f"apt-get install {' '.join(missing_tools)}", node)
    else:
        yield Finding("compiler", "ok", "a C++ compiler, ninja and Python's headers", node=node)
    if ops["no_exec"] or ops["write_error"] is not None:
        why = "is mounted noexec" if ops["no_exec"] else f"cannot be written: {ops['write_error']}"
        advice = "set TORCH_EXTENSIONS_DIR to a folder where compiled code may lie and run"
        yield Finding("ops", "error", f"{ops['folder']} {why}", advice, node)
    elif ops["missing"]:
        found = f"not compiled yet: {', '.join(ops['missing'])}; the first start does it, in about a minute"
        yield Finding("ops", "ok", found, node=node)
    else:
        yield Finding("ops", "ok", f"compiled, in {ops['folder']}", node=node)
    for lock in ops["broken_locks"]:
        advice = f"`fulltune train` removes it; by hand: rm {lock}"
        yield Finding("build lock", "warning", f"{lock} is left of a killed build", advice, node)
