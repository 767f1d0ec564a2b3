"""``fulltune tokenizer``: `train` makes a tokenizer, `extend` adds pieces to one, `add` adds named special tokens.

The work is done in data_prep/tokenizer, and in engine/export for a model's rows; the result of `extend` is compared
with what transformers reads.
"""

import argparse
import os
import shutil
import sys
from datetime import datetime
from pathlib import Path
from typing import get_args

from data_prep.errors import DataConfigError
from data_prep.tokenizer.add import Addition, add_tokens
from data_prep.tokenizer.chatml import CHAT_TEMPLATE, CHAT_TOKENS
from data_prep.tokenizer.extend import extend_tokenizer
from data_prep.tokenizer.open import locate_tokenizer
from data_prep.tokenizer.train import Density, Kind, train_tokenizer
from engine.errors import MissingInputError
from launcher.commands.arguments import add_sharing, positive_number
from launcher.commands.export import misreading_class

_KINDS: tuple[Kind, ...] = get_args(Kind)
# Weights in these files have no rows for the new tokens, and code does not travel.
_LEFT_OUT = frozenset(".bin .pt .pth .h5 .msgpack .onnx .gguf .ot .ckpt .tflite .pkl .pickle .py".split())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three actions, each with its own arguments."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    _add_arguments_of_add(actions)
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
    train.add_argument("--chat", action="store_true", help="with the special tokens and the chat template of ChatML")
    extend.add_argument("--add", type=positive_number, required=True, metavar="N", help="number of new pieces")


def _add_arguments_of_add(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "add named special tokens to a model: to its tokenizer, with rows for them in its weights"
    add = actions.add_parser("add", help=summary, description=f"{summary.capitalize()}.")
    add.set_defaults(action=_add)
    add.add_argument("base", metavar="MODEL", help="folder of a model or of a tokenizer alone, or its name on the Hub")
    add.add_argument("out_dir", type=Path, metavar="OUT", help="folder to write; must not exist")
    add.add_argument(
        "--special", nargs="+", action="extend", default=[], metavar="TOKEN",
        help="tokens, such as '<|im_end|>'; may be repeated",
    )  # fmt: skip
    template = add.add_mutually_exclusive_group()
    template.add_argument("--chat-template", type=Path, metavar="FILE", help="the Jinja template that uses them")
    template.add_argument("--chat", action="store_true", help="the special tokens and the chat template of ChatML")
    add_sharing(add)


def run(arguments: argparse.Namespace) -> int:
    """Do the action."""
    arguments.action(arguments)
    return 0


def _train(arguments: argparse.Namespace) -> None:
    """Train a tokenizer into OUT and print how densely it encodes held-out text."""
    out_dir, vocab_size, kind = arguments.out_dir, arguments.vocab_size, arguments.kind
    threads = len(os.sched_getaffinity(0))
    density = train_tokenizer(arguments.files, out_dir, vocab_size, kind, num_threads=threads, chat=arguments.chat)
    chat = f", with {' and '.join(CHAT_TOKENS)} and a chat template" if arguments.chat else ""
    print(f"{kind} tokenizer of {vocab_size} ids{chat} written to {out_dir}")
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


def _add(arguments: argparse.Namespace) -> None:
    """Write MODEL with more special tokens, and rows for all tokens of its tokenizer, into OUT; print what it did."""
    out_dir: Path = arguments.out_dir
    template = _template(arguments)
    specials = [*arguments.special, *(CHAT_TOKENS if arguments.chat else ())]
    addition = add_tokens(arguments.base, specials, template)
    folder = locate_tokenizer(arguments.base).parent
    model_dir = _model_folder(arguments.base, folder)
    for text in addition.present:
        print(f"{text} is a special token of {arguments.base} already; it keeps its id")
    from engine.export.folder import new_folder  # brings torch along

    with new_folder(out_dir) as temporary:
        rows = "" if model_dir is None else _grow(model_dir, temporary, addition)
        if not addition.added and not rows and template is None:
            there = f"{arguments.base} has these tokens" + (" and rows for them" if model_dir is not None else "")
            raise DataConfigError(f"nothing to add: {there if specials else 'give --special TOKEN, or --chat'}")
        left_out = _copy_others(model_dir or folder, temporary, addition)
        for name, content in addition.files.items():
            (temporary / name).write_bytes(content)
    names = ", ".join(addition.added) or "no token"
    print(f"{names} added to the tokenizer of {arguments.base}, which has {addition.vocab_size} ids now: {out_dir}")
    if model_dir is None:
        print(f"{arguments.base} holds no model (no config.json), so there are no rows to make")
    else:
        print(rows or "the model has rows for all of its tokens: its weights are as they were")
    if left_out:
        print(f"not copied: {', '.join(left_out)}")
    for text in addition.unknown:
        warning = f"the chat template writes {text}, which is no special token: add --special '{text}'"
        print(f"warning: {warning}", file=sys.stderr)
    place = "" if model_dir is None else f"`model.path: {out_dir}` and "
    print(f"train with {place}`data.tokenizer: {out_dir}`")


def _template(arguments: argparse.Namespace) -> str | None:
    """The chat template that goes with the tokens, if one was asked for."""
    path: Path | None = arguments.chat_template
    if path is None:
        return CHAT_TEMPLATE if arguments.chat else None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingInputError(f"--chat-template {path}: cannot be read: {error}") from None
    from data_prep.chat.render import ChatTemplate

    ChatTemplate(text, {}, datetime.now(), marked=False)  # refuses what is no template
    return text


def _model_folder(name: str, folder: Path) -> Path | None:
    """The folder of the model that a tokenizer belongs to, with its weights; None for a tokenizer alone."""
    if not Path(name).expanduser().exists():
        from engine.model.build import model_folder
        from engine.sections import ModelSection

        found = model_folder(ModelSection(path=name))
    else:
        found = folder if (folder / "config.json").is_file() else None
    if found is None:
        return None
    from engine.export.added_rows import require_weights

    require_weights(found)
    return found


def _grow(model_dir: Path, folder: Path, addition: Addition) -> str:
    """Write the model with rows for every token into `folder`; the line about new ones, "" where none was made."""
    from engine.export.added_rows import write_grown_model
    from engine.model.vocabulary import read_extension

    grown = write_grown_model(
        model_dir, folder, addition.base.vocab_size, addition.vocab_size, read_extension(model_dir), addition.spelled
    )
    if not grown.tensors:
        return ""
    rows = f"rows {grown.first} to {addition.vocab_size - 1} of {' and '.join(grown.tensors)}"
    size = f"{grown.num_rows} rows" + ("" if grown.num_rows == grown.old_rows else f", {grown.old_rows} before")
    return f"{rows} ({size}) start as the mean of the tokens that spell them"


def _copy_others(model_dir: Path, folder: Path, addition: Addition) -> list[str]:
    """Copy the base's files that are not made anew; names of those that are left out."""
    from engine.export.added_rows import weight_files

    made = {*addition.files, *addition.replaced, *weight_files(model_dir), *(path.name for path in folder.iterdir())}
    left_out: list[str] = []

    def left_out_in(place: str, names: list[str]) -> set[str]:
        unwanted = {name for name in names if Path(name).suffix in _LEFT_OUT}
        left_out.extend(str(Path(place, name).relative_to(model_dir)) for name in sorted(unwanted))
        return unwanted

    for path in sorted(model_dir.iterdir()):
        if path.name in made or path.name.startswith("."):
            continue
        if path.suffix in _LEFT_OUT or path.name.endswith((".index.json",)) or path.name in ("onnx", "openvino"):
            left_out.append(path.name)
        elif path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=left_out_in)
        else:
            shutil.copyfile(path, folder / path.name)
    return left_out


def _measured_on(density: Density) -> str:
    where = "held-out text" if density.held_out else "the text it learned from, too little to hold any out"
    return f"on {density.num_characters} characters of {where}"
