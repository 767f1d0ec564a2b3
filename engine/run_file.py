"""Reads a run file: strict YAML with line numbers, overrides, and errors that say what to write.

YAML as people expect it: ``2e-5`` is a number, only ``true`` and ``false`` are booleans, a key
given twice is an error, and there are no tags, so nothing in the file can name code.
"""

import copy
import difflib
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from engine.errors import ConfigError, MissingInputError
from engine.secrets_in_text import find_secrets
from engine.zero.ds_config import shipped_ds_configs

Model = TypeVar("Model", bound=BaseModel)


# Keys whose value is (or may be) a path, relative to the current directory in a run file.
_OUTPUT_PATHS = ("run_dir", "data.store_dir", "nvme_path")
_INPUT_PATHS = ("data.train", "data.validation", "data.tokenizer", "data.chat.template", "model.path", "deepspeed")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own class attribute, filled below

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$", "-+0123456789."),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), [*list(_first), ""])


class RunFile:
    """The values of one run file and the line each dotted key stands on.

    ``values`` is plain data; `parse` turns the whole of it, or one section, into a pydantic model.
    """

    def __init__(self, path: Path, values: dict[str, Any], lines: dict[str, int]):
        self.path = path
        self.values = values
        self.lines = lines

    def parse(self, model: type[Model], section: str | None = None) -> Model:
        """Validate the file, or one of its sections, as `model`; ConfigError names the first fault."""
        values = self.values if section is None else self.values.get(section)
        prefix = () if section is None else (section,)
        if section is not None and values is None:
            raise ConfigError(f"{self.path}: section `{section}` is missing")
        try:
            return model.model_validate(values)
        except ValidationError as error:
            faults = error.errors(include_url=False)
            # A misspelt required key is also a missing one: the misspelling is what to tell.
            first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
            raise ConfigError(self._describe(first, prefix, model)) from error

    def _describe(self, fault: ErrorDetails, prefix: tuple[str, ...], model: type[BaseModel]) -> str:
        location = prefix + tuple(str(part) for part in fault["loc"] if not str(part).startswith("function-"))
        dotted = ".".join(location)
        line = next(
            (self.lines[".".join(location[:n])] for n in range(len(location), 0, -1)
             if ".".join(location[:n]) in self.lines), None,
        )  # fmt: skip
        where = f"{self.path}:{line}" if line else str(self.path)
        if fault["type"] == "extra_forbidden":
            return f"{where}: unknown key `{dotted}`{_suggestion(location[len(prefix) :], model)}"
        if fault["type"] == "missing":
            return f"{where}: `{dotted}` is missing"
        message = fault["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:] if message.startswith("Input ") else message
        got = "" if fault["type"] == "value_error" else f", not {fault['input']!r}"
        return f"{where}: {f'`{dotted}`: ' if dotted else ''}{message}{got}"


def _suggestion(location: tuple[str, ...], model: type[BaseModel]) -> str:
    """Name the key that was probably meant, looking first in the same section, then everywhere."""
    here: Any = model
    for part in location[:-1]:
        field = here.model_fields.get(part)
        here = field.annotation if field else None
        if not (isinstance(here, type) and issubclass(here, BaseModel)):
            return ""
    near = difflib.get_close_matches(location[-1], list(here.model_fields), n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{'.'.join((*location[:-1], near[0]))}`?"
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel) and location[-1] in nested.model_fields:
            return f"; it belongs to section `{name}`"
    return f"; known keys here: {', '.join(here.model_fields)}"


def load_run_file(path: Path, overrides: list[str] | None = None) -> RunFile:
    """Read `path` and apply ``dotted.key=value`` overrides. No side effects.

    Raises MissingInputError without the file, ConfigError for anything wrong in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such run file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    node = _compose(text, str(path))
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: a run file is a mapping of sections, for example `model: {path: models/base}`")
    lines: dict[str, int] = {}
    values = _construct(node, "", str(path), lines)
    for override in overrides or []:
        _apply_override(values, override)
    for dotted in find_secrets(values):  # the run folder will hold these values, and perhaps be shared
        where = f"{path}:{lines[dotted]}" if dotted in lines else str(path)
        raise ConfigError(
            f"{where}: `{dotted}` holds what looks like a token, a key or a URL with a user in it: leave it out, and "
            "give the secret in the environment (HF_TOKEN, ...) or in the tool's own file"
        )
    return RunFile(path, values, lines)


def _compose(text: str, name: str) -> yaml.Node | None:
    loader = None
    try:
        loader = _StrictLoader(text)
        return loader.get_single_node()
    except RecursionError:
        raise ConfigError(f"{name}: not a run file: nested too deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(
            f"{where}: not valid YAML: {getattr(error, 'problem', None) or str(error).splitlines()[0]}"
        ) from error
    finally:
        if loader is not None:
            loader.dispose()


def _construct(node: yaml.Node, dotted: str, name: str, lines: dict[str, int]) -> Any:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            inner = f"{dotted}.{key}" if dotted else str(key)
            key_line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key == "<<":
                raise ConfigError(f"{name}:{key_line}: keys are plain words")
            if key in result:
                raise ConfigError(f"{name}:{key_line}: `{inner}` is given twice (first on line {lines[inner]})")
            lines[inner] = key_line
            result[key] = _construct(value_node, inner, name, lines)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, f"{dotted}.{i}", name, lines) for i, item in enumerate(node.value)]
    if node.tag.removeprefix("tag:yaml.org,2002:") not in ("bool", "int", "float", "null", "str"):
        raise ConfigError(f"{name}:{line}: tags such as {node.tag} are not allowed")
    try:
        loader = _StrictLoader("")
        return loader.construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}:{line}: `{dotted}`: {error}") from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    keys = dotted.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override `{override}`: write dotted.key=value, for example optimizer.learning_rate=2e-5")
    node = _compose(text, f"override `{override}`")
    value = None if node is None else _construct(node, dotted, f"override `{override}`", {})
    section = values
    for depth, key in enumerate(keys[:-1]):
        inner = section.setdefault(key, {})
        if inner is None:
            inner = section[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override `{override}`: `{'.'.join(keys[: depth + 1])}` is not a section")
        section = inner
    section[keys[-1]] = value


def with_absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    """The same values, independent of the current directory: a Hub name stays, a file that exists does not."""
    values = copy.deepcopy(values)
    for dotted in (*_OUTPUT_PATHS, *_INPUT_PATHS):
        *sections, key = dotted.split(".")
        holder = values
        for section in sections:
            holder = holder.get(section) or {}
        given = holder.get(key)
        if given is None or (dotted == "deepspeed" and given in shipped_ds_configs()):
            continue
        holder[key] = _absolute_source(given, dotted in _OUTPUT_PATHS)
    return values


def _absolute_source(value: Any, is_output: bool) -> Any:
    """A path, or sources of records: lists of paths or of mappings that hold one or several."""
    if isinstance(value, list):
        return [_absolute_source(item, is_output) for item in value]
    if isinstance(value, dict):
        paths = {key: _absolute(value[key], False) for key in ("path", "hub") if key in value}
        if isinstance(value.get("aligned"), dict):
            paths["aligned"] = {name: _absolute(path, False) for name, path in value["aligned"].items()}
        return {**value, **paths}
    return _absolute(value, is_output)


def _absolute(value: Any, is_output: bool) -> Any:
    if not isinstance(value, str):
        return value
    # A pattern such as data/*.jsonl does not exist itself; the folder it starts in does.
    start = Path(value.partition("*")[0] if "*" in value else value)
    return str(Path(os.path.abspath(value))) if is_output or start.exists() else value  # noqa: PTH100 (keeps symlinks)


def dump_yaml(values: dict[str, Any]) -> str:
    """The text of a run file that `load_run_file` reads back to equal values."""
    text = yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return str(text)


class _PlainDumper(yaml.SafeDumper):
    """Quotes exactly what `_StrictLoader` would otherwise read as another type."""

    yaml_implicit_resolvers = _StrictLoader.yaml_implicit_resolvers


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(value))


_PlainDumper.add_representer(float, _represent_float)
