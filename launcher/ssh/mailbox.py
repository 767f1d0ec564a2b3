"""Files in the run folder through which a supervisor and the parents of ranks on several hosts reach one another.

``ranks/supervisor`` and ``ranks/alive-00000`` are heartbeats: a job's token and a number that grows while the writer
lives. ``ranks/stop`` and ``ranks/leave`` are requests: each holds the token of the job that it is for.
Files are opened anew at every look, so that a network file system shows what others wrote.
"""

import contextlib
import os
from pathlib import Path

#: The supervisor's last heartbeat, in place of a number.
OVER = "over"


def killed_path(run_dir: Path, rank: int) -> Path:
    """The parent's note of the signal that ended a rank."""
    return run_dir / "ranks" / f"killed-{rank:05d}.json"


def alive_path(run_dir: Path, rank: int) -> Path:
    """The heartbeat of a rank's parent, which means that both live."""
    return run_dir / "ranks" / f"alive-{rank:05d}"


def supervisor_path(run_dir: Path) -> Path:
    """The heartbeat of the supervisor."""
    return run_dir / "ranks" / "supervisor"


def write_heartbeat(path: Path, token: str, what: str | int) -> None:
    """Write a heartbeat; a full or broken disk is no error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.write_text(f"{token} {what}\n", encoding="utf-8")
        temporary.replace(path)


def read_heartbeat(path: Path) -> tuple[str, str]:
    """The token and the last number or word; two empty strings without a heartbeat."""
    try:
        token, _, what = path.read_text(encoding="utf-8").strip().partition(" ")
    except OSError:
        return "", ""
    return token, what


def request(run_dir: Path, what: str, token: str) -> None:
    """Request `stop` (save a checkpoint and end), `leave` (end at once) or `dump` (stacks) from ranks of all hosts."""
    path = run_dir / "ranks" / what
    temporary = path.with_name(f".{what}.{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.write_text(token, encoding="utf-8")
        temporary.replace(path)


def is_requested(run_dir: Path, what: str, token: str) -> bool:
    """True if this was requested from the job with this token."""
    try:
        return (run_dir / "ranks" / what).read_text(encoding="utf-8") == token
    except OSError:
        return False
