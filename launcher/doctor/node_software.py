"""Facts about a node's software, without importing it: versions, compiled ops, NVIDIA's tools, network links."""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import engine
from engine.zero.prebuild import broken_locks, extensions_dir, missing_ops
from launcher.check_system import missing_optional_packages, missing_packages
from launcher.start.folder_facts import try_file

#: The packages whose versions decide what a run does.
PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "safetensors", "tokenizers", "pydantic")
_OURS = ("data_prep", "engine", "launcher")
_GPU_FIELDS = (
    "index", "name", "memory.total", "memory.used", "driver_version", "compute_cap", "pcie.link.gen.max",
    "pcie.link.width.max", "ecc.errors.uncorrected.volatile.total",
)  # fmt: skip


def version_facts() -> dict[str, Any]:
    """Versions by name, None for what is not installed. `fulltune` is a digest of this very source."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions | {"torch CUDA": _torch_cuda(), "fulltune": _source_digest()}


def _torch_cuda() -> str | None:
    """The CUDA version that torch was built for, from its own version file."""
    with contextlib.suppress(OSError, ImportError, ValueError):
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.origin is not None:
            text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
            found = re.search(r"^cuda\b[^=]*= *'([\d.]+)'", text, re.MULTILINE)
            return found[1] if found else None
    return None


def _source_digest() -> str:
    root = Path(engine.__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for package in _OURS for path in (root / package).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def op_facts(uses_nvme: bool) -> dict[str, Any]:
    """DeepSpeed's ops: which are compiled, what compiling needs and is not here, locks that builds left."""
    try:
        folder = extensions_dir()
    except importlib.metadata.PackageNotFoundError:
        return {"folder": None}  # the check of the packages reports it
    above = next(path for path in (folder, *folder.parents) if path.exists())
    uses_gpus = bool(accelerator_facts()["gpus"]) and os.environ.get("DS_ACCELERATOR") != "cpu"
    return {
        "folder": str(folder),
        "missing": missing_ops(folder, uses_gpus, uses_nvme),
        "broken_locks": [str(path) for path in broken_locks(folder)],
        "packages": missing_packages() + (missing_optional_packages() if uses_nvme else []),
        "has_ninja": importlib.util.find_spec("ninja") is not None or shutil.which("ninja") is not None,
        "write_error": try_file(above),
        "no_exec": bool(os.statvfs(above).f_flag & os.ST_NOEXEC),
    }


def accelerator_facts() -> dict[str, Any]:
    """NVIDIA's GPUs as nvidia-smi lists them, its error if it fails, and the CUDA compiler.

    `devices` is the number of device files: more than nvidia-smi lists when the driver is broken.
    """
    devices = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdecimal()])
    facts: dict[str, Any] = {"gpus": [], "error": None, "devices": devices, "nvcc": _nvcc()}
    query = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return facts | {"error": "nvidia-smi is not installed" if devices else None}
    except (OSError, subprocess.SubprocessError) as error:
        return facts | {"error": str(error)}
    if done.returncode:
        return facts | {"error": " ".join((done.stdout + done.stderr).split())[:200]}
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    names = [field.partition(".")[0] if field.startswith("ecc") else field for field in _GPU_FIELDS]
    return facts | {"gpus": [dict(zip(names, row, strict=False)) for row in rows]}


def _nvcc() -> str | None:
    """The release of the CUDA compiler that torch would take."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    program = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found[1] if found else None


def link_facts() -> dict[str, Any]:
    """Network links by their own account: the default route's, in Mbit/s, and InfiniBand ports, in Gbit/s."""
    infiniband: dict[str, float] = {}
    for port in Path("/sys/class/infiniband").glob("*/ports/*"):
        with contextlib.suppress(OSError, ValueError):
            is_active = "ACTIVE" in (port / "state").read_text(encoding="ascii")
            rate = float((port / "rate").read_text(encoding="ascii").split()[0])
            infiniband[f"{port.parent.parent.name}/{port.name}"] = rate if is_active else 0.0
    return {"ethernet_mbit": _route_speed(), "infiniband_gbit": infiniband}


def _route_speed() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]:
            interface, destination = line.split()[:2]
            if destination == "00000000":
                speed = int(Path(f"/sys/class/net/{interface}/speed").read_text(encoding="ascii"))
                return speed if speed > 0 else None
    return None
