"""Runs a command and says what it took: CPU seconds and peak memory of all its processes."""

import ctypes
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Usage:
    """What a command took with all processes it started, and the JSON object of its last line."""

    cpu_seconds: float
    wall_seconds: float
    peak_mb: float  # of its largest process
    output: Any


def run(command: list[str]) -> Usage:
    """Run `command` to its end. SystemExit with its last lines if it fails.

    This process adopts what the command leaves behind, so that nothing it started goes uncounted.
    Linux only; the caller has no other children meanwhile.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    settings = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "",  # compiled once, as in any installation
    }
    # Installed programs are compiled once, not at every start.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | settings
    cpu = peak = 0.0
    code = 0
    with tempfile.TemporaryFile() as standard, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=standard, stderr=errors, env=environment)
        wall = None
        while True:
            try:
                process, status, usage = os.wait4(-1, 0)
            except ChildProcessError:
                break
            if process == child.pid:
                wall, code = time.perf_counter() - started, os.waitstatus_to_exitcode(status)
                child.returncode = code
            cpu += usage.ru_utime + usage.ru_stime
            peak = max(peak, usage.ru_maxrss * 1024 / 1e6)
        standard.seek(0)
        errors.seek(0)
        text, complaint = standard.read().decode(), errors.read().decode()
    if code:
        sys.stderr.write(f"{complaint[-3000:]}\n")
        raise SystemExit(f"ended with {code}: {' '.join(command)}\n{text[-1000:]}")
    assert wall is not None
    return Usage(cpu, wall, peak, json.loads(text.splitlines()[-1]))


def store_bytes(store: Path) -> int:
    """Bytes of a token store without its pack plan and its copy of the tokenizer."""
    return sum(path.stat().st_size for path in store.iterdir() if path.is_file() and not path.name.startswith("rows_"))


def same_files(folders: list[Path]) -> bool:
    """Whether all folders hold files of the same names and bytes."""
    return len({_content(folder) for folder in folders}) == 1


def _content(folder: Path) -> str:
    names = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in names]
    return "\n".join(lines)
