"""The names behind label numbers that a file or its folder brings along, as `datasets` writes them.

They stand in the schema of Parquet and Arrow files, in ``dataset_info.json`` and ``dataset_infos.json`` of a folder,
and in the YAML that begins its ``README.md``.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from data_prep.sources.archives import split_member
from data_prep.sources.read_tables import schema_metadata
from data_prep.sources.records import SourceFile

_DESCRIPTION_BYTES = 16 << 20
_FOLDERS_UP = 2  # the file's own folder and the one above: data files often lie in data/


def class_names(source: SourceFile, field: str) -> tuple[str, ...] | None:
    """The names of the numbers in a field of the records, in their order; None where nothing says them.

    Of several descriptions the nearest to the data counts; those of several configurations must agree.
    """
    if source.format in ("parquet", "arrow"):
        written = schema_metadata(source.path, source.compression)
        if names := _names_in(_json(written).get("info"), field):
            return names
    if source.format == "aligned" or split_member(source.path) is not None:
        return None
    beside = Path(source.path).absolute()
    for folder in [beside.with_suffix(".names"), *beside.parents][: 1 + _FOLDERS_UP]:
        found = {names for described in _descriptions(folder) if (names := _names_in(described, field))}
        if len(found) == 1:
            return found.pop()
    return None


def class_labels(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Field -> names of its numbers, of the features of a data set that `datasets` has opened."""
    found = {name: _class_label(feature) for name, feature in features.items()}
    return {name: names for name, names in found.items() if names}


def _class_label(feature: Any) -> list[str] | None:
    feature = getattr(feature, "feature", feature)  # of a list of class labels
    if isinstance(feature, list) and feature:
        (feature,) = feature
    names = getattr(feature, "names", None)
    return [str(name) for name in names] if isinstance(names, list) else None


def _descriptions(folder: Path) -> Iterator[Any]:
    """Objects with ``features``, of all files in a folder that describe data."""
    if folder.suffix == ".names":  # what was kept beside a spooled data set
        yield _json(_read(folder))
        return
    yield _json(_read(folder / "dataset_info.json"))
    yield from _json(_read(folder / "dataset_infos.json")).values()
    card = _read(folder / "README.md")
    if card.startswith(("---\n", "---\r\n")):
        try:
            header = yaml.safe_load(card.split("\n---", 1)[0])
        except yaml.YAMLError:
            return
        described = header.get("dataset_info") if isinstance(header, dict) else None
        yield from described if isinstance(described, list) else [described]


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(_DESCRIPTION_BYTES)
    except (OSError, UnicodeDecodeError):
        return ""


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _names_in(described: Any, field: str) -> tuple[str, ...] | None:
    """The class names of one field in the ``features`` of a description, in any of the forms that they have."""
    features = described.get("features") if isinstance(described, dict) else None
    if isinstance(features, list):  # the YAML of a README: a list of {name, dtype}
        features = {one.get("name"): one for one in features if isinstance(one, dict)}
    feature: Any = features
    for part in field.split("."):
        feature = feature.get(part) if isinstance(feature, dict) else None
    return _names_of(feature)


def _names_of(feature: Any) -> tuple[str, ...] | None:
    """The names of a ClassLabel, or of a list of them, as JSON or as YAML has it."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    if not isinstance(feature, dict):
        return None
    for inner in ("feature", "sequence", "list", "class_label", "dtype"):
        if isinstance(feature.get(inner), dict | list) and "names" not in feature:
            return _names_of(feature[inner])
    names = feature.get("names")
    if isinstance(names, dict):  # number -> name, the numbers as texts
        try:
            names = [names[key] for key in sorted(names, key=int)]
        except ValueError:
            return None
    if not isinstance(names, list) or len(set(map(str, names))) != len(names):
        return None
    return tuple(map(str, names)) or None
