"""What this rank is doing, in one page of a mapped file that a supervisor reads also while the rank is stuck.

A process has one page, so it is kept here, as a log is; before `open_page` everything else does
nothing but remember. All ranks beat at the same places of the program, so the rank with the lowest
count is the one that the others wait for. Imports without torch.
"""

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.file_modes import FILE_MODE

_LAYOUT = struct.Struct("<8sQQQd32s64s")
_MAGIC = b"fulltune"


@dataclass(frozen=True)
class Beat:
    """A rank's page: how many signs of life so far, in which phase and step, and how long the last step took."""

    pid: int
    count: int
    step: int
    step_seconds: float
    phase: str
    activity: str


_page: mmap.mmap | None = None
_now = Beat(os.getpid(), 0, 0, 0.0, "start", "")


def page_path(run_dir: Path, rank: int) -> Path:
    """Where the page of a rank lies."""
    return run_dir / "ranks" / f"beat-{rank:05d}"


def open_page(path: Path) -> None:
    """From now on this process's signs of life are in the file `path`. OSError if it cannot be made."""
    global _page
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, FILE_MODE)
    try:
        os.write(descriptor, bytes(_LAYOUT.size))  # a hole in a full disk would end us with SIGBUS later
        _page = mmap.mmap(descriptor, _LAYOUT.size)
    finally:
        os.close(descriptor)
    _publish(_now)


def enter(phase: str, step: int | None = None) -> None:
    """A new phase of the run begins, with a time limit of its own; `step` when it is known."""
    _publish(Beat(os.getpid(), _now.count + 1, _now.step if step is None else step, _now.step_seconds, phase, ""))


@contextlib.contextmanager
def during(phase: str) -> Iterator[None]:
    """Within the block the run is in `phase`, and then again in its step; an error leaves the phase as it is."""
    enter(phase)
    yield
    enter("step")


def beat(activity: str) -> None:
    """A sign of life inside a phase."""
    _publish(Beat(_now.pid, _now.count + 1, _now.step, _now.step_seconds, _now.phase, activity))


def end_step(step: int, seconds: float) -> None:
    """Step number `step` is done and took `seconds`: what a hang is measured against."""
    _publish(Beat(_now.pid, _now.count + 1, step, seconds, _now.phase, "after the step"))


def current() -> Beat:
    """The last sign of life of this process."""
    return _now


def flush() -> None:
    """Send the page to storage, for readers on other machines."""
    if _page is not None:
        _page.flush()


def read_page(path: Path) -> Beat | None:
    """The page of another process; None if there is none."""
    try:
        magic, count, step, pid, seconds, phase, activity = _LAYOUT.unpack(path.read_bytes())
    except (OSError, struct.error):
        return None
    if magic != _MAGIC:
        return None
    return Beat(pid, count, step, seconds, _text(phase), _text(activity))


def _publish(now: Beat) -> None:
    global _now
    _now = now
    if _page is not None:
        phase, activity = now.phase.encode()[:32], now.activity.encode()[:64]
        _LAYOUT.pack_into(_page, 0, _MAGIC, now.count, now.step, now.pid, now.step_seconds, phase, activity)


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")
