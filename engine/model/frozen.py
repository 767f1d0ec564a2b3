"""Parameters that are not trained: by the run file's patterns, and the patterns for what a task never reaches.

A pattern is a shell pattern over the names of parameters as the model has them. The model's outermost
prefix (mostly ``model.``) may be left out, and a module's name stands for all parameters in it.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from engine.errors import ConfigError

_NEAR = 3


def freeze(model: Any, patterns: Sequence[str]) -> None:
    """Switch off training for the parameters that `patterns` name; tied ones are one, under any of their names.

    ConfigError for patterns that match nothing, all at once with names that are near, and where nothing is left.
    """
    frozen = frozen_names(model, patterns)
    parameters = dict(model.named_parameters())
    if patterns and len(frozen) == len(parameters):
        raise ConfigError("model.freeze: these patterns freeze every parameter, so there is nothing to train")
    for name in frozen:
        parameters[name].requires_grad_(False)


def frozen_names(model: Any, patterns: Sequence[str]) -> set[str]:
    """The names of the parameters, as `named_parameters` gives them, that `patterns` match. ConfigError as `freeze`."""
    prefix = f"{model.base_model_prefix}."
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    frozen: set[str] = set()
    lost: list[str] = []
    for pattern in patterns:
        found = {names[name] for name in names if matches(name, pattern, prefix)}
        frozen |= found
        if not found:
            lost.append(f"{pattern!r} matches no parameter{_near(pattern, names)}")
    if lost:
        raise ConfigError(f"model.freeze: {'; '.join(lost)}")
    return frozen


def body_patterns(model: Any) -> tuple[str, ...]:
    """Patterns for all of a model but its head: what lies outside the base model, and a pooler in it.

    Checkpoints often lack the pooler, which is part of the head then.
    """
    prefix = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters()]
    return freeze_patterns([name for name in names if name.startswith(prefix) and "pooler" not in name], names)


def check_body(model: Any, key: str) -> None:
    """Raise ConfigError for a model whose body is no module of its own, so that `key` cannot tell it from the head."""
    if model.base_model is model:
        raise ConfigError(f"{key}: {type(model).__name__} does not keep its body apart from its head: leave it out")


def matches(name: str, pattern: str, prefix: str) -> bool:
    """True if `pattern` names this parameter, or a module that it is in; `prefix` may be left out."""
    return any(
        fnmatchcase(candidate, wanted)
        for candidate in (name, name.removeprefix(prefix))
        for wanted in (pattern, f"{pattern}.*")
    )


def _near(pattern: str, names: Iterable[str]) -> str:
    """Names of modules and parameters that look like `pattern`; without any, the outermost modules."""
    parts = [name.split(".") for name in names]
    modules = dict.fromkeys(".".join(part[:count]) for part in parts for count in range(1, len(part)))
    wanted = pattern.rstrip("*.")
    near = difflib.get_close_matches(wanted, [*modules, *names], n=_NEAR, cutoff=0.5)
    last = wanted.rpartition(".")[2]
    near = near or [module for module in modules if difflib.get_close_matches(last, module.split("."), cutoff=0.8)]
    if near:
        return f" (near: {', '.join(near[:_NEAR])})"
    return f" (the model has {', '.join(module for module in modules if module.count('.') < 2)})"


def untrained_lines(model: Any, fresh: Iterable[str], grown: Iterable[str]) -> list[str]:
    """Warnings about frozen parameters that nothing has trained: `fresh` ones, and `grown` ones with new rows."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    new, longer = [name for name in fresh if name in frozen], [name for name in grown if name in frozen]
    lines = []
    if new:
        lines.append(
            f"warning: model.freeze keeps new, untrained weights as they are: {', '.join(new)}; leave them out of "
            "model.freeze to train them"
        )
    if longer:
        lines.append(
            f"warning: model.freeze keeps the rows of new tokens as they start: {', '.join(longer)}; leave them out of "
            "model.freeze to train them"
        )
    return lines


def freeze_patterns(names: Iterable[str], all_names: Iterable[str]) -> tuple[str, ...]:
    """The shortest patterns for `model.freeze` that match all of `names` and no other of `all_names`.

    ``a.b.*`` where everything in the module ``a.b`` is meant, else the parameter's own name; ``layers.*.c`` where it
    is the same in layers of any number.
    """
    chosen = set(names)
    kept = [name for name in all_names if name not in chosen]
    others = {prefix for name in kept for prefix in _modules(name)}
    patterns: dict[str, None] = {}
    for name in sorted(chosen):
        module = next((module for module in _modules(name) if module not in others), None)
        pattern = name if module is None else f"{module}.*"
        in_any_layer = re.sub(r"\.\d+(?=\.)", ".*", pattern)
        patterns[pattern if any(fnmatchcase(name, in_any_layer) for name in kept) else in_any_layer] = None
    return tuple(patterns)


def _modules(name: str) -> list[str]:
    """The modules that a parameter is in, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
