"""A sweep: the same run with every combination of some values, and the table that compares them.

Each combination is a run of its own below the run folder. It is chosen by the best evaluation on records that are held
out of train, so a sweep without such records holds out a tenth of train.
"""

import dataclasses
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, FulltuneError, NumericalStopError
from engine.finding import Finding, failures
from engine.tasks.task import Task
from launcher.job import runs
from launcher.job.run_config import Run, load_run

HELD_OUT = "data.validation_fraction=0.1"
_NOT_SWEPT = ("run_dir", "data.store_dir", "task")
_UNSAFE = re.compile(r"[^A-Za-z0-9._+=,-]+")
_NAME_CHARACTERS = 100


@dataclass(frozen=True)
class Combination:
    """A run of a sweep: the name of its folder, and the values that it has by the keys of the sweep."""

    name: str
    values: tuple[str, ...]
    run: Run


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, in the order in which they are run. `overrides` are those of all."""

    keys: tuple[str, ...]
    combinations: tuple[Combination, ...]
    overrides: tuple[str, ...]


def load_sweep(path: Path, overrides: Sequence[str], words: Sequence[str], shares_store: bool = False) -> Sweep:
    """Read and check every run of the sweep `words` (KEY=VALUE,VALUE each); ConfigError with all their faults.

    With `shares_store` runs may go on at once, so none may change what is prepared.
    """
    swept = [_values_of(word) for word in words]
    keys = [key for key, _ in swept]
    faults = [*itertools.chain(*map(_faults_of, words, swept)), *_faults_of_keys(keys, shares_store)]
    if faults:
        raise ConfigError("\n".join(faults))
    chosen = list(itertools.product(*(values for _, values in swept)))
    folders = [_folder(keys, values) for values in chosen]
    if len(set(folders)) < len(folders):
        raise ConfigError(f"--sweep {' '.join(words)}: two of its values would have the same folder")
    given = [[*overrides, *_overrides(keys, values)] for values in chosen]
    first, *_ = _load_all(path, given)
    if first.data.validation is None and first.data.validation_fraction is None:
        overrides = [*overrides, HELD_OUT]
    sweep_dir = first.config.run_dir / "sweep"
    own = [
        [*overrides, *_overrides(keys, values), f"run_dir={json.dumps(str(sweep_dir / name))}"]
        for name, values in zip(folders, chosen, strict=True)
    ]
    combinations = [Combination(*one) for one in zip(folders, chosen, _load_all(path, own), strict=True)]
    return Sweep(tuple(keys), tuple(combinations), tuple(overrides))


def _faults_of_keys(keys: Sequence[str], shares_store: bool) -> Iterator[str]:
    for key in dict.fromkeys(keys):
        if keys.count(key) > 1:
            yield f"--sweep {key}: given twice"
        if key in _NOT_SWEPT:
            yield f"--sweep {key}: the runs of a sweep have it in common"
        if shares_store and key.startswith("data."):
            yield f"--sweep {key}: jobs that run at once share one token store; give each its own run file"


def _faults_of(word: str, swept: tuple[str, tuple[str, ...]]) -> Iterator[str]:
    key, values = swept
    if not key or len(values) < 2 or not all(values):
        yield f"--sweep {word}: write a key with several values, as optimizer.learning_rate=1e-5,3e-5"
    elif len(set(values)) < len(values):
        yield f"--sweep {word}: a value is given twice"


def _overrides(keys: Sequence[str], values: Sequence[str]) -> list[str]:
    return [f"{key}={value}" for key, value in zip(keys, values, strict=True)]


def _load_all(path: Path, overrides: Sequence[list[str]]) -> list[Run]:
    """A run for each list of overrides; ConfigError with the faults of all, each once."""
    loaded, faults = [], []
    for own in overrides:
        try:
            run = load_run(path, own)
            run.config.check_trainable()
            loaded.append(run)
        except ConfigError as error:
            faults += str(error).splitlines()
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    return loaded


def _values_of(word: str) -> tuple[str, tuple[str, ...]]:
    """The key and the values of KEY=VALUE,VALUE; a comma inside of brackets parts nothing."""
    key, _, text = word.partition("=")
    values = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", text)]
    return key, tuple(values)


def _folder(keys: Sequence[str], values: Sequence[str]) -> str:
    """A name for the folder of a combination: the last words of its keys, with their values."""
    last = [key.rpartition(".")[2] for key in keys]
    short = last if len(set(last)) == len(last) else keys
    name = ",".join(f"{key}={value}" for key, value in zip(short, values, strict=True))
    return _UNSAFE.sub("-", name)[:_NAME_CHARACTERS]


def found_of_all(sweep: Sweep, check: Callable[[Run], list[Finding]]) -> list[Finding]:
    """The findings of all runs of a sweep, each once, and in which run it was found where not in all."""
    found: dict[tuple[str, str], tuple[Finding, list[str]]] = {}
    for one in sweep.combinations:
        try:
            own = check(one.run)
        except FulltuneError as error:
            own = failures("job", error)
        for finding in own:
            text = finding.text.replace(str(one.run.config.run_dir), str(one.run.config.run_dir.parent))
            found.setdefault((finding.name, text), (finding, []))[1].append(one.name)
    every = len(sweep.combinations)
    return [
        finding if len(names) == every else _in(finding, names) for finding, names in found.values()
    ]  # fmt: skip


def _in(finding: Finding, names: Sequence[str]) -> Finding:
    return dataclasses.replace(finding, name=f"{finding.name} ({', '.join(names)})")


@dataclass(frozen=True)
class _Result:
    """The result of a run of a sweep: its best evaluation so far, when it was, how long all took."""

    state: str
    metric: str = ""
    value: float | None = None
    step: int | None = None
    minutes: float = 0.0


def is_done(run: Run) -> bool:
    """True if this run, as it is, needs no further start: it is complete, or its numbers have failed."""
    outcome = runs.read_outcome(run.config.run_dir)
    return runs.is_complete(run) or (outcome is not None and outcome[0] == NumericalStopError.exit_code)


def _result(run: Run) -> _Result:
    folder = run.config.run_dir
    outcome = runs.read_outcome(folder)
    state = "complete" if runs.is_complete(run) else "not run" if outcome is None else _state(outcome[0])
    best: tuple[float, int] | None = None
    name, seconds = "", 0.0
    for line in _metrics(folder):
        kind, step = line.get("kind"), line.get("step", 0)
        seconds += line.get("step_seconds" if kind == "train" else "seconds", 0.0)
        metric = _metric(run, line)
        if kind == "evaluation" and step and metric:
            better = best is None or (line[metric] < best[0] if _lowest(run, metric) else line[metric] > best[0])
            best, name = ((line[metric], step), metric) if better else (best, name)
    value, step = best or (None, None)
    return _Result(state, name, value, step, seconds / 60)


def _state(code: int) -> str:
    return {0: "complete", 75: "stopped", 130: "interrupted"}.get(code, f"failed ({code})")


def _metrics(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]
    except (OSError, ValueError):
        return []


def _metric(run: Run, line: Mapping[str, Any]) -> str:
    """The metric of an evaluation that `best` goes by: the run file's, else that of the task as it is on the data."""
    task = run.config.trained_task
    names = (run.config.evaluation.metric,) if run.config.evaluation.metric else _bests(task)
    return next((name for name in names if name in line), "")


def _bests(task: Task) -> list[str]:
    return [kind.best for kind in (task, *task.kinds.values())]


def _lowest(run: Run, metric: str) -> bool:
    return run.config.trained_task.known_metrics[metric] == "min"


def table_of(sweep: Sweep) -> str:
    """The table of a sweep's runs, the best one marked, and the commands to go on with that one."""
    first = sweep.combinations[0].run
    results = [_result(one.run) for one in sweep.combinations]
    metric = next((result.metric for result in results if result.metric), "score")
    known = [number for number, result in enumerate(results) if result.value is not None]
    best = None
    if known:
        choose = min if _lowest(first, metric) else max
        best = choose(known, key=lambda number: results[number].value or 0.0)
    rows = [(*sweep.keys, metric, "step", "minutes", "state", "")]
    for number, (one, result) in enumerate(zip(sweep.combinations, results, strict=True)):
        value = "-" if result.value is None else f"{result.value:.4f}"
        step = "-" if result.step is None else str(result.step)
        mark = "best" if number == best else ""
        rows.append((*one.values, value, step, f"{result.minutes:.1f}", result.state, mark))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *([] if best is None else _commands(sweep, sweep.combinations[best]))])


def _commands(sweep: Sweep, best: Combination) -> list[str]:
    """The commands that export the best run, and that train it again."""
    newest = "" if best.run.config.checkpoint.save_best is False else " --best"
    export = ["fulltune", "export", str(best.run.config.run_dir), "OUT"]
    train = ["fulltune", "train", str(best.run.source), *sweep.overrides, *_overrides(sweep.keys, best.values)]
    return ["", f"export the best: {shlex.join(export)}{newest}", f"train it again:  {shlex.join(train)}"]
