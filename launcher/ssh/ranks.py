"""Ranks that ssh started on the hosts of a hostfile, as their supervisor sees them: by ssh, and in the run folder.

An ssh connection that has ended means that the host is gone, or that all is over there. The heartbeats that the ranks'
parents write (see launcher.ssh.rank_parent) show which ranks live. A rank is lost only when both are missing: a network
disk may stand still for longer than ssh, and a connection may break alone.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher.job.hosts import Node
from launcher.job.processes import session_and_children
from launcher.job.records import read_exits
from launcher.ssh.mailbox import (
    OVER,
    alive_path,
    killed_path,
    read_heartbeat,
    request,
    supervisor_path,
    write_heartbeat,
)

#: Added to pdsh's ssh: no questions, and a host that no longer answers is found within 9 s.
SSH_OPTIONS = "-oBatchMode=yes -oServerAliveInterval=3 -oServerAliveCountMax=2"
# A rank is taken for lost after so long without a sign of life, when ssh to its host has ended too.
_LOST_SECONDS = 5.0
# After a request to leave, ranks and their launchers on all hosts get this long to be gone.
_LEAVE_SECONDS = 10.0
# What a failing rank wrote and what another one's death looks like may be seen in either order.
_SAME_MOMENT_SECONDS = 2.0
# Nobody is lost because the supervisor, or the whole machine, stood still.
_LONGEST_LOOK_SECONDS = 1.0
_POLL_SECONDS = 0.2


class SshRanks:
    """All ranks of a job over ssh, also those of this machine: ssh starts them too."""

    def __init__(self, run_dir: Path, token: str, nodes: Sequence[Node]):
        self._run_dir = run_dir
        self._token = token
        #: The host of each rank, as the hostfile names it.
        self.hosts = [node.name for node in nodes for _ in node.slots]
        #: Ranks that a signal ended which nobody here had sent: the signal's number.
        self.killed: dict[int, int] = {}
        #: Ranks that are gone with their host, or never came up there.
        self.lost: set[int] = set()
        #: Hosts that ssh has lost although ranks there live: then all ranks are to stop.
        self.cut_off: list[str] = []
        self._count = 0
        self._looked: float | None = None
        self._last_beats: dict[int, str] = {}
        self._silent_seconds = dict.fromkeys(range(len(self.hosts)), 0.0)
        self._connected: set[str] = set()
        self._disconnected: set[str] = set()
        self._ended: set[int] = set()
        self._beat()

    def look(self, process: "subprocess.Popen[bytes]") -> None:
        """Look once at all hosts and ranks of a job, and write the supervisor's heartbeat for the ranks' parents.

        `process` is DeepSpeed's runner, in a session of its own.
        """
        now = time.monotonic()
        passed = 0.0 if self._looked is None else min(now - self._looked, _LONGEST_LOOK_SECONDS)
        self._looked = now
        self._beat()
        found = _hosts_of_ssh(session_and_children(process.pid), set(self.hosts))
        self._connected |= found
        # A host without ssh may still get one, as long as the runner lives.
        self._disconnected = (self._connected if process.poll() is None else set(self.hosts)) - found
        for rank in self._silent_seconds:
            token, what = read_heartbeat(alive_path(self._run_dir, rank))
            if token == self._token and what != self._last_beats.get(rank):
                self._last_beats[rank], self._silent_seconds[rank] = what, 0.0
            else:
                self._silent_seconds[rank] += passed
        self._ended = set(read_exits(self._run_dir)) | self._read_killed()
        self._find_lost()

    def _beat(self) -> None:
        self._count += 1
        write_heartbeat(supervisor_path(self._run_dir), self._token, self._count)

    def _read_killed(self) -> set[int]:
        """Ranks that a signal ended, by the notes of their parents."""
        found = set()
        for rank in self._silent_seconds:
            with contextlib.suppress(OSError, ValueError):
                note = json.loads(killed_path(self._run_dir, rank).read_text(encoding="utf-8"))
                found.add(rank)
                if not note["asked"]:
                    self.killed[rank] = int(note["signal"])
        return found

    def _find_lost(self) -> None:
        """Note the ranks that are gone with their host. If ssh has lost a host with living ranks, request a stop."""
        gone = [rank for rank in self._unended() if self.hosts[rank] in self._disconnected]
        self.lost |= {rank for rank in gone if self._silent_seconds[rank] >= _LOST_SECONDS}
        alive = [rank for rank in gone if rank in self._last_beats and rank not in self.lost]
        if alive and not self.cut_off:
            self.cut_off = sorted({self.hosts[rank] for rank in alive})
            hosts = ", ".join(self.cut_off)
            print(f"fulltune: ssh to {hosts} has ended: ranks save a checkpoint and end", file=sys.stderr, flush=True)
            self.request("stop")

    def _unended(self) -> list[int]:
        return [rank for rank in self._silent_seconds if rank not in self._ended]

    def request(self, what: str) -> None:
        """Send `stop` or `leave` to all ranks."""
        request(self._run_dir, what, self._token)

    def has_come_up(self, rank: int) -> bool:
        """True once the rank has come up."""
        return rank in self._last_beats

    def end(self, process: "subprocess.Popen[bytes]", grace_seconds: Callable[[], float]) -> None:
        """Make the ranks on all hosts end, with time to save if there is any grace, and wait for their end.

        `process` gets no signal: DeepSpeed would end every job that this user has on those hosts.
        """
        began, left = time.monotonic(), 0.0
        self.request("stop")
        while True:
            now = time.monotonic()
            self.look(process)
            if not left and now - began >= grace_seconds():
                left = now
                self.request("leave")
            is_connected = bool(self._connected - self._disconnected)
            awaited = [rank for rank in self._unended() if self._silent_seconds[rank] < _LOST_SECONDS]
            if (not is_connected and not awaited) or (left and now - left >= _LEAVE_SECONDS):
                break
            time.sleep(_POLL_SECONDS)
        write_heartbeat(supervisor_path(self._run_dir), self._token, OVER)  # what comes up late leaves at once

    def silent_since(self, failed_since: float | None) -> set[int]:
        """Ranks that do not answer, and did not any more when the first failure was seen (of `time.monotonic`)."""
        if failed_since is None:
            return set()
        limit = time.monotonic() - failed_since - _SAME_MOMENT_SECONDS
        return {rank for rank in self._unended() if rank in self._last_beats and self._silent_seconds[rank] >= limit}


def _hosts_of_ssh(pids: Sequence[int], hosts: set[str]) -> set[str]:
    """The hosts that the ssh processes among `pids` lead to."""
    found: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
            if Path(words[0]).name == "ssh":
                found |= hosts & {word.rpartition("@")[2] for word in words[1:]}
    return found
