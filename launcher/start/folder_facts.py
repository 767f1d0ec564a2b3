"""A folder as one node sees it: is it there, what is in it, how much room it has, can files be made."""

import os
import secrets
from pathlib import Path
from typing import Any


def folder_facts(path: Path) -> dict[str, Any]:
    """A folder that may not exist yet: the nearest one above it that does, its room, and whether files can be made."""
    facts: dict[str, Any] = {"path": str(path), "exists": path.exists(), "is_dir": path.is_dir(), "error": None}
    facts["readable"] = os.access(path, os.R_OK | os.X_OK) if path.is_dir() else None
    try:
        above = next(parent for parent in (path, *path.parents) if parent.exists())
        facts |= {"above": str(above), "identity": _listing(path), "hold": (path / "HOLD").exists()}
        system = os.statvfs(above)
    except OSError as error:
        return facts | {"error": error.strerror}
    facts |= {
        "free_bytes": system.f_bavail * system.f_frsize,
        "total_bytes": system.f_blocks * system.f_frsize,
        "free_inodes": system.f_favail if system.f_files else None,
        "read_only": bool(system.f_flag & os.ST_RDONLY),
        "no_exec": bool(system.f_flag & os.ST_NOEXEC),
    }
    return facts | {"write_error": try_file(above)}


def _listing(path: Path) -> str | None:
    """Names and sizes of what lies in a folder of inputs: equal where two nodes see the same."""
    if not path.is_dir() or not os.access(path, os.R_OK):
        return None
    entries = sorted((entry.name, entry.stat().st_size) for entry in path.iterdir() if entry.is_file())
    return f"{len(entries)} files, {sum(size for _, size in entries)} bytes"


def try_file(folder: Path) -> str | None:
    """Why no file can be made here: permissions, quotas, a full disk and used-up inodes all show only when one is."""
    if not folder.is_dir():
        return f"{folder} is a file"
    path = folder / f".fulltune-doctor-{secrets.token_hex(8)}"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        return error.strerror
    try:
        os.write(descriptor, b"x" * 4096)
        os.fsync(descriptor)
    except OSError as error:
        return error.strerror
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)
    return None
