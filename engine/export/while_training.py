"""Models to use, made while training: at their own cadence and at the end. All ranks call every function here."""

import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch.nn import Parameter

from data_prep.token_store import TokenStore
from engine.arithmetic import checkpoint_name, step_of
from engine.config import RunConfig
from engine.errors import StorageError
from engine.export.card import model_card
from engine.export.from_checkpoint import export_checkpoint, resolve_checkpoint
from engine.export.from_training import export_live
from engine.ranks.agreement import from_rank_0


def export_step(
    engine: Any,
    parameters: Mapping[str, Parameter],
    config: RunConfig,
    store: TokenStore,
    state: Mapping[str, Any],
    say: Callable[[str], None],
    check_owner: Callable[[], None] = lambda: None,
) -> None:
    """Write the weights after ``state["step"]`` into ``run_dir/weights/step-...`` and keep the newest `export.keep`.

    A failure is a warning: what training needs is in the checkpoints.
    """
    out_dir = config.run_dir / "weights" / checkpoint_name(state["step"])
    try:
        _export(engine, parameters, config, store, state, say, check_owner, out_dir)
    except StorageError as error:
        say(f"warning: no weights written after step {state['step']}: {error}; training goes on")
        return
    if config.export.keep is not None:
        from_rank_0(partial(_prune, out_dir.parent, int(state["step"]), config.export.keep))


def export_end(
    engine: Any,
    parameters: Mapping[str, Parameter],
    config: RunConfig,
    store: TokenStore,
    state: Mapping[str, Any],
    say: Callable[[str], None],
    check_owner: Callable[[], None] = lambda: None,
) -> None:
    """Write the trained model into ``run_dir/export``, in place of an older one. The last checkpoint must be published.

    StorageError when it cannot be written: the checkpoint is there, and starting again tries again.
    """
    out_dir = config.run_dir / "export"
    if _export(engine, parameters, config, store, state, say, check_owner, out_dir):
        return

    def from_checkpoint() -> None:
        # This family's bytes cannot be written by slices.
        if out_dir.is_dir():
            shutil.rmtree(out_dir)
        card = model_card(config.run_dir, config.model_dump(mode="json"), state, store.manifest)
        checkpoint = resolve_checkpoint(config.run_dir, int(state["step"]))
        export_checkpoint(
            checkpoint, config.run_dir / "model", store.tokenizer_dir, out_dir,
            config.export.dtype, config.export.max_shard_size, card,
        )  # fmt: skip

    from_rank_0(from_checkpoint)


def _export(
    engine: Any,
    parameters: Mapping[str, Parameter],
    config: RunConfig,
    store: TokenStore,
    state: Mapping[str, Any],
    say: Callable[[str], None],
    check_owner: Callable[[], None],
    out_dir: Path,
) -> bool:
    started = time.perf_counter()
    card = model_card(config.run_dir, config.model_dump(mode="json"), state, store.manifest)
    written = export_live(
        engine, parameters, config.run_dir / "model", store.tokenizer_dir, out_dir.absolute(), config.export.dtype,
        config.export.max_shard_size, card, check_owner, replace=True,
    )  # fmt: skip
    if written:
        say(f"weights after step {state['step']} written to {out_dir} in {time.perf_counter() - started:.1f} s")
    return written


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` up to `step`; later ones are of a lost future and will be replaced."""
    present = sorted(path for path in folder.glob("step-*") if 0 <= step_of(path.name) <= step)
    for path in present[:-keep]:
        renamed = path.rename(path.with_name(f".tmp-{path.name}-pruned"))  # half of it must not look like a whole
        shutil.rmtree(renamed, ignore_errors=True)
