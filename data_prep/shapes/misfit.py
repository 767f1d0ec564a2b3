"""The message for records that no shape fits: what comes nearest, what it lacks, and the line to write."""

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from data_prep.config import ShapeName, SourceConfig
from data_prep.shapes.fields import (
    FIELDS_TO_LEAVE_OUT,
    OPTIONAL,
    Reading,
    dotted_names,
    known_fields,
    lookup,
    shown,
    shown_list,
)
from data_prep.shapes.usual_names import folded, names_of
from data_prep.sources.read_csv import Dialect, other_delimiter
from data_prep.sources.records import Record

_TAG = re.compile(r"O|[BIES]-\S+|[A-Z$.,:'`]{1,6}")
_MOST_NEAREST = 3
_CLOSE = 0.8  # share of letters that a misspelt name has in common with a usual one


def nearest_forms(record: Record, shapes: Sequence[ShapeName], given: Mapping[str, str]) -> str:
    """For the shapes that lack least: the fields they find, those they lack, and the `fields:` to write."""
    found = []
    for shape in shapes:
        wanted = [name for name in known_fields(shape) if name not in FIELDS_TO_LEAVE_OUT]
        filled = {ours: theirs for ours in wanted if (theirs := _nearest(record.value, shape, ours, given))}
        lacking = [ours for ours in wanted if ours not in filled]
        for ours in OPTIONAL.get(shape, {}):
            theirs = _nearest(record.value, shape, ours, given)
            if theirs is not None and "." in theirs:  # one that is no field of its own is not found by itself
                filled[ours] = theirs
        found.append((len(lacking), -len(filled), shape, filled, lacking))
    least = min(found)[:1]
    best = [one for one in sorted(found, key=lambda one: one[:2]) if one[:1] == least and one[3]][:_MOST_NEAREST]
    if not best:
        best = [one for one in found if not one[3]][: _MOST_NEAREST - 1] if record.value else []
    if not best:
        return ""
    said = [_advice(record, shape, filled, lacking) for _, _, shape, filled, lacking in best]
    return "; nearest: " + " or ".join(said)


def _advice(record: Record, shape: ShapeName, filled: Mapping[str, str], lacking: Sequence[str]) -> str:
    used = set(filled.values())
    names = {ours: shown(filled.get(ours, "...")) for ours in (*filled, *lacking)}
    line = f"`shape: {shape}` with `fields: {{{', '.join(f'{ours}: {theirs}' for ours, theirs in names.items())}}}`"
    if not lacking:
        return line
    free = [name for name in dotted_names(record.value) if lookup(record.value, name) is not None and name not in used]
    choice = f" (one of {shown_list(free)})" if free else ""
    return f"{line}, which lacks {' and '.join(lacking)}{choice}"


def _nearest(value: Mapping[str, Any], shape: ShapeName, ours: str, given: Mapping[str, str]) -> str | None:
    """The field that our field `ours` could be by its name: a usual one, or one that is nearly so written."""
    if ours in given:
        return given[ours] if given[ours] in value else None
    usual = names_of(shape, ours)
    names = {
        folded(key.rpartition(".")[2]): key for key in reversed(dotted_names(value)) if lookup(value, key) is not None
    }
    exact = next((names[name] for name in usual if name in names), None)
    if exact is not None:
        return exact
    return next((key for name, key in names.items() if get_close_matches(name, usual, 1, _CLOSE)), None)


def other_format(records: Sequence[Record], config: SourceConfig, shapes: Sequence[ShapeName]) -> str:
    """Advice for lines of text that look like records of another format; else nothing."""
    if "roles" in shapes and "deprel" in records[0].value:
        return "; `format: conllup` reads the predicates and roles that stand in columns behind the ten of CoNLL-U"
    if config.format not in (None, "text") or any(list(record.value) != ["text"] for record in records):
        return ""
    lines = [str(record.value["text"]) for record in records]
    if is_json(lines):
        return "; its lines are JSON objects: write `format: jsonl`"
    tabs = any("\t" in line for line in lines)
    cells = [line.split("\t" if tabs else " ") for line in lines]
    counts = {len(row) for row in cells}
    tagged = all(_TAG.fullmatch(row[-1]) and not any(" " in cell for cell in row) for row in cells)
    if len(counts) > 1 or counts == {1} or len(lines) < 2 or not (tabs or tagged):
        return _other_table(lines)
    (count,) = counts
    gaps = any(two.line > one.line + 1 for one, two in pairwise(records))
    if tagged and (gaps or not tabs or "tags" in shapes):
        columns = "" if count == 2 else " and `columns: [token, ..., tag]`"
        return f"; its lines are words with {count} columns: write `format: conll`{columns}"
    return (
        f"; its lines are {count} columns separated by tabs: write `format: tsv`, and `columns: [...]` if the first"
        " line is no header"
    )


def other_table(record: Record, config: SourceConfig) -> str:
    """Advice for a table whose first line may be no header, or whose columns are parted by another character."""
    name = record.where.rpartition(":")[0].lower()
    ending = next((one for one in (".csv", ".tsv", ".tab") if name.removesuffix(".gz").endswith(one)), "")
    if config.columns is not None or not (ending or config.format in ("csv", "tsv")):
        return ""
    usual = "," if config.format == "csv" or ending == ".csv" else "\t"
    dialect = Dialect(config.delimiter or usual, config.quoting)
    columns = ", ".join(["..."] * len(record.value))
    return other_delimiter(list(record.value), dialect) or (
        f"; if the file has no header line, name its `columns:` ({len(record.value)}: `columns: [{columns}]`)"
    )


def _other_table(lines: Sequence[str]) -> str:
    for mark in ";|,":
        counts = {line.count(mark) for line in lines}
        if len(counts) == 1 and counts != {0} and len(lines) > 1:
            delimiter = "" if mark == "," else f" and `delimiter: {json.dumps(mark)}`"
            return f"; its lines are {counts.pop() + 1} columns separated by {mark!r}: write `format: csv`{delimiter}"
    return ""


def is_json(lines: Sequence[str]) -> bool:
    """True if every line is a JSON object."""
    try:
        return bool(lines) and all(line.lstrip()[:1] == "{" and isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def readings_said(found: Sequence[Reading]) -> str:
    """The readings of a record for a message."""
    said = [f"{one.shape} ({', '.join(f'{ours} = {shown(theirs)}' for ours, theirs in one.names)})" for one in found]
    return " and ".join(said[:4]) or "no shape"


def how_to_ask(one: Reading, found: Sequence[Reading]) -> str:
    """The keys of a run file that choose this reading and none of the others."""
    rivals = [other for other in found if other.shape == one.shape and other != one]
    if not rivals:
        return f"`shape: {one.shape}`"
    names = {ours: shown(theirs) for ours, theirs in one.names}
    left_out = {ours: '""' for other in rivals for ours, _ in other.names if ours not in names}
    fields = ", ".join(f"{ours}: {theirs}" for ours, theirs in {**names, **left_out}.items())
    shape = "" if len(rivals) + 1 == len(found) else f"`shape: {one.shape}` and "
    return f"{shape}`fields: {{{fields}}}`"
