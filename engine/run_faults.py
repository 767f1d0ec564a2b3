"""Faults of a run file in words: each with its place, its key, and the nearest valid key. Imports no torch."""

import difflib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

#: Keys by the names that other trainers give them, and what to write here.
_ELSEWHERE = {
    "lr": "optimizer.learning_rate",
    "max_grad_norm": "optimizer.gradient_clipping",
    "lr_scheduler_type": "optimizer.schedule",
    "num_train_epochs": "duration.epochs",
    "num_epochs": "duration.epochs",
    "max_steps": "duration.steps",
    "per_device_train_batch_size": "batch.micro_rows",
    "micro_batch_size": "batch.micro_rows",
    "train_batch_size": "batch.global_rows",
    "gradient_accumulation_steps": "batch.global_rows, from which accumulation follows",
    "gradient_checkpointing": "model.activation_checkpointing",
    "max_seq_length": "data.row_tokens",
    "max_length": "data.row_tokens",
    "cutoff_len": "data.row_tokens",
    "sequence_len": "data.row_tokens",
    "output_dir": "run_dir",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "save_steps": "checkpoint.save_every_steps",
    "save_total_limit": "checkpoint.keep_checkpoints",
    "eval_steps": "evaluation.eval_every_steps",
    "logging_steps": "log.log_every_steps",
}


class Places:
    """The places where dotted keys of a run file were written: a line of the file, or an override."""

    def __init__(self, path: Path, lines: Mapping[str, int], overrides: Mapping[str, str]):
        self.path = path
        self._lines = lines
        self._overrides = overrides

    def of(self, location: tuple[str, ...], message: str = "") -> str:
        """The place of the key, or of the nearest section around it; and overrides that `message` is about."""
        around = [".".join(location[:length]) for length in range(len(location), 0, -1)]
        override = next((self._overrides[dotted] for dotted in around if dotted in self._overrides), None)
        if override is not None:
            return f"override `{override}`"
        line = next((self._lines[dotted] for dotted in around if dotted in self._lines), None)
        inside = ".".join((*location, ""))
        named = [
            text
            for key, text in self._overrides.items()
            if (location and key.startswith(inside)) or _names(message, key)
        ]
        return (
            str(self.path)
            + (f":{line}" if line else "")
            + (f" with override `{'` and `'.join(named)}`" if named else "")
        )


def _names(message: str, dotted: str) -> bool:
    return any(f"{word.strip('`,.;:()')}.".startswith(f"{dotted}.") for word in message.split())


def describe_faults(
    faults: Iterable[ErrorDetails], places: Places, prefix: tuple[str, ...], model: type[BaseModel]
) -> list[str]:
    """A line for each fault, misspelt keys first; a key that is missing because it is misspelt is left out."""
    unknown, others, meant = [], [], set()
    for fault in faults:
        location = prefix + _location(fault)
        if fault["type"] == "extra_forbidden":
            found, text = _suggestion(location, location[len(prefix) :], model)
            meant.add(found)
            unknown.append(f"{places.of(location)}: unknown key `{'.'.join(location)}`{text}")
        else:
            others.append((location, fault))
    return unknown + [
        _describe(location, fault, places)
        for location, fault in others
        if not (fault["type"] == "missing" and ".".join(location) in meant)
    ]


def _location(fault: ErrorDetails) -> tuple[str, ...]:
    """The keys that lead to a fault, without pydantic's own names for steps in between."""
    return tuple(str(part) for part in fault["loc"] if not str(part).startswith("function-"))


def _describe(location: tuple[str, ...], fault: ErrorDetails, places: Places) -> str:
    dotted = ".".join(location)
    message = fault["msg"].removeprefix("Value error, ")
    where = places.of(location, message)
    if fault["type"] == "missing":
        return f"{where}: `{dotted}` is missing"
    if fault["type"] in ("model_type", "model_attributes_type"):
        return f"{where}: `{dotted}` is a section: write its keys below it, not {fault['input']!r}"
    message = message[0].lower() + message[1:] if message.startswith("Input ") else message
    got = "" if fault["type"] == "value_error" else f", not {fault['input']!r}"
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        choices = [word.strip("'") for word in fault["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        near = difflib.get_close_matches(fault["input"], choices, n=1)
        got += f"; did you mean {near[0]}?" if near else ""
    return f"{where}: {f'`{dotted}`: ' if dotted else ''}{message}{got}"


def _suggestion(location: tuple[str, ...], keys: tuple[str, ...], model: type[BaseModel]) -> tuple[str, str]:
    """The key that was probably meant ("" if none is near), looking first in the same section, and a text for it."""
    here: type[BaseModel] | None = model
    for part in keys[:-1]:
        if here is None or part.isdecimal():
            continue
        field = here.model_fields.get(part)
        here = section_of(field.annotation) if field else None
    if here is None:
        return "", ""
    near = difflib.get_close_matches(keys[-1], list(here.model_fields), n=1, cutoff=0.6)
    if near:
        meant = ".".join((*location[:-1], near[0]))
        return meant, f"; did you mean `{meant}`?"
    for name, field in model.model_fields.items():
        nested = section_of(field.annotation)
        if nested is not None and keys[-1] in nested.model_fields:
            return f"{name}.{keys[-1]}", f"; it belongs to section `{name}`"
    if keys[-1] in _ELSEWHERE:
        return _ELSEWHERE[keys[-1]].partition(",")[0], f"; here it is {_ELSEWHERE[keys[-1]]}"
    return "", f"; known keys here: {', '.join(here.model_fields)}"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, which may be optional or one of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in typing.get_args(annotation) if (found := section_of(inner)) is not None), None)
