"""The machines for ranks: this one with its devices, or the hosts of a DeepSpeed hostfile.

DeepSpeed resolves the same things itself once it runs. They are resolved here first, without
torch, so that a plan can be shown and a mistake named before anything starts.
"""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError, MissingInputError

CPU_RANKS = 2
# What a host name may look like: names reach ssh and a remote shell through DeepSpeed, unquoted.
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,6})\s*(#.*)?")


@dataclass(frozen=True)
class Node:
    """A machine of the job, and the devices (slots) that get a rank each."""

    name: str
    slots: tuple[int, ...]


def local_gpus() -> tuple[int, ...]:
    """Indices of the NVIDIA GPUs this process may use, () without any; torch is not imported."""
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return ()
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    present = tuple(int(line) for line in answer.stdout.split())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if not all(name.isdecimal() for name in names):
        raise ConfigError(f"CUDA_VISIBLE_DEVICES={visible}: write device numbers, DeepSpeed cannot take names")
    return tuple(int(name) for name in names if int(name) in present)


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


def read_hostfile(path: Path) -> list[Node]:
    """The hosts of a hostfile (``name slots=N`` a line), in its order. ConfigError names the line."""
    try:
        return parse_hostfile(path.read_text(encoding="utf-8"), path)
    except (FileNotFoundError, IsADirectoryError):
        raise MissingInputError(f"--hostfile {path}: no such file") from None


def parse_hostfile(text: str, path: Path) -> list[Node]:
    """The hosts in the text of a hostfile; `path` is for messages."""
    nodes: dict[str, Node] = {}
    for number, line in enumerate(text.split("\n"), start=1):  # as DeepSpeed does; splitlines knows other line ends
        if not line.strip() or line.strip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None or not _HOST.fullmatch(match[1]) or int(match[2]) < 1:
            raise ConfigError(f"{path}:{number}: write `host slots=N`, not `{line.strip()}`")
        if match[1] in nodes:
            raise ConfigError(f"{path}:{number}: host {match[1]} is given twice")
        nodes[match[1]] = Node(match[1], tuple(range(int(match[2]))))
    if not nodes:
        raise ConfigError(f"{path}: names no host; write lines such as `worker-0 slots=8`")
    return list(nodes.values())


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
