"""Processes of this machine as /proc shows them, and the end of a whole session of them."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

_POLL_SECONDS = 0.1
_UNKILLABLE_SECONDS = 30.0
_EXIT_CODE_FIELD = 49  # of those after the name


def stat_fields(pid: int) -> list[str]:
    """State, parent, group, session, ... of a process; [] if it is gone."""
    try:
        # "pid (name) state ppid ...": the name may hold anything, also blanks and parentheses.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def state_of(pid: int) -> str:
    """The kernel's letter for what a process does (R, S, D, T, ...); "" if it is gone or a zombie."""
    fields = stat_fields(pid)
    return fields[0] if fields and fields[0] not in "ZX" else ""


def is_running(pid: int) -> bool:
    """True if the process exists and is no zombie."""
    return bool(state_of(pid))


def death_signal(pid: int) -> int | None:
    """The signal that ended a process whose parent has not yet read its status; None if no signal did."""
    fields = stat_fields(pid)
    is_zombie = len(fields) > _EXIT_CODE_FIELD and fields[0] == "Z"
    return int(fields[_EXIT_CODE_FIELD]) & 0x7F or None if is_zombie else None


def session_members(session: int) -> list[int]:
    """Living processes of a session."""
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        fields = stat_fields(int(folder.name))
        if fields and int(fields[3]) == session and fields[0] not in "ZX":
            members.append(int(folder.name))
    return members


def session_and_children(session: int) -> list[int]:
    """Living processes of a session and those that they have started: pdsh gives every ssh a session of its own."""
    parents = {int(folder.name): stat_fields(int(folder.name)) for folder in Path("/proc").glob("[0-9]*")}
    living = {pid: fields for pid, fields in parents.items() if fields and fields[0] not in "ZX"}
    members = {pid for pid, fields in living.items() if int(fields[3]) == session}
    return sorted(members | {pid for pid, fields in living.items() if int(fields[1]) in members})


def signal_processes(pids: list[int], number: int) -> None:
    """Send a signal to those that still exist."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def end_processes(
    members: Callable[[], list[int]], request_end: Callable[[], None], grace_seconds: Callable[[], float]
) -> list[int]:
    """Call `request_end`; send KILL to all `members` that are left after the grace period; wait for their end.

    All three are called again and again: processes may still start others, and the grace may be cut
    short. Returns the processes that even KILL does not end, because the kernel waits for a disk that does not answer.
    """
    began, killed = time.monotonic(), 0.0
    while living := members():
        now = time.monotonic()
        if now - began < grace_seconds():
            request_end()
        elif killed and now - killed >= _UNKILLABLE_SECONDS:
            return living
        else:
            killed = killed or now
            signal_processes(living, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    return []
