"""The model of `fulltune eval` and `fulltune predict`: its folder and task, and how records for it are read."""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data_prep.config import DataConfig, SourceConfig
from data_prep.tasks import TASKS as DATA_TASKS
from engine.errors import ConfigError, DataError, MissingInputError
from engine.run_file import dump_yaml, load_run_file, with_absolute_paths
from engine.sections import EvaluationSection
from engine.tasks import TASKS

#: Rows are so long where nothing says how long they are, unless the model has fewer positions.
_USUAL_ROW_TOKENS = 512
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")
_OVERRIDE = re.compile(r"(data|evaluation)\.[a-z_.]+=")
#: Keys of a run file's data section that are about the training records alone, or about where things are.
_NOT_CARRIED = {"train", "validation", "validation_fraction", "store_dir", "tokenizer", "label_names", "deduplicate"}
#: Keys of a source that are about its place; the others say how to read it.
_PLACES = {"path", "hub", "aligned", "name", "weight", "epochs", "config", "split", "revision", "label_from"}


@dataclass(frozen=True)
class Model:
    """A Hugging Face folder with a head for `task`. `label_names` are in the order of its outputs; () without names."""

    folder: Path
    task: str
    config: Mapping[str, Any]
    label_names: tuple[str, ...]
    run: Mapping[str, Any] = field(default_factory=dict)  # the values of the run file that it comes from


def read_model(folder: Path, task: str | None, run: Mapping[str, Any] | None = None) -> Model:
    """The model in `folder`; `task` where a person says it. MissingInputError, ConfigError, DataError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        named = {int(number): str(name) for number, name in (config.get("id2label") or {}).items()}
        names = tuple(named[number] for number in range(len(named))) or ("LABEL_0", "LABEL_1")
    except FileNotFoundError:
        raise MissingInputError(
            f"{folder}: neither a model folder (no config.json in it), nor a run folder (no run.yaml) or run file"
        ) from None
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise DataError(f"{path}: cannot be read as a model's configuration: {error}") from error
    task = task or _task_of(config, folder)
    has_names = DATA_TASKS[task].has_label_names and len(names) > 1 and config.get("problem_type") != "regression"
    return Model(folder, task, config, names if has_names else (), run or {})


def _task_of(config: Mapping[str, Any], folder: Path) -> str:
    """The task of a model's class, as its configuration names it; of several with this class, the first."""
    named = [str(name) for name in config.get("architectures") or ()]
    found = [task.name for task in TASKS.values() if named and named[0].endswith(task.heads)]
    if found:
        return found[0]
    what = f"{', '.join(named)}, a class of no task here" if named else "no class"
    raise ConfigError(f"{folder}/config.json names {what}: give --task ({', '.join(TASKS)})")


@dataclass(frozen=True)
class Reading:
    """How records are read and scored: a data section, its plain values, and an evaluation section."""

    data: DataConfig
    section: dict[str, Any]
    evaluation: dict[str, Any]


def reading_of(model: Model, files: Sequence[str], like: Path | None, overrides: Sequence[str], work: Path) -> Reading:
    """How `files` are read for `model`.

    The settings are those of the run that the model comes from, or of the run file `like`; then `overrides`.
    """
    late = [text for text in files if _OVERRIDE.match(text)]  # behind an option that takes several files
    files, overrides = [text for text in files if text not in late], [*overrides, *late]
    wrong = [override for override in overrides if not override.startswith(("data.", "evaluation."))]
    if wrong:
        raise ConfigError(f"override `{wrong[0]}`: only keys of data and evaluation count here, as data.row_tokens=256")
    run = model.run if like is None else _values_like(like)
    given = dict(run.get("data") or {})
    keys = _keys_of(given.get("validation") or given.get("train"))
    sources = [_source(text, keys) for text in files]
    section = {
        "row_tokens": _row_tokens(model.config),
        **{key: value for key, value in given.items() if key not in _NOT_CARRIED},
        "store_dir": str(work / "store"), "tokenizer": str(model.folder),
        "train": copy.deepcopy(sources), "validation": sources,
    }  # fmt: skip
    if model.label_names:
        section["label_names"] = list(model.label_names)
    path = work / "reading.yaml"
    path.write_text(dump_yaml({"data": section, "evaluation": run.get("evaluation") or {}}), encoding="utf-8")
    read = load_run_file(path, overrides)
    evaluation = read.parse(EvaluationSection, "evaluation").model_dump(mode="json", exclude_defaults=True)
    return Reading(read.parse(DataConfig, "data"), read.values["data"], evaluation)


def _values_like(path: Path) -> dict[str, Any]:
    """The values of a run file, of whose sections `data` and `evaluation` the faults are named with their lines."""
    file = load_run_file(path)
    faults = [
        fault
        for section, model in (("data", DataConfig), ("evaluation", EvaluationSection))
        if file.values.get(section) is not None
        for fault in file.find_faults(model, section)
    ]
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    return with_absolute_paths(file.values)


def _source(text: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """A source as the command line gives it: a path, or its keys as {path: x.csv, delimiter: ";"}."""
    if not text.startswith("{"):
        return {**keys, "path": text}
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"`{text}`: not the keys of a source: {' '.join(str(error).split())}") from None
    try:
        SourceConfig.model_validate({**keys, **given})
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ") for fault in error.errors()]
        known = ", ".join(SourceConfig.model_fields)
        raise ConfigError(f"`{text}`: {'; '.join(faults)} (the keys of a source are {known})") from None
    return {**keys, **given}


def _keys_of(sources: Any) -> dict[str, Any]:
    """The keys with which all sources of a run file are read; none where they differ, but for the names of fields."""
    entries = sources if isinstance(sources, list) else [sources]
    ways = [
        {key: value for key, value in entry.items() if key not in _PLACES} if isinstance(entry, dict) else {}
        for entry in entries
    ]
    first = ways[0] if all(way == ways[0] for way in ways) else {}
    unset = {name: info.default for name, info in SourceConfig.model_fields.items()}
    return {key: value for key, value in first.items() if value != unset.get(key)}


def _row_tokens(config: Mapping[str, Any]) -> int:
    known = [config[key] for key in _POSITIONS if isinstance(config.get(key), int) and config[key] > 1]
    return min(_USUAL_ROW_TOKENS, *known) if known else _USUAL_ROW_TOKENS
