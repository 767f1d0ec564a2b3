"""Arguments that several verbs take, and the types that check them."""

import argparse
from pathlib import Path

from engine.arithmetic import DEFAULT_SHARD_BYTES, byte_count
from engine.file_modes import set_umask
from launcher.job.run_config import DataRun, Run, load_data_run, load_run


def add_run_file(parser: argparse.ArgumentParser) -> None:
    """The run file and its overrides; `checked_run` reads them."""
    parser.add_argument("run_file", type=Path, metavar="RUN.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="for example optimizer.learning_rate=2e-5"
    )


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """`--sweep`, for verbs that start runs."""
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=A,B,C",
        help="a run with each of these values, below the run folder, and a table of them; repeatable: all combinations",
    )  # fmt: skip


def checked_run(arguments: argparse.Namespace) -> Run:
    """The checked run file. From here on its key `share_with_group` decides who may read what this process writes."""
    run = load_run(arguments.run_file, arguments.overrides)
    set_umask(run.share_with_group)
    return run


def checked_data_run(arguments: argparse.Namespace) -> DataRun:
    """As `checked_run`, for verbs that need the ``data`` section alone."""
    run = load_data_run(arguments.run_file, arguments.overrides)
    set_umask(run.share_with_group)
    return run


def add_sharing(parser: argparse.ArgumentParser) -> None:
    """`--share-with-group`, for verbs without a run file, whose key of that name does the same."""
    parser.add_argument(
        "--share-with-group", action="store_true", help="let the group read and write OUT; else its owner alone can"
    )


def add_weight_options(parser: argparse.ArgumentParser) -> None:
    """The kind of numbers and the size of the files of a Hugging Face folder."""
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--max-shard-size", type=size_bytes, default=DEFAULT_SHARD_BYTES, metavar="SIZE", help="default 5GB"
    )


def positive_number(text: str) -> int:
    """A number from 1 on."""
    if not text.replace("_", "").isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"write a positive number, not {text}")
    return int(text)


def size_bytes(text: str) -> int:
    """`5GB` or `200MB` as bytes."""
    try:
        return byte_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
