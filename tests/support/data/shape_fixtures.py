"""Records and what becomes of them, for the tests of shapes."""

import re
from collections.abc import Sequence
from typing import Any

import pytest

from data_prep.config import SourceConfig
from data_prep.errors import BadDataError
from data_prep.shapes.examples import Example
from data_prep.shapes.recognise import recognise
from data_prep.shapes.shape import Shape, to_example
from data_prep.sources.records import Record
from data_prep.tasks import TASKS

SHAPES_OF = {task.name: task.shapes for task in TASKS.values()}


def record(value: dict[str, Any], line: int = 1) -> Record:
    return Record(value, f"data.jsonl:{line}", line)


def records(values: Sequence[dict[str, Any]]) -> list[Record]:
    return [record(value, line) for line, value in enumerate(values, start=1)]


def recognised(values: dict[str, Any] | list[dict[str, Any]], task: str = "causal_lm", **options: Any) -> Shape:
    found = values if isinstance(values, list) else [values]
    return recognise(records(found), SourceConfig(path="data.jsonl", **options), task, SHAPES_OF)


def example(value: dict[str, Any], task: str = "causal_lm", **options: Any) -> Example:
    return to_example(recognised(value, task, **options), record(value))


def refusal(values: dict[str, Any] | list[dict[str, Any]], task: str = "causal_lm", **options: Any) -> str:
    """What is said about records that cannot be read; always one line that begins with a place."""
    with pytest.raises(BadDataError) as caught:
        recognised(values, task, **options)
    message = str(caught.value)
    assert "\n" not in message and re.match(r"data\.jsonl:\d+: ", message) and len(message) < 1000
    return message


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


HI = turns(("user", "hi"), ("assistant", "hello"))
