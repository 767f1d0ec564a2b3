"""A run's checkpoints while it trains: begun after a step, published before the next update, checked, pruned.

All ranks call every method together but `take_stall_seconds` and `is_verifying`.
"""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.checkpoint.retention import check_space, checkpoint_bytes, mark_best, prune_checkpoints, remove_checkpoint
from engine.checkpoint.save import Owner, PendingSave, begin_save, finish_save
from engine.config import CheckpointSection
from engine.errors import DataError, StorageError
from engine.ranks.agreement import agree, from_rank_0, this_rank
from engine.tensor_files.reader import FileRecord, drop_cache, verify_blocks
from engine.zero.zero_model import ZeroModel

_LOG = logging.getLogger(__name__)
#: Saves that may fail one after the other before a run that could lose everything ends.
MAX_FAILED_SAVES = 3
#: What a save is taken to write a second, all ranks together, until one has been measured: a slow network disk.
_PRESUMED_BYTES_PER_SECOND = 200e6


@dataclass(frozen=True)
class Best:
    """The evaluation that makes a checkpoint the best one."""

    metric: str
    value: float


class Saves:
    """Writes a run's checkpoints in the shadow of the next step and keeps the right ones.

    A save that fails (full disk, damaged on the way) is said and the run goes on with the
    checkpoints it has; the third in a row, or one that is asked for by `save_now`, is a StorageError.
    """

    def __init__(
        self,
        zero: ZeroModel,
        run_dir: Path,
        owner: Owner,
        section: CheckpointSection,
        say: Callable[[str], None] = lambda _line: None,
    ):
        self._zero = zero
        self._run_dir = run_dir
        self._owner = owner
        self._section = section
        self._say = say
        self._pending: tuple[PendingSave, Best | None, float] | None = None
        self._verifying: tuple[Path, Future[None]] | None = None
        self._failed = 0
        self._state: dict[str, Any] = {}  # of what is being written
        self._committed: dict[str, Any] = {}  # of what was published last
        self._stall_seconds = 0.0
        self._write_seconds = 0.0

    def check_space_for_run(self, remaining_saves: int) -> None:
        """StorageError unless the checkpoints that this run will keep at one time fit; ask before the first step."""
        if remaining_saves == 0:
            return
        kept = self._section.keep_checkpoints + int(self._section.save_best) + 1
        from_rank_0(lambda: check_space(self._folder, self._bytes, min(remaining_saves, kept)))

    def begin(self, state: Mapping[str, Any], best: Best | None = None) -> None:
        """Start to write a checkpoint of `state` (see `begin_save`); a thread does it while training goes on."""
        started = time.perf_counter()
        self._begin(state, best, must_succeed=False)
        self._stall_seconds += time.perf_counter() - started

    def save_now(self, state: Mapping[str, Any], best: Best | None = None) -> None:
        """Publish a checkpoint of `state` before anything else happens; StorageError when that fails.

        What is already written, or being written, is not written again.
        """
        self._finish(must_succeed=False)
        if dict(state) == self._committed:
            return
        self._begin(state, best, must_succeed=True)
        self._finish(must_succeed=True)

    def before_update(self, all_verified: bool) -> None:
        """Publish what is being written: the next update would change what is still read.

        `all_verified` says that `is_verifying` was false on every rank.
        """
        started = time.perf_counter()
        if all_verified:
            self._conclude()
        self._finish(must_succeed=False)
        self._stall_seconds += time.perf_counter() - started

    def close(self, verify: bool) -> None:
        """Publish what is being written; with `verify` also read it back and prune."""
        self._finish(must_succeed=False)
        if verify:
            self._conclude()

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint has begun that is not published yet; the same on all ranks."""
        return self._pending is not None

    @property
    def is_verifying(self) -> bool:
        """Whether this rank still reads back what it wrote last."""
        return self._verifying is not None and not self._verifying[1].done()

    @property
    def save_seconds(self) -> float:
        """What this rank's part of a save takes: the longest measured so far, before that presumed."""
        return self._write_seconds or self._bytes / _PRESUMED_BYTES_PER_SECOND

    def check_owner(self) -> None:
        """Raise what the run folder's owner check raises, when a newer start of the run has taken it over."""
        self._owner.check()

    def take_stall_seconds(self) -> float:
        """Seconds that training has stood still for saves since the last call."""
        seconds, self._stall_seconds = self._stall_seconds, 0.0
        return seconds

    @property
    def _folder(self) -> Path:
        return self._run_dir / "checkpoints"

    @property
    def _bytes(self) -> int:
        return checkpoint_bytes(self._zero.parameters, self._zero.buffers)

    def _begin(self, state: Mapping[str, Any], best: Best | None, must_succeed: bool) -> None:
        self._finish(must_succeed=False)
        if not must_succeed:
            self._conclude()  # the one before the last stays until the last one is verified
        try:
            from_rank_0(lambda: check_space(self._folder, self._bytes, 1))
            pending = begin_save(self._zero, self._run_dir, state, self._owner)
        except StorageError as error:
            self._failed_once_more(error, must_succeed)
            return
        started = time.perf_counter()
        pending.records.add_done_callback(partial(self._note_written, started))
        self._pending = pending, best, started
        self._state = dict(state)

    def _note_written(self, started: float, _records: Future[list[FileRecord]]) -> None:
        self._write_seconds = max(self._write_seconds, time.perf_counter() - started)

    def _finish(self, must_succeed: bool) -> None:
        if self._pending is None:
            return
        (pending, best, started), self._pending = self._pending, None
        waited = time.perf_counter()
        try:
            path, records = finish_save(pending)
            if best is not None:
                mark_best(self._run_dir, path, best.metric, best.value)
        except StorageError as error:
            self._failed_once_more(error, must_succeed)
            return
        self._failed = 0
        self._committed = self._state
        now = time.perf_counter()
        self._say(
            f"checkpoint {path.name} committed after {now - started:.1f} s, {now - waited:.1f} s of them waited for"
        )
        if must_succeed:
            self._verifying = None  # who asked for this one may not have the time; nothing is pruned for now
        self._conclude()
        pool = ThreadPoolExecutor(1, thread_name_prefix="verify")
        self._verifying = path, pool.submit(_read_back, path, records)
        pool.shutdown(wait=False)

    def _conclude(self) -> None:
        """When the last checkpoint has been read back: prune, or remove it if it is not what was written."""
        if self._verifying is None:
            return
        (path, verdict), self._verifying = self._verifying, None
        from_rank_0(self._owner.check)  # what a newer start has made of the folder is not ours to remove
        try:
            agree(verdict.result)
        except DataError as error:
            from_rank_0(partial(remove_checkpoint, path))
            self._failed_once_more(StorageError(f"{error}; this checkpoint was removed"), must_succeed=False)
            return
        prune_checkpoints(
            self._run_dir, self._section.keep_checkpoints, archive_every_steps=self._section.archive_every_steps
        )

    def _failed_once_more(self, error: StorageError, must_succeed: bool) -> None:
        self._failed += 1
        if must_succeed or self._failed >= MAX_FAILED_SAVES:
            raise error
        if this_rank() == 0:
            _LOG.warning("NOT SAVED (failure %d of %d): %s; training goes on", self._failed, MAX_FAILED_SAVES, error)


def _read_back(path: Path, records: list[FileRecord]) -> None:
    """Compare this rank's files with their hashes, from the disk and not from memory."""
    for record in records:
        drop_cache(path / record.name)
        verify_blocks(path / record.name, record)
