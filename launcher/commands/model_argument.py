"""The model that `fulltune eval` and `fulltune predict` are given: a folder, or a run; and its options."""

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from engine.config import RunConfig
from engine.errors import ConfigError
from engine.run_file import load_run_file, with_absolute_paths
from engine.tasks import TASKS
from engine.zero.ds_config import resolve_ds_config
from launcher.commands.arguments import positive_number
from launcher.commands.export import export_run
from launcher.start.model_inputs import Model, read_model


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model, the checkpoint of a run, and how records are read; `opened_model` opens it."""
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="Hugging Face folder with a head; or a run folder or run file"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="data.key=value", help="how records are read: data.row_tokens=256"
    )
    parser.add_argument(
        "--like", type=Path, metavar="RUN.yaml", help="read records as the data section of this run file says"
    )
    parser.add_argument("--task", choices=list(TASKS), help="where the model's class does not say it")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="of a run: its checkpoint (default: the newest)")
    which.add_argument("--best", action="store_true", help="of a run: the checkpoint with the best evaluation")
    parser.add_argument(
        "--micro-rows", type=positive_number, metavar="N", help="rows that go through the model at once (default 32)"
    )


@contextlib.contextmanager
def opened_model(arguments: argparse.Namespace) -> Iterator[tuple[Model, Path]]:
    """The model that was named, and a folder to work in, which is removed at the end. TMPDIR says where it is made.

    The checkpoint of a run is exported into that folder first, in the type in which the run computes.
    """
    given: Path = arguments.model
    run_file = given if given.is_file() else given / "run.yaml"
    with _ended_like_ctrl_c(), tempfile.TemporaryDirectory(prefix="fulltune-") as name:
        work = Path(name)
        if not run_file.is_file() or (given / "config.json").is_file():
            if arguments.step is not None or arguments.best:
                raise ConfigError(f"{given}: --step and --best choose a checkpoint of a run, and this is no run")
            yield read_model(given, arguments.task), work
            return
        values = with_absolute_paths(load_run_file(run_file).values)
        config = RunConfig.model_validate(values)
        if arguments.task not in (None, config.task):
            raise ConfigError(f"--task {arguments.task}: the run is of task {config.task}")
        dtype = "bfloat16" if resolve_ds_config(config, 1)["bf16"]["enabled"] else "float32"
        with contextlib.redirect_stdout(sys.stderr):
            export_run(given, work / "model", arguments.step, arguments.best, dtype, config.export.max_shard_size)
        yield read_model(work / "model", config.task, values), work


@contextlib.contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, so that the folder and files in the making are removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
