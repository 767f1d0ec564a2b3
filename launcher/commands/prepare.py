"""``fulltune prepare``: make the token store of a run file, or a share of it on one of several machines."""

import argparse
import os

from launcher.commands.arguments import add_run_file, checked_data_run
from launcher.start.start import array_part, prepare_store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run file, and which share of the input."""
    add_run_file(parser)
    parser.add_argument(
        "--part", type=_part, metavar="I/N", help="tokenise only this share of the input, on one of N machines;"
        " afterwards, prepare without it joins them (in a Slurm job array it is taken from the array)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Make the token store, or a share of it."""
    prepare_store(checked_data_run(arguments), arguments.part or array_part(os.environ))
    return 0


def _part(text: str) -> tuple[int, int]:
    """`2/8`: the second of eight shares."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"write a share such as 2/8, not {text}")
    return int(first), int(count)
