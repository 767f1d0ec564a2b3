"""``fulltune tokenizer train`` and ``extend``: what data_prep makes, checked against transformers and put in words."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.tokenizer.extend import extend_tokenizer
from data_prep.tokenizer.train import Density, Kind, train_tokenizer
from launcher.commands.export import misreading_class


def train(files: Sequence[Path], out_dir: Path, vocab_size: int, kind: Kind) -> None:
    """Train a tokenizer into `out_dir` and print how densely it encodes held-out text."""
    density = train_tokenizer(files, out_dir, vocab_size, kind, num_threads=len(os.sched_getaffinity(0)))
    print(f"{kind} tokenizer of {vocab_size} ids written to {out_dir}")
    print(f"{density.tokens_per_character:.3f} tokens per character {_measured_on(density)}")


def extend(base: str, files: Sequence[Path], out_dir: Path, num_pieces: int) -> None:
    """Write `base` with up to `num_pieces` pieces learned from `files` into `out_dir` and print what they bring."""
    report = extend_tokenizer(base, files, out_dir, num_pieces)
    found = "" if report.num_pieces == num_pieces else f" ({num_pieces} were asked for; no more are worth it)"
    print(f"{report.num_pieces} pieces added to {base}{found}: {out_dir}")
    if report.num_parts:
        print(f"{report.num_parts} of them only build longer ones")
    before, after = report.before, report.after
    print(
        f"tokens per character: {before.tokens_per_character:.3f} before, {after.tokens_per_character:.3f} after, "
        f"{_measured_on(after)}"
    )
    if before.num_unknown:
        shares = (density.num_unknown / max(density.num_tokens, 1) for density in (before, after))
        print("unknown: {:.2%} of the tokens before, {:.2%} after".format(*shares))
    share = report.new_tokens / max(after.num_tokens, 1)
    most = ", ".join(f"{text!r} {count}" for text, count in report.most_used)
    print(f"new pieces are {share:.1%} of the tokens there" + (f"; most often {most}" if most else ""))
    print("prepare data with this tokenizer; the model's new rows are made when `fulltune train` starts")
    if reader := misreading_class(out_dir):
        print(
            f"warning: AutoTokenizer opens {out_dir} as {reader}, which splits text in its own way: "
            "use transformers.PreTrainedTokenizerFast",
            file=sys.stderr,
        )


def _measured_on(density: Density) -> str:
    where = "held-out text" if density.held_out else "the text it learned from, too little to hold any out"
    return f"on {density.num_characters} characters of {where}"
