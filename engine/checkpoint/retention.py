"""Which checkpoints stay on the disk, and whether the next ones fit."""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from engine.arithmetic import STATE_BYTES_PER_PARAMETER, list_checkpoints, step_of
from engine.checkpoint.format import best_checkpoint
from engine.checkpoint.save import replace_text
from engine.errors import StorageError
from engine.ranks.agreement import from_rank_0

_LOG = logging.getLogger(__name__)
_GIB = 2.0**30
_FILES = 64  # some headers, manifests and folders; far below what any file system has left in good health


def checkpoint_bytes(parameters: Mapping[str, Parameter], buffers: Mapping[str, Tensor]) -> int:
    """What one checkpoint takes on the disk: 12 bytes a trained parameter, frozen ones and buffers as they are.

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
