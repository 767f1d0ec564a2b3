"""The machines for ranks: this one with its devices, and the choice among the hosts of a hostfile.

DeepSpeed resolves the same things itself once it runs. They are resolved here first, without
torch, so that a plan can be shown and a mistake named before anything starts.
"""

import os
import re
import subprocess
from dataclasses import dataclass

from engine.errors import ConfigError

CPU_RANKS = 2
# What a host name may look like: names reach ssh and a remote shell through DeepSpeed, unquoted.
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
# In CUDA_VISIBLE_DEVICES these hide all devices from there on; Slurm writes the last one.
_NO_DEVICE = frozenset({"-1", "none", "void", "NoDevFiles"})


@dataclass(frozen=True)
class Node:
    """A machine of the job, and the devices (slots) that get a rank each."""

    name: str
    slots: tuple[int, ...]


def local_gpus() -> tuple[int, ...]:
    """Indices of the NVIDIA GPUs this process may use, () without any; torch is not imported."""
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return ()
    answer = _nvidia_smi("--query-gpu=index", "--format=csv,noheader")
    if answer is None:
        return ()
    present = tuple(int(line) for line in answer.split() if line.isdecimal())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    names = [name.strip() for name in visible.split(",") if name.strip()]
    names = names[: next((place for place, name in enumerate(names) if name in _NO_DEVICE), None)]
    if not all(name.isdecimal() for name in names):
        raise ConfigError(f"CUDA_VISIBLE_DEVICES={visible}: {_numbers_to_write(names)}")
    return tuple(int(name) for name in names if int(name) in present)


def _nvidia_smi(*arguments: str) -> str | None:
    """The answer of nvidia-smi; None where there is none."""
    try:
        return subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=True
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def _numbers_to_write(names: list[str]) -> str:
    """Advice for device names: the numbers of the GPUs that `nvidia-smi -L` lists under these UUIDs."""
    only = "DeepSpeed takes device numbers only"
    gpu, by_uuid = "", {}
    for line in (_nvidia_smi("-L") or "").splitlines():
        if match := re.match(r"GPU ([0-9]+):", line):
            gpu = match[1]
        if match := re.search(r"\(UUID:\s*([^)\s]+)\)", line):
            by_uuid[match[1]] = gpu
    numbers, unknown = [], []
    for name in names:
        # CUDA takes the beginning of a UUID that is long enough to mean one device.
        found = {number for uuid, number in by_uuid.items() if uuid.lower().startswith(name.lower())}
        if name.isdecimal():
            numbers.append(name)
        elif len(found) == 1:
            numbers += found
        else:
            unknown.append(name)
    if unknown:
        here = ", ".join(f"{uuid} is {number}" for uuid, number in by_uuid.items() if uuid.startswith("GPU"))
        return f"{only}, and this machine has no device {', '.join(unknown)}" + (f" ({here})" if here else "")
    parts = "" if all(not name.upper().startswith("MIG") for name in names) else " (the GPUs that hold these MIG parts)"
    return f"{only}: write CUDA_VISIBLE_DEVICES={','.join(dict.fromkeys(numbers))}{parts}"


def local_node(ranks: int | None) -> tuple[Node, bool]:
    """This machine's node and whether its ranks use GPUs: every GPU, or `CPU_RANKS` without any."""
    gpus = local_gpus()
    if ranks is not None and ranks < 1:
        raise ConfigError(f"--ranks {ranks}: at least one rank is needed")
    if not gpus:
        return Node("localhost", tuple(range(ranks or CPU_RANKS))), False
    if ranks is not None and ranks > len(gpus):
        raise ConfigError(f"--ranks {ranks}: this machine has {len(gpus)} GPU(s); set DS_ACCELERATOR=cpu for CPU ranks")
    return Node("localhost", gpus[:ranks]), True


def filter_nodes(nodes: list[Node], include: str | None, exclude: str | None) -> list[Node]:
    """Apply DeepSpeed's ``--include`` or ``--exclude`` (``host1@host2:0,2``) to `nodes`."""
    if include and exclude:
        raise ConfigError("give --include or --exclude, not both")
    option = f"--include {include}" if include else f"--exclude {exclude}"
    wanted = _parse_filter(include or exclude or "", option)
    by_name = {node.name: node for node in nodes}
    for name, slots in wanted.items():
        if name not in by_name:
            raise ConfigError(f"{option}: host {name} is not in the hostfile (it has {', '.join(by_name)})")
        unknown = sorted(slots - set(by_name[name].slots))
        if unknown:
            raise ConfigError(f"{option}: host {name} has {len(by_name[name].slots)} slots, no slot {unknown[0]}")
    if not wanted:
        return nodes
    kept = []
    for node in nodes:
        named = wanted.get(node.name)
        chosen = frozenset(node.slots) if named == frozenset() else named or frozenset()
        slots = chosen if include else frozenset(node.slots) - chosen
        if slots:
            kept.append(Node(node.name, tuple(sorted(slots))))
    if not kept:
        raise ConfigError(f"{option}: no host is left")
    return kept


def _parse_filter(text: str, option: str) -> dict[str, frozenset[int]]:
    """Host -> slots; no slots mean all of them."""
    wanted: dict[str, frozenset[int]] = {}
    for part in filter(None, text.split("@")):
        name, _, slots = part.partition(":")
        if not _HOST.fullmatch(name) or not re.fullmatch(r"([0-9]{1,6}(,[0-9]{1,6})*)?", slots):
            raise ConfigError(f"{option}: write host or host:0,2, joined by @; not `{part}`")
        wanted[name] = wanted.get(name, frozenset()) | frozenset(int(slot) for slot in slots.split(",") if slot)
    return wanted


def is_host_name(name: str) -> bool:
    """True if `name` is spelled as a host name, so that no tool can take it for an option or a command."""
    return _HOST.fullmatch(name) is not None


def is_local(name: str) -> bool:
    """True if a host name of a hostfile means this machine. Does not use the network."""
    host = os.uname().nodename
    return name in ("localhost", "127.0.0.1", host, host.partition(".")[0])
