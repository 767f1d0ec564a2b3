"""Which checkpoints stay on the disk."""

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from engine.agreement import from_rank_0
from engine.checkpoint import replace_text
from engine.checkpoint_files import best_checkpoint, list_checkpoints, step_of

_LOG = logging.getLogger(__name__)


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
    # Under another name first: half a checkpoint must not look like one.
    renamed = path.rename(path.with_name(f".tmp-pruned-{path.name}"))
    try:
        shutil.rmtree(renamed)
    except OSError as error:  # a good commit must not end the run
        _LOG.warning("%s cannot be removed yet: %s", renamed, error)


def mark_best(run_dir: Path, path: Path, metric: str, value: float) -> None:
    """Remember `path` as the checkpoint with the best `metric` so far."""
    text = json.dumps({"checkpoint": path.name, "metric": metric, "value": value}) + "\n"
    from_rank_0(lambda: replace_text(run_dir / "checkpoints" / "best.json", text))
