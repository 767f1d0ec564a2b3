"""Reads a run file: strict YAML with line numbers, overrides, and errors that say what to write.

YAML as people expect it: ``2e-5`` is a number, only ``true`` and ``false`` are booleans, a key
given twice is an error, and there are no tags, so nothing in the file can name code.
"""

import copy
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from engine.errors import ConfigError, MissingInputError
from engine.run_faults import Places, describe_faults
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
    """The values of one run file, and the places where they were written.

    ``values`` is plain data; `parse` turns the whole of it, or one section, into a pydantic model. ``faults`` are
    those of the text itself, such as a key given twice, by dotted key; `parse` names them together with its own.
    """

    def __init__(self, path: Path, values: dict[str, Any], places: Places, faults: Mapping[str, str] | None = None):
        self.path = path
        self.values = values
        self.places = places
        self.faults = dict(faults or {})

    def parse(self, model: type[Model], section: str | None = None) -> Model:
        """Validate the file, or one of its sections, as `model`; ConfigError names every fault, one a line."""
        faults = self.find_faults(model, section)
        if faults:
            raise ConfigError("\n".join(faults))
        return model.model_validate(self.values if section is None else self.values[section])

    def find_faults(
        self, model: type[BaseModel], section: str | None = None, needed: Collection[str] | None = None
    ) -> list[str]:
        """A line for every fault, in the text and against `model`.

        With `needed`, names of sections, what is missing outside of these is no fault; what is there is checked.
        """
        values = self.values if section is None else self.values.get(section)
        own = list(self.faults.values())
        if section is not None and values is None:
            return [*own, f"{self.path}: section `{section}` is missing"]
        try:
            model.model_validate(values)
        except ValidationError as error:
            prefix = () if section is None else (section,)
            found = [
                fault
                for fault in error.errors(include_url=False)
                if (needed is None or fault["type"] != "missing" or fault["loc"][0] in needed)
                and not self._follows(".".join((*prefix, *map(str, fault["loc"]))))
            ]
            return own + describe_faults(found, self.places, prefix, model)
        return own

    def _follows(self, dotted: str) -> bool:
        """True if a fault at `dotted` is about a value that the text's own faults have spoilt."""
        return any(f"{spoilt}.".startswith(f"{dotted}.") or dotted.startswith(f"{spoilt}.") for spoilt in self.faults)


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
        raise ConfigError(f"{path}: a run file is a mapping of sections, for example `model: {{path: models/base}}`")
    text_of = _Text(str(path))
    values = text_of.construct(node, "")
    given: dict[str, str] = {}
    for override in overrides or []:
        text_of.faults |= _apply_override(values, override, given)
    places = Places(path, text_of.lines, given)
    secrets = [  # the run folder will hold these values, and perhaps be shared
        f"{places.of(tuple(dotted.split('.')))}: `{dotted}` holds what looks like a token, a key or a URL with a user "
        "in it: leave it out, and give the secret in the environment (HF_TOKEN, ...) or in the tool's own file"
        for dotted in find_secrets(values)
    ]
    if secrets:
        raise ConfigError("\n".join([*secrets, *text_of.faults.values()]))
    return RunFile(path, values, places, text_of.faults)


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


class _Text:
    """Makes plain values of YAML nodes, and notes the line of every key and what is wrong with the text."""

    def __init__(self, name: str):
        self._name = name
        self.lines: dict[str, int] = {}
        self.faults: dict[str, str] = {}

    def construct(self, node: yaml.Node, dotted: str) -> Any:
        """The value of `node`, which stands at `dotted`; None where it has a fault of its own."""
        line = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, dotted)
        if isinstance(node, yaml.SequenceNode):
            return [self.construct(item, f"{dotted}.{i}") for i, item in enumerate(node.value)]
        if node.tag.removeprefix("tag:yaml.org,2002:") not in ("bool", "int", "float", "null", "str"):
            self.faults[dotted] = f"{self._name}:{line}: tags such as {node.tag} are not allowed"
            return None
        try:
            return _StrictLoader("").construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            self.faults[dotted] = f"{self._name}:{line}: `{dotted}`: {error}"
            return None

    def _mapping(self, node: yaml.MappingNode, dotted: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            inner = f"{dotted}.{key}" if dotted else str(key)
            if not isinstance(key_node, yaml.ScalarNode) or key == "<<":
                self.faults[inner] = f"{self._name}:{line}: keys are plain words"
            elif key in result:
                first = self.lines[inner]
                self.faults[inner] = f"{self._name}:{line}: `{inner}` is given twice (first on line {first})"
            else:
                self.lines[inner] = line
                result[key] = self.construct(value_node, inner)
        return result


def _apply_override(values: dict[str, Any], override: str, given: dict[str, str]) -> dict[str, str]:
    """Set the override's key in `values` and note it in `given`; its faults, by dotted key."""
    dotted, separator, text = override.partition("=")
    keys = dotted.split(".")
    name = f"override `{override}`"
    if not separator or not all(keys):
        return {override: f"{name}: write dotted.key=value, for example optimizer.learning_rate=2e-5"}
    try:
        node = _compose(text, name)
    except ConfigError as error:
        return {dotted: str(error)}
    text_of = _Text(name)
    value = None if node is None else text_of.construct(node, dotted)
    section = values
    for depth, key in enumerate(keys[:-1]):
        inner = section.setdefault(key, {})
        if inner is None:
            inner = section[key] = {}
        if not isinstance(inner, dict):
            what = "a list: give all of it, in [...]" if isinstance(inner, list) else "not a section"
            return {dotted: f"{name}: `{'.'.join(keys[: depth + 1])}` is {what}"}
        section = inner
    section[keys[-1]] = value
    given[dotted] = override
    return text_of.faults


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
