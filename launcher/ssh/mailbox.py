"""What a supervisor and the parents of ranks on several hosts say to one another, in files of the run folder.

``ranks/supervisor`` and ``ranks/alive-00000`` hold a job's token and a number that grows for as long
as their writer lives; ``ranks/stop`` and ``ranks/leave`` hold the token of the job that they are for.
Files are opened anew at every look, so that a network file system shows what others wrote.
"""

import contextlib
import os
from pathlib import Path

#: What the supervisor says last, instead of a number.
OVER = "over"


def killed_path(run_dir: Path, rank: int) -> Path:
    """Where the parent of a rank notes that a signal ended it."""
    return run_dir / "ranks" / f"killed-{rank:05d}.json"


def alive_path(run_dir: Path, rank: int) -> Path:
    """Where the parent of a rank says that both live."""
    return run_dir / "ranks" / f"alive-{rank:05d}"


def supervisor_path(run_dir: Path) -> Path:
    """Where the supervisor says that it lives."""
    return run_dir / "ranks" / "supervisor"


def say(path: Path, token: str, what: str | int) -> None:
    """Write a sign of life; a full or broken disk ends nobody."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.write_text(f"{token} {what}\n", encoding="utf-8")
        temporary.replace(path)


def heard(path: Path) -> tuple[str, str]:
    """The token and what was said last; empty strings if nothing was."""
    try:
        token, _, what = path.read_text(encoding="utf-8").strip().partition(" ")
    except OSError:
        return "", ""
    return token, what


def tell(run_dir: Path, what: str, token: str) -> None:
    """`stop` (save a checkpoint and end), `leave` (at once) or `dump` (stacks), to ranks of other hosts."""
    path = run_dir / "ranks" / what
    temporary = path.with_name(f".{what}.{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.write_text(token, encoding="utf-8")
        temporary.replace(path)


def is_told(run_dir: Path, what: str, token: str) -> bool:
    """Whether the job with this token was told so."""
    try:
        return (run_dir / "ranks" / what).read_text(encoding="utf-8") == token
    except OSError:
        return False
