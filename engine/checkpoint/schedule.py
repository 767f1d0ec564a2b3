"""A run's checkpoints while it trains: begun after a step, published before the next update, checked, pruned.

All ranks call every method together but `take_stall_seconds` and `is_verifying`.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from engine.arithmetic import STATE_BYTES_PER_PARAMETER, list_checkpoints, step_of
from engine.checkpoint.format import best_checkpoint
from engine.checkpoint.save import Owner, PendingSave, begin_save, finish_save, replace_text
from engine.errors import DataError, StorageError
from engine.ranks.agreement import agree, from_rank_0, this_rank
from engine.sections import CheckpointSection
from engine.tensor_files.reader import FileRecord, drop_cache, verify_blocks
from engine.zero.zero_model import ZeroModel

_LOG = logging.getLogger(__name__)
_GIB = 2.0**30
_FILES = 64  # some headers, manifests and folders; far below what any file system has left in good health
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
        """True if a checkpoint has begun that is not published yet; the same on all ranks."""
        return self._pending is not None

    @property
    def is_verifying(self) -> bool:
        """True if this rank still reads back what it wrote last."""
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


def checkpoint_bytes(parameters: Mapping[str, Parameter], buffers: Mapping[str, Tensor]) -> int:
    """The bytes of one checkpoint on the disk: 12 bytes a trained parameter, frozen ones and buffers as they are.

    No communication.
    """
    whole: list[Any] = list(parameters.values())
    total = sum(buffer.nbytes for buffer in buffers.values())
    for parameter in whole:
        count = getattr(parameter, "ds_numel", parameter.numel())
        total += count * (STATE_BYTES_PER_PARAMETER if parameter.requires_grad else parameter.element_size())
    return total + 2**20 + 400 * (len(whole) + len(buffers))


def check_space(folder: Path, needed_bytes: int, count: int) -> None:
    """StorageError unless `count` checkpoints of `needed_bytes` fit beside or in place of what is in `folder`.

    One process calls it. Checkpoints that are there already count as room for one each.
    """
    parent = next(path for path in (folder, *folder.parents) if path.is_dir())
    system = os.statvfs(parent)
    free = system.f_bavail * system.f_frsize
    missing = max(1, count - (len(list_checkpoints(folder.parent)) if count > 1 else 0))
    if free < missing * needed_bytes:
        raise StorageError(
            f"{folder}: {missing} checkpoint{'s' if missing > 1 else ''} of {needed_bytes / _GIB:.2f} GiB "
            f"do not fit: {free / _GIB:.2f} GiB are free; make room, lower checkpoint.keep_checkpoints, or choose "
            "another run_dir"
        )
    if system.f_files and system.f_favail < _FILES:
        raise StorageError(f"{folder}: the file system has only {system.f_favail} inodes left; remove files from it")


def prune_checkpoints(
    run_dir: Path, keep: int, protect: Iterable[Path] = (), archive_every_steps: int | None = None
) -> None:
    """Remove all but the newest `keep` checkpoints, those in `protect`, the best one, and each archived one.

    Archived are the steps that `archive_every_steps` divides. Checkpoints newer than the last
    committed one were refused at a resume; they neither count nor go.
    """
    protected = {path.name for path in protect}

    def prune() -> None:
        folder = run_dir / "checkpoints"
        best = best_checkpoint(run_dir)
        latest = folder / "latest"
        last_step = step_of(latest.read_text().strip()) if latest.is_file() else None
        committed = [path for path in list_checkpoints(run_dir) if last_step is None or step_of(path.name) <= last_step]
        for path in committed[: max(0, len(committed) - keep)]:
            archived = archive_every_steps is not None and step_of(path.name) % archive_every_steps == 0
            if not archived and path.name not in protected and path != best:
                remove_checkpoint(path)

    from_rank_0(prune)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint. One process calls it; what cannot be deleted now, the next save deletes."""
    try:
        # Under another name first: half a checkpoint must not look like one.
        shutil.rmtree(path.rename(path.with_name(f".tmp-pruned-{path.name}")))
    except OSError as error:  # a good commit must not end the run
        _LOG.warning("%s cannot be removed yet: %s", path, error)


def mark_best(run_dir: Path, path: Path, metric: str, value: float) -> None:
    """Remember `path` as the checkpoint with the best `metric` so far."""
    text = json.dumps({"checkpoint": path.name, "metric": metric, "value": value}) + "\n"
    from_rank_0(lambda: replace_text(run_dir / "checkpoints" / "best.json", text))
