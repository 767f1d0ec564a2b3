"""The run folder and its one owner: a job holds it, and a stale writer cannot publish."""

import errno
import fcntl
import json
import os
import secrets
import socket
from pathlib import Path
from typing import IO

from engine.checkpoint.format import known_run_id
from engine.errors import CannotWriteError
from engine.file_modes import refuse_foreign
from engine.ranks.rank_record import write_json
from engine.ranks.stop import check_not_held


class RunFolder:
    """The run folder and the right to write into it: one owner at a time.

    A lock held by rank 0 keeps a second job on this file system out while this one lives; the
    generation in owner.json, raised at every start, keeps a stale writer from publishing after a
    newer one has begun.
    """

    def __init__(self, path: Path, rank: int, share_with_group: bool = False):
        self.path = path
        self._rank = rank
        self._share_with_group = share_with_group
        self._lock: IO[str] | None = None
        #: Of rank 0, which alone writes them down: how often the run was started, and which run it is.
        self.generation = 0
        self.run_id = ""

    def own(self) -> None:
        """Take ownership (rank 0 does; others have nothing to do). CannotWriteError when it is taken.

        RefusedForSecurityError as `refuse_foreign` does.
        """
        if self._rank != 0:
            return
        refuse_foreign(self.path, self._share_with_group)
        check_not_held(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "owner.lock").open("a+")
        except OSError as error:
            raise CannotWriteError(f"run_dir: cannot write into {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = self._owner()
            raise CannotWriteError(
                f"run_dir: {self.path} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}: "
                "wait for it, stop it, or choose another run_dir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise CannotWriteError(f"run_dir: cannot lock {self.path}: {error.strerror}") from error
            # No locks on this file system: the generation below still keeps a stale writer out.
            print(f"warning: {self.path} lies on a file system without locks: start one job at a time", flush=True)
        self._lock = lock
        self.generation = int(self._owner().get("generation", 0)) + 1
        self.run_id = self.recorded_run_id() or known_run_id(self.path) or secrets.token_hex(8)
        try:
            self._write_owner()
        except OSError as error:
            raise CannotWriteError(f"run_dir: cannot write into {self.path}: {error.strerror}") from error

    def recorded_run_id(self) -> str:
        """Which run this folder is of, by what it says itself; "" for a new one."""
        return str(self._owner().get("run_id", ""))

    def begin_new_run(self) -> None:
        """From now on checkpoints are those of another run. Rank 0 decides."""
        if self._rank == 0:
            self.run_id = secrets.token_hex(8)
            self._write_owner()

    def _write_owner(self) -> None:
        write_json(
            self.path / "owner.json",
            {"run_id": self.run_id, "generation": self.generation, "pid": os.getpid(), "host": socket.gethostname()},
        )

    def check_owner(self) -> None:
        """CannotWriteError when a newer job has taken the folder over. Rank 0 decides."""
        if self._rank == 0 and int(self._owner().get("generation", 0)) != self.generation:
            raise CannotWriteError(f"run_dir: {self.path} was taken over by a newer job; this one may not publish")

    def _owner(self) -> dict[str, int | str]:
        try:
            values = json.loads((self.path / "owner.json").read_text())
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}
