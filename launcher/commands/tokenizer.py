"""``fulltune tokenizer``: `train` makes a tokenizer, `extend` adds pieces to one; both print what it is worth.

The work is done in data_prep/tokenizer; the result of `extend` is compared with what transformers reads.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import get_args

from data_prep.tokenizer.extend import extend_tokenizer
from data_prep.tokenizer.train import Density, Kind, train_tokenizer
from launcher.commands.arguments import add_sharing, positive_number
from launcher.commands.export import misreading_class

_KINDS: tuple[Kind, ...] = get_args(Kind)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One of the two actions, with its own arguments."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    train_summary, extend_summary = (
        "train a tokenizer on text or record files", "add pieces learned from new text; old pieces keep their ids"
    )  # fmt: skip
    train = actions.add_parser("train", help=train_summary, description=f"{train_summary.capitalize()}.")
    train.set_defaults(action=_train)
    extend = actions.add_parser("extend", help=extend_summary, description=f"{extend_summary.capitalize()}.")
    extend.set_defaults(action=_extend)
    extend.add_argument("base", metavar="BASE", help="folder or file of the tokenizer, or its name on the Hub")
    for action in (train, extend):
        action.add_argument("files", type=Path, nargs="+", metavar="FILES")
        action.add_argument("out_dir", type=Path, metavar="OUT", help="folder to write")
        add_sharing(action)
    train.add_argument("--vocab-size", type=positive_number, required=True, metavar="N", help="number of ids")
    train.add_argument("--kind", choices=_KINDS, default=_KINDS[0], help=f"default: {_KINDS[0]}")
    extend.add_argument("--add", type=positive_number, required=True, metavar="N", help="number of new pieces")


def run(arguments: argparse.Namespace) -> int:
    """Do the action."""
    arguments.action(arguments)
    return 0


def _train(arguments: argparse.Namespace) -> None:
    """Train a tokenizer into OUT and print how densely it encodes held-out text."""
    out_dir, vocab_size, kind = arguments.out_dir, arguments.vocab_size, arguments.kind
    density = train_tokenizer(arguments.files, out_dir, vocab_size, kind, num_threads=len(os.sched_getaffinity(0)))
    print(f"{kind} tokenizer of {vocab_size} ids written to {out_dir}")
    print(f"{density.tokens_per_character:.3f} tokens per character {_measured_on(density)}")


def _extend(arguments: argparse.Namespace) -> None:
    """Write BASE with pieces learned from FILES into OUT and print what they bring."""
    base, out_dir, num_pieces = arguments.base, arguments.out_dir, arguments.add
    report = extend_tokenizer(base, arguments.files, out_dir, num_pieces)
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
