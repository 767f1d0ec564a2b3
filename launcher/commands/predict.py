"""``fulltune predict``: a model's answer to every record of files, in their order."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from data_prep.tasks import TASKS as DATA_TASKS
from data_prep.unlabelled import Unlabelled, prepare_unlabelled
from engine.errors import CannotWriteError, ConfigError, DataError
from engine.inference.plan import Plan, Predictions
from engine.tasks import TASKS
from launcher.commands.model_argument import add_model, opened_model
from launcher.start.inference import run_plan
from launcher.start.model_inputs import Model, Reading, reading_of

_MICRO_ROWS = 32
_MOST_LISTED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the records, the file to write, and what becomes of records that cannot be used."""
    add_model(parser)
    parser.add_argument(
        "--in", dest="inputs", nargs="+", required=True, metavar="FILE",
        help="records, in any format that prepare reads, or the keys of a source in braces; they need no labels",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="the file to write; - is standard output")
    parser.add_argument(
        "--skip-unusable", action="store_true", help="write {id, error} for a record that cannot be used, and go on"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write a line of JSON for every record."""
    with opened_model(arguments) as (model, work), _output(arguments.out) as out:
        blank = DATA_TASKS[model.task].blank
        if TASKS[model.task].predictions is None or blank is None:
            raise ConfigError(f"task {model.task} predicts nothing of a record; `fulltune generate` continues prompts")
        reading = reading_of(model, arguments.inputs, arguments.like, arguments.overrides, work)
        with contextlib.redirect_stdout(sys.stderr):
            named = blank(model.config, model.label_names)
            found = prepare_unlabelled(reading.data, reading.section, model.task, named, work)
        if found.faults and not arguments.skip_unusable:
            raise DataError(_listed(found))
        for line in _predictions(model, found, reading, arguments.micro_rows or _MICRO_ROWS, work):
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
    unusable = f", {len(found.faults):,} of them unusable" if found.faults else ""
    print(f"{found.num_records:,} records{unusable}: {arguments.out}", file=sys.stderr)
    return 0


def _predictions(
    model: Model, found: Unlabelled, reading: Reading, micro_rows: int, work: Path
) -> Iterator[Mapping[str, Any]]:
    """The object of each record, in their order."""
    predictions = None
    if found.store is not None:
        plan = Plan(
            str(model.folder), model.task, str(found.store), reading.data.row_tokens, predicts=True,
            micro_rows=micro_rows, evaluation=reading.evaluation,
        )  # fmt: skip
        predictions = Predictions(run_plan(plan, work, "predicting"), work)
    for number, line in enumerate(found.lines()):
        if number in found.faults:
            yield {"id": line["id"], "error": found.faults[number]}
            continue
        assert predictions is not None
        repeated = {name: line["fields"][name] for name in found.repeats}
        yield {"id": line["id"], **repeated, **predictions.of(found.documents[number])}
    if predictions is not None:
        predictions.close()


def _listed(found: Unlabelled) -> str:
    """A line for each record that cannot be used, the first ones if there are many, and what to do."""
    lines = [fault for _, fault in sorted(found.faults.items())][:_MOST_LISTED]
    number = len(found.faults)
    many = f"{number:,} of {found.num_records:,} records cannot be used"
    advice = "mend them, or give --skip-unusable; data.overlong=truncate cuts texts that are too long"
    return "\n".join([*lines, f"{many}: {advice}"])


@contextlib.contextmanager
def _output(out: str) -> Iterator[IO[str]]:
    """The file to write, which is there when it is complete; or standard output, or what is no file, as a pipe."""
    if out == "-":
        yield sys.stdout
        return
    path = Path(out).resolve()  # where it is a link, what it leads to is written
    if path.is_dir():
        raise CannotWriteError(f"--out {out}: cannot write: a folder; name a file, as {Path(out) / 'answers.jsonl'}")
    if path.exists() and not path.is_file():  # it must not be replaced by a file
        with path.open("w", encoding="utf-8") as pipe:
            yield pipe
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        file = temporary.open("x", encoding="utf-8")
    except OSError as error:
        raise CannotWriteError(f"--out {out}: cannot write: {error.strerror}") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
