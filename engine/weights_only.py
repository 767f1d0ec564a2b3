"""Models to use, made while training: at their own cadence and at the end. All ranks call every function here."""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.nn import Parameter

from data_prep.token_store import TokenStore
from engine.agreement import from_rank_0, this_rank
from engine.config import RunConfig
from engine.errors import StorageError
from engine.export import export_checkpoint, resolve_checkpoint
from engine.export_live import export_live
from engine.model_card import model_card

_LOG = logging.getLogger(__name__)


def export_step(
    engine: Any,
    parameters: Mapping[str, Parameter],
    config: RunConfig,
    store: TokenStore,
    state: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Write the weights after ``state["step"]`` into ``run_dir/weights/step-...`` and keep the newest `export.keep`.

    A failure is a warning: what training needs is in the checkpoints.
    """
    out_dir = config.run_dir / "weights" / f"step-{state['step']:08d}"
    try:
        from_rank_0(lambda: shutil.rmtree(out_dir, ignore_errors=True))  # of a part of the run that was lost
        _export(engine, parameters, config, store, state, say, out_dir)
    except StorageError as error:
        if this_rank() == 0:
            _LOG.warning("no weights written after step %d: %s; training goes on", state["step"], error)
    if config.export.keep is not None:
        from_rank_0(lambda: _prune(out_dir.parent, config.export.keep or 1))


def export_end(
    engine: Any,
    parameters: Mapping[str, Parameter],
    config: RunConfig,
    store: TokenStore,
    state: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Write the trained model into ``run_dir/export``, unless it is there. The last checkpoint must be published."""
    out_dir = config.run_dir / "export"
    if from_rank_0(lambda: out_dir.is_dir() and any(out_dir.iterdir())):
        return
    if _export(engine, parameters, config, store, state, say, out_dir):
        return

    def from_checkpoint() -> None:
        card = model_card(config.run_dir, config.model_dump(mode="json"), state, store.manifest)
        export_checkpoint(
            resolve_checkpoint(config.run_dir), config.run_dir / "model", store.tokenizer_dir, out_dir,
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
    out_dir: Path,
) -> bool:
    started = time.perf_counter()
    card = model_card(config.run_dir, config.model_dump(mode="json"), state, store.manifest)
    written = export_live(
        engine, parameters, config.run_dir / "model", store.tokenizer_dir, out_dir.absolute(), config.export.dtype,
        config.export.max_shard_size, card,
    )  # fmt: skip
    if written:
        say(f"weights after step {state['step']} written to {out_dir} in {time.perf_counter() - started:.1f} s")
    return written


def _prune(folder: Path, keep: int) -> None:
    present = sorted(folder.glob("step-*"))
    for path in present[: max(0, len(present) - keep)]:
        shutil.rmtree(path)
