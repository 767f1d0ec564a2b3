"""``fulltune eval``: the figures of a model on labelled records, as an evaluation in training computes them."""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from data_prep.prepare import prepare
from engine.config import RunConfig
from engine.errors import ConfigError
from engine.fit.stores import open_stores
from engine.inference.plan import Plan, read_figures
from launcher.commands.model_argument import add_model, opened_model
from launcher.start.inference import run_plan
from launcher.start.model_inputs import Model, reading_of

_MICRO_ROWS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the records, and how the figures are printed."""
    add_model(parser)
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="FILE",
        help="labelled records, in any format that prepare reads, or the keys of a source in braces"
        " (default: of a run, its validation records)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the figures."""
    started = time.perf_counter()
    with opened_model(arguments) as (model, work):
        plan = run_plan(_plan(model, arguments, work), work, "evaluating")
        figures, tables = read_figures(plan, work)
    figures["seconds"] = time.perf_counter() - started
    if arguments.json:
        print(json.dumps(figures))
        return 0
    for name, table in tables.items():
        print(f"{name}:\n{table}\n")
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:,.0f}" if name == "targets" else f"{name:<{width}}  {value:.6g}")
    return 0


def _plan(model: Model, arguments: argparse.Namespace, work: Path) -> Plan:
    """The plan of an evaluation, after its records are prepared; of a run, in its own micro-batches."""
    batch: dict[str, Any] = model.run.get("batch") or {}
    own_rows = (model.run.get("evaluation") or {}).get("micro_rows")
    micro_rows, micro_tokens = own_rows or batch.get("micro_rows", 1), None if own_rows else batch.get("micro_tokens")
    # A run file with micro_rows "auto" does not have the number that was found.
    if not model.run or arguments.micro_rows is not None or not isinstance(micro_rows, int):
        micro_rows, micro_tokens = arguments.micro_rows or _MICRO_ROWS, None
    plan = _plan_of_run(model, arguments) if not arguments.data else _plan_of_files(model, arguments, work)
    return dataclasses.replace(plan, micro_rows=micro_rows, micro_tokens=micro_tokens)


def _plan_of_files(model: Model, arguments: argparse.Namespace, work: Path) -> Plan:
    reading = reading_of(model, arguments.data, arguments.like, arguments.overrides, work)
    with contextlib.redirect_stdout(sys.stderr):
        folders = prepare(reading.data, reading.section, model.task, held_out_only=True)
    return Plan(
        str(model.folder), model.task, str(folders["validation"]), reading.data.row_tokens, predicts=False,
        one_document_a_row=reading.data.packing == "none", evaluation=reading.evaluation,
    )  # fmt: skip


def _plan_of_run(model: Model, arguments: argparse.Namespace) -> Plan:
    """The plan of an evaluation of a run's own validation records, which are prepared."""
    if not model.run:
        raise ConfigError("give --data FILE: a model folder has no validation records of its own")
    if arguments.overrides or arguments.like:
        raise ConfigError("give --data FILE: the run's own validation records are read as the run read them")
    config = RunConfig.model_validate(model.run)
    opened = open_stores(config, model.run["data"]).validation
    if opened is None:
        raise ConfigError(f"{arguments.model}: the run has no validation records: give --data FILE")
    return Plan(
        str(model.folder), model.task, str(opened[0].path), config.data.row_tokens, predicts=False,
        one_document_a_row=config.data.one_document_a_row, evaluation=model.run.get("evaluation") or {},
    )  # fmt: skip
