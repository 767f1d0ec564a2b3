"""``fulltune export``: a run folder's checkpoint as a Hugging Face folder with its tokenizer."""

from pathlib import Path

from data_prep.token_store import TokenStore, resolve_store
from engine.config import RunConfig
from engine.errors import CannotWriteError, MissingInputError
from engine.run_file import load_run_file


def export_run(run_dir: Path, out_dir: Path, step: int | None, best: bool, dtype: str, max_shard_bytes: int) -> None:
    """Write `out_dir` from the newest, the best, or the given step's checkpoint of `run_dir`."""
    run_file = run_dir / "run.yaml"
    if not run_file.is_file():
        raise MissingInputError(f"{run_dir}: not a run folder (no run.yaml in it)")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CannotWriteError(f"{out_dir}: exists and is not an empty folder; remove it or name another")
    loaded = load_run_file(run_file)
    config = loaded.parse(RunConfig)
    store_path = resolve_store(config.data.store_dir, "train", loaded.values["data"], config.task)
    if store_path is None:
        raise MissingInputError(f"{config.data.store_dir}: has no train split; the export needs its tokenizer")
    from engine.export import export_checkpoint, resolve_checkpoint  # brings torch along

    checkpoint = resolve_checkpoint(run_dir, step, best)
    tokenizer_dir = TokenStore.open(store_path).tokenizer_dir
    export_checkpoint(checkpoint, run_dir / "model", tokenizer_dir, out_dir, dtype, max_shard_bytes)
    print(f"{checkpoint.name} exported to {out_dir} ({dtype})")
