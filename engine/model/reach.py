"""Parameters that a task never reaches: found before any weight is read, by training a narrow model for one batch."""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from engine.errors import DataError
from engine.model.attention import register_packed_attention
from engine.model.frozen import freeze, freeze_patterns
from engine.model.isolation import attention_of, sample_of
from engine.model.narrow import narrow_model
from engine.tasks.task import LossOptions, Task

_DOES_NOT_RUN = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, AssertionError, DataError)
_EXPERT = re.compile(r"\.experts\.\d+\.")  # which of them a token reaches is the router's choice


def unreached_parameters(config: Any, task: Task, frozen: Sequence[str] = ()) -> tuple[str, ...]:
    """Patterns for `model.freeze` that name the trained parameters without any path from the loss of `task`.

    `config` is the configuration of a model for `task`, `frozen` the patterns that the run file has. Empty
    where every parameter is reached, and for a family that does not run in a narrow form: there the first step
    finds what is missing. ConfigError as `freeze` raises it.
    """
    register_packed_attention()
    for is_whole in (False, True):
        # Some families have sizes of their own that the narrow form does not fit: then as it is.
        with suppress(*_DOES_NOT_RUN):
            return _unreached(_trained_once(config, task, frozen, is_whole))
    return ()


def _trained_once(config: Any, task: Task, frozen: Sequence[str], is_whole: bool) -> Any:
    """A narrow model with the gradients of one batch."""
    model = narrow_model(config, task, attention_of(task), is_whole)
    freeze(model, frozen)
    task.loss(model, sample_of(task, model), LossOptions()).loss_sum.backward()  # type: ignore[no-untyped-call]
    return model


def _unreached(model: Any) -> tuple[str, ...]:
    prefix = f"{model.base_model_prefix}."
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    lost = {name for name, parameter in trained.items() if parameter.grad is None and not _EXPERT.search(name)}
    outer = {name: name.removeprefix(prefix) for name in trained}
    return freeze_patterns({outer[name] for name in lost}, set(outer.values()))
