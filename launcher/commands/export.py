"""``fulltune export``: a run folder's checkpoint as a Hugging Face folder with its tokenizer."""

import argparse
import sys
from pathlib import Path

from data_prep.token_store import TokenStore, resolve_store
from data_prep.tokenizer.open import open_tokenizer
from engine.config import RunConfig
from engine.errors import CannotWriteError, MissingInputError
from engine.file_modes import set_umask
from engine.run_file import load_run_file
from launcher.commands.arguments import add_weight_options

#: What tokenizers differ in: blanks, digits, line breaks, contractions, scripts, accents in two forms.
_PROBES = (
    "Hello, world! It's 1234567.5 %, isn't it?  Two  blanks",
    "def f(x):\n    return x**2\n\n\tTab  \n ",
    " leading blank, trailing blank ",
    "\u4e2d\u6587\u6d4b\u8bd5\uff0c\u4f60\u597d\u3002 \u00fcber e\u0301t\u00e9 \ufb01 \U0001f600",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, the folder to write, and which checkpoint."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("out_dir", type=Path, metavar="OUT", help="folder to write; must not exist")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the best evaluation")
    add_weight_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export the checkpoint."""
    export_run(
        arguments.run_dir, arguments.out_dir, arguments.step, arguments.best, arguments.dtype, arguments.max_shard_size
    )
    return 0


def export_run(run_dir: Path, out_dir: Path, step: int | None, best: bool, dtype: str, max_shard_bytes: int) -> None:
    """Write `out_dir` from the newest, the best, or the given step's checkpoint of `run_dir`."""
    run_file = run_dir / "run.yaml"
    if not run_file.is_file():
        raise MissingInputError(f"{run_dir}: not a run folder (no run.yaml in it)")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CannotWriteError(f"{out_dir}: exists and is not an empty folder; remove it or name another")
    loaded = load_run_file(run_file)
    config = loaded.parse(RunConfig)
    set_umask(config.share_with_group)
    store_path = resolve_store(config.data.store_dir, "train", loaded.values["data"], config.task)
    if store_path is None:
        raise MissingInputError(f"{config.data.store_dir}: has no train split; the export needs its tokenizer")
    from engine.checkpoint.reader import CheckpointReader  # brings torch along
    from engine.export.card import model_card
    from engine.export.from_checkpoint import export_checkpoint, resolve_checkpoint

    checkpoint = resolve_checkpoint(run_dir, step, best)
    store = TokenStore.open(store_path)
    card = model_card(run_dir, config.model_dump(mode="json"), CheckpointReader(checkpoint).state(), store.manifest)
    export_checkpoint(checkpoint, run_dir / "model", store.tokenizer_dir, out_dir, dtype, max_shard_bytes, card)
    print(f"{checkpoint.name} exported to {out_dir} ({dtype})")
    if reader := misreading_class(out_dir):
        print(
            f"warning: AutoTokenizer opens {out_dir} as {reader}, which splits text in its own way, not as the model "
            "was trained: use transformers.PreTrainedTokenizerFast, as `fulltune generate` does",
            file=sys.stderr,
        )


def misreading_class(model_dir: Path) -> str | None:
    """The class with which AutoTokenizer gives other ids than the folder's tokenizer.json; None if it does not.

    For some model types (Qwen2, Qwen3.5) transformers lays its own splitting rules over any tokenizer
    (``MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS`` in models/auto/tokenization_auto.py).
    """
    from transformers import AutoTokenizer

    ours = open_tokenizer(str(model_dir))
    theirs = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    encoded = ours.encode_batch(_PROBES)
    for text, content in zip(_PROBES, encoded, strict=True):
        if theirs(text)["input_ids"] != [*ours.prefix_ids, *content, *ours.suffix_ids]:
            return type(theirs).__name__
    return None
