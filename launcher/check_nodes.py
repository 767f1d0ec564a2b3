"""Whether the nodes of a Slurm job are alike: every node looks at itself, then one compares what they said.

``srun --ntasks-per-node=1 python -m launcher.check_nodes look [FOLDER] | python -m launcher.check_nodes compare
--nodes N``, as slurm/check_nodes.sbatch does. Imports no torch.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from launcher.check_system import missing_packages

_PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "safetensors")
_GIB = 2.0**30


def look(folder: Path | None) -> dict[str, Any]:
    """What matters of this node. `equal`: must be the same everywhere; `shown`: is only told."""
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    equal = {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "missing packages": " ".join(missing_packages()) or "none",
        "gpus": _gpus(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory["MemTotal"].split()[0]) * 1024 / _GIB),
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    if folder is not None:
        equal["folder"] = _identity(folder)
    shown = {
        "free_memory_gib": round(int(memory["MemAvailable"].split()[0]) * 1024 / _GIB, 1),
        "free_shm_gib": round(shutil.disk_usage("/dev/shm").free / _GIB, 1),  # noqa: S108
    }
    return {"node": os.environ.get("SLURMD_NODENAME", platform.node()), "equal": equal, "shown": shown}


def _gpus() -> str:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return "; ".join(done.stdout.split("\n")).strip("; ") or "none"


def _identity(folder: Path) -> str:
    """The same on two nodes only if they see the same folder: its inode and what is in it."""
    try:
        return f"{folder} inode {folder.stat().st_ino}, {sum(1 for _ in folder.iterdir())} entries"
    except OSError as error:
        return f"{folder}: {error.strerror}"


def compare(lines: Sequence[str], nodes: int) -> list[str]:
    """Print every node, and return what is wrong: one line each."""
    seen = []
    for line in lines:
        try:
            seen.append(json.loads(line))
        except ValueError:
            print(line)
    for fact in sorted(seen, key=lambda entry: str(entry["node"])):
        print(
            f"{fact['node']}: " + ", ".join(f"{key} {value}" for key, value in (fact["equal"] | fact["shown"]).items())
        )
    wrong = [] if len(seen) == nodes else [f"{len(seen)} of {nodes} nodes answered"]
    for key in seen[0]["equal"] if seen else ():
        values = {fact["node"]: fact["equal"].get(key) for fact in seen}
        if len(set(values.values())) > 1:
            wrong.append(
                f"{key} differs: " + ", ".join(f"{node} has {value}" for node, value in sorted(values.items()))
            )
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """`look` prints one line of JSON; `compare` reads such lines and ends with 0, or 78 and what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m launcher.check_nodes", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("look").add_argument("folder", type=Path, nargs="?")
    actions.add_parser("compare").add_argument("--nodes", type=int, required=True)
    arguments = parser.parse_args(argv)
    if arguments.action == "look":
        print(json.dumps(look(arguments.folder)), flush=True)
        return 0
    wrong = compare(sys.stdin.read().splitlines(), arguments.nodes)
    for line in wrong:
        print(f"fulltune: error: {line}", file=sys.stderr)
    if not wrong:
        print(f"{arguments.nodes} nodes are alike")
    return ConfigError.exit_code if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
