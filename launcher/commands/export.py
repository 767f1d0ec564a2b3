"""``fulltune export``: a run folder's checkpoint as a Hugging Face folder with its tokenizer."""

import argparse
import sys
from pathlib import Path

from data_prep.token_store import TokenStore, resolve_store
from data_prep.tokenizer.open import open_tokenizer
from engine.arithmetic import list_checkpoints
from engine.config import RunConfig
from engine.errors import CannotWriteError, MissingInputError
from engine.file_modes import set_umask
from engine.run_file import load_run_file, with_absolute_paths
from launcher.commands.arguments import add_weight_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, the folder to write, and which checkpoint."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder, or run file")
    parser.add_argument("out_dir", type=Path, metavar="OUT", help="folder to write; must not exist")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="its checkpoint (default: the newest); 0: the start",
    )
    which.add_argument("--best", action="store_true", help="the checkpoint with the best evaluation")
    add_weight_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export the checkpoint."""
    export_run(
        arguments.run_dir, arguments.out_dir, arguments.step, arguments.best, arguments.dtype, arguments.max_shard_size
    )
    return 0


def export_run(run: Path, out_dir: Path, step: int | None, best: bool, dtype: str, max_shard_bytes: int) -> None:
    """Write `out_dir` from the newest, the best, or the given step's checkpoint of `run`, a run folder or run file.

    A run without a checkpoint, and step 0, give the weights that the run starts from.
    """
    run_file = run if run.is_file() else run / "run.yaml"
    if not run_file.is_file():
        raise MissingInputError(f"{run}: not a run folder (no run.yaml in it), nor a run file")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CannotWriteError(f"{out_dir}: exists and is not an empty folder; remove it or name another")
    given = load_run_file(run_file)
    given.parse(RunConfig)  # names every fault; paths can be made absolute in a sound file only
    values = with_absolute_paths(given.values)
    config = RunConfig.model_validate(values)
    run_dir = config.run_dir if run.is_file() else run
    set_umask(config.share_with_group)
    store_path = resolve_store(config.data.store_dir, "train", values["data"], config.task)
    if store_path is None:
        raise MissingInputError(f"{config.data.store_dir}: has no train split; the export needs its tokenizer")
    store = TokenStore.open(store_path)
    if step == 0 or (step is None and not best and not list_checkpoints(run_dir)):
        from engine.export.from_start import export_start  # brings torch along

        export_start(config, store, out_dir, dtype, max_shard_bytes)
        print(f"the starting weights of {run_dir}, before step 1, exported to {out_dir} ({dtype})")
    else:
        name = _export_checkpoint(run_dir, config, store, out_dir, step, best, dtype, max_shard_bytes)
        print(f"{name} exported to {out_dir} ({dtype})")
    if reader := misreading_class(out_dir):
        print(
            f"warning: AutoTokenizer opens {out_dir} as {reader}, which splits text in its own way, not as the model "
            "was trained: use transformers.PreTrainedTokenizerFast, as `fulltune generate` does",
            file=sys.stderr,
        )


def _export_checkpoint(
    run_dir: Path, config: RunConfig, store: TokenStore, out_dir: Path, step: int | None, best: bool, dtype: str,
    max_shard_bytes: int,
) -> str:  # fmt: skip
    """Export a checkpoint of the run; returns its name."""
    from engine.checkpoint.reader import CheckpointReader  # brings torch along
    from engine.export.card import model_card
    from engine.export.from_checkpoint import export_checkpoint, resolve_checkpoint
    from engine.export.taught import taught_by

    checkpoint = resolve_checkpoint(run_dir, step, best)
    card = model_card(run_dir, config.model_dump(mode="json"), CheckpointReader(checkpoint).state(), store.manifest)
    taught = taught_by(store, config.trained_task)
    export_checkpoint(checkpoint, run_dir / "model", store.tokenizer_dir, out_dir, dtype, max_shard_bytes, card, taught)
    return checkpoint.name


def misreading_class(model_dir: Path) -> str | None:
    """The class with which AutoTokenizer gives other ids than the folder's tokenizer.json; None if it does not.

    For some model types (Qwen2, Qwen3.5) transformers lays its own splitting rules over any tokenizer
    (``MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS`` in models/auto/tokenization_auto.py).
    """
    from transformers import AutoTokenizer

    from engine.export.tokenizer_files import PROBES

    ours = open_tokenizer(str(model_dir))
    theirs = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    encoded = ours.encode_batch(PROBES)
    for text, content in zip(PROBES, encoded, strict=True):
        if theirs(text)["input_ids"] != [*ours.prefix_ids, *content, *ours.suffix_ids]:
            return type(theirs).__name__
    return None
