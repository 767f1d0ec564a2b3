"""``fulltune inspect``: shows a token store in the terminal, or writes it as one page."""

import argparse
import os
import sys
from pathlib import Path

from data_prep.inspect.page import write_page
from data_prep.inspect.rows import Selection
from data_prep.inspect.terminal import describe
from data_prep.token_store import CURRENT_NAME, MANIFEST_NAME, StoreError, resolve_store
from engine.errors import ConfigError, MissingInputError
from launcher.commands.arguments import positive_number
from launcher.job.run_config import load_data_run

_PAGE_ROWS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("target", type=Path, metavar="STORE|RUN.yaml", help="a token store, its folder, or a run file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="overrides of the run file")
    parser.add_argument("--split", default="train", metavar="NAME", help="train (default) or validation")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--row", type=int, metavar="N", help="show from row N on, counted from 0")
    which.add_argument("--source", metavar="NAME", help="show rows that hold documents of this source (name or index)")
    which.add_argument("--random", type=positive_number, metavar="N", help="show N rows drawn at random")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of what is drawn at random")
    parser.add_argument("--rows", type=positive_number, metavar="K", help="how many (default 1; 20 on a page)")
    parser.add_argument("--documents", action="store_true", help="whole documents instead of rows")
    parser.add_argument("--no-color", action="store_true", help="brackets instead of colours, as where NO_COLOR is set")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with rows, ledger and histograms")


def run(arguments: argparse.Namespace) -> int:
    """Show the chosen rows or the whole store. Raises StoreError, PreparationError or ConfigError."""
    path = _store_folder(arguments.target, arguments.split, arguments.overrides)
    selection = _selection(arguments)
    if arguments.html is not None:
        shown = selection or Selection(seed=arguments.seed, count=arguments.rows or _PAGE_ROWS)
        write_page(path, arguments.html, shown)
        print(f"page written to {arguments.html}")
        return 0
    color = sys.stdout.isatty() and not (arguments.no_color or os.environ.get("NO_COLOR"))
    for line in describe(path, selection, color and os.environ.get("TERM") != "dumb"):
        print(line)
    return 0


def _selection(arguments: argparse.Namespace) -> Selection | None:
    count = arguments.rows
    if arguments.random is not None and count is not None:
        raise ConfigError("--random N says how many: leave out --rows")
    asked = (arguments.row, arguments.source, arguments.random, count)
    if all(value is None for value in asked) and not arguments.documents:
        return None
    default = _PAGE_ROWS if arguments.html is not None else 1
    return Selection(
        number=arguments.row,
        source=arguments.source,
        seed=arguments.seed,
        count=arguments.random or count or default,
        documents=arguments.documents,
    )


def _store_folder(target: Path, split: str, overrides: list[str]) -> Path:
    """The folder of the store that `target` means: itself, the split its parent names, or that of a run file."""
    if target.is_dir():
        if overrides:
            raise ConfigError(f"{overrides[0]}: only a run file takes overrides, and {target} is a folder")
        if (target / MANIFEST_NAME).is_file():
            return target
        if (target / CURRENT_NAME).is_file():
            return _of_split(target, split, None, None)
        if not (target / "run.yaml").is_file():
            raise MissingInputError(f"{target}: neither a token store (no {MANIFEST_NAME}) nor a folder of stores")
        target = target / "run.yaml"
    run = load_data_run(target, overrides)
    try:
        return _of_split(run.data.store_dir, split, run.values["data"], run.task)
    except StoreError as error:
        if error.exit_code != StoreError("").exit_code:
            raise
        # Looking at an older store harms nobody; training from it would.
        path = _of_split(run.data.store_dir, split, None, None)
        print(f"warning: {error}", file=sys.stderr)
        return path


def _of_split(store_dir: Path, split: str, section: dict[str, object] | None, task: str | None) -> Path:
    path = resolve_store(store_dir, split, section, task)
    if path is None:
        raise MissingInputError(f"{store_dir}: has no split {split!r} (--split)")
    return path
