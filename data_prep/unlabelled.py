"""Records to predict: read in any format, whether they have labels or not, and prepared in their order.

Every record becomes a line of one file, its fields under our names, with a `Blank` in the place of what is to be
predicted. That file is prepared like any other, so a document of the store leads to its record by its line.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import IO, Any

from data_prep.config import DataConfig, SourceConfig
from data_prep.encode.blocks import Names
from data_prep.errors import BadDataError
from data_prep.pipeline.encoder import Encoder
from data_prep.pipeline.work import Job
from data_prep.prepare import prepare
from data_prep.shapes.fields import (
    FIELDS_TO_LEAVE_OUT,
    Reading,
    candidates_of,
    field_names,
    known_fields,
    lookup,
    readings,
)
from data_prep.shapes.misfit import other_format, other_table
from data_prep.shapes.shape import Shape, to_example
from data_prep.shapes.usual_names import usual_candidates
from data_prep.sources.read import read_records
from data_prep.sources.records import Record, SourceFile
from data_prep.sources.scan import find_sources
from data_prep.tasks import TASKS
from data_prep.tasks.data_task import Blank
from data_prep.token_store import TokenStore, open_rows
from data_prep.tokenizer.open import open_tokenizer

_LOOKED_AT_RECORDS = 100
_ENCODED_AT_ONCE = 256
#: The field of a record that holds the blank while the names of its other fields are looked for.
_BLANK_FIELD = "(blank)"
_ID_FIELDS = ("id", "guid", "uid")


@dataclass
class Unlabelled:
    """The records of an input, numbered from 0 in their order, and what became of each.

    A record is in `faults`, which say why it cannot be used, or it has documents in the store. `path` is the file of
    records: an object a line, with "id", "where" and "fields" (our names).
    """

    path: Path
    repeats: tuple[str, ...] = ()  # our fields that a prediction has beside it
    num_records: int = 0
    faults: dict[int, str] = field(default_factory=dict)
    store: Path | None = None  # None: no record can be used
    documents: dict[int, list[int]] = field(default_factory=dict)  # of each record, in their order

    def lines(self) -> Iterator[dict[str, Any]]:
        """The objects of the file, one for each record."""
        with self.path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def prepare_unlabelled(
    config: DataConfig, section: Mapping[str, Any], task: str, blank: Blank, folder: Path
) -> Unlabelled:
    """Prepare the records of ``data.validation`` for predictions, in `folder`. Raises PreparationError.

    A record that cannot be read or encoded stops nothing: it is among the faults.
    """
    assert config.validation is not None
    found = Unlabelled(folder / "records.jsonl", blank.repeats)
    files = find_sources(config.validation, "data.validation", folder / ".cache")
    with found.path.open("w", encoding="utf-8") as out:
        for source, own in zip(config.validation, files, strict=True):
            _write_source(own, _shape(own, source, blank), blank, found, out)
    if not found.num_records:
        raise BadDataError(f"{files[0][0].label}: the file holds no records")
    if len(found.faults) < found.num_records:
        shape = _written_shape(found, blank)
        try:
            _prepare(_settings(config, task, shape, found.path, folder), section, task, found)
        except BadDataError:
            _find_faults(config, task, shape, found)
            if len(found.faults) < found.num_records:
                raise
        else:
            _find_faults(config, task, shape, found)
    return found


def _shape(files: Sequence[SourceFile], source: SourceConfig, blank: Blank) -> Shape | None:
    """The shape of a source's records, from the first of them that tells the names of its fields.

    None if the source has no record that can be read.
    """
    given = {ours: theirs for ours, theirs in source.fields.items() if ours != blank.field}
    given[blank.field] = _BLANK_FIELD
    records = (record for file in files for record in read_records(file, on_fault=lambda _fault, _line: None))
    first = list(islice(records, _LOOKED_AT_RECORDS))
    for record in first:
        value = {**record.value, _BLANK_FIELD: ""}
        candidates = candidates_of((blank.shape,), given, True)
        found = readings(value, candidates) or readings(value, usual_candidates(value, (blank.shape,), given, True))
        if len(found) == 1:
            return Shape(blank.shape, dict(found[0].names))
        if found:
            raise BadDataError(f"{record.where}: {_said(found)}; say which with `fields: {{...}}` of the source")
    if not first:
        return None
    wanted = [name for name in known_fields(blank.shape) if name != blank.field and name not in FIELDS_TO_LEAVE_OUT]
    named = ", ".join(f"{name}: their name" for name in wanted)
    other = other_format(first, source, (blank.shape,)) or other_table(first[0], source)
    raise BadDataError(
        f"{first[0].where}: no field is known as the {' or the '.join(wanted)} (fields: {field_names(first[0].value)});"
        f" name it in the source, as {{path: ..., fields: {{{named}}}}}{other}"
    )


def _said(found: Sequence[Reading]) -> str:
    ways = [", ".join(f"{ours} = {theirs}" for ours, theirs in one.names if theirs != _BLANK_FIELD) for one in found]
    return f"this record can be read in several ways: {' or '.join(ways)}"


def _write_source(
    files: Sequence[SourceFile], shape: Shape | None, blank: Blank, found: Unlabelled, out: IO[str]
) -> None:
    """Write a line for each record of a source, also for those that cannot be read."""

    def write(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        found.num_records += 1

    def on_fault(fault: BadDataError, line: int) -> None:
        found.faults[found.num_records] = str(fault)
        write({"id": f"{file.label}:{line}", "where": f"{file.label}:{line}"})

    for file in files:
        for record in read_records(file, on_fault=on_fault):
            assert shape is not None
            fields = {ours: lookup(record.value, theirs) for ours, theirs in shape.fields.items()}
            fields[blank.field] = blank.value(fields)
            head = {"id": _id(record), "where": record.where}
            try:
                example_of = Shape(shape.name, {name: name for name in fields}, isinstance(fields[blank.field], list))
                to_example(example_of, record._replace(value=fields))
            except BadDataError as fault:
                found.faults[found.num_records] = str(fault)
                write(head)
            else:
                write({**head, "fields": fields})


def _id(record: Record) -> str | int:
    """The record's own id, or its place."""
    own = next((record.value[name] for name in _ID_FIELDS if name in record.value), None)
    return own if isinstance(own, str | int) and not isinstance(own, bool) else record.where


def _written_shape(found: Unlabelled, blank: Blank) -> Shape:
    """The shape of the lines of the file of records."""
    fields = next(line["fields"] for line in found.lines() if "fields" in line)
    many = isinstance(fields[blank.field], list)
    return Shape(blank.shape, {name: f"fields.{name}" for name in fields}, many)


def _settings(config: DataConfig, task: str, shape: Shape, path: Path, folder: Path) -> DataConfig:
    """The settings with the file of records as the only source, of which no record stops the others."""
    source = SourceConfig(path=str(path), format="jsonl", shape=shape.name, fields=dict(shape.fields))
    changes: dict[str, Any] = {
        "store_dir": folder / "store", "train": (source,), "validation": (source,), "label_map": None,
        "unusable": "drop", "max_unusable_fraction": 1.0, "deduplicate": False,
    }  # fmt: skip
    if config.overlong == "error":
        changes["overlong"] = "drop"
    elif config.overlong == "truncate" and TASKS[task].tags_words:  # every word gets a tag
        changes |= {"overlong": "split", "stride_tokens": min(config.stride_tokens, config.row_tokens // 4)}
    return config.model_copy(update=changes)


def _prepare(config: DataConfig, section: Mapping[str, Any], task: str, found: Unlabelled) -> None:
    """Make the store of the file of records, and note the documents of each."""
    folders = prepare(config, section, task, progress=False, held_out_only=True)
    store = TokenStore.open(folders["validation"])
    rows = open_rows(store, config.row_tokens)
    for document in sorted(set(rows.documents.tolist())):
        line = int(store.locate(document).rpartition(":")[2])
        found.documents.setdefault(line - 1, []).append(document)
    found.store = store.path


def _find_faults(config: DataConfig, task: str, shape: Shape, found: Unlabelled) -> None:
    """Encode the records without a document once more, alone, for what is wrong with each."""
    missing = [
        (number, Record(line, line["where"], number + 1))
        for number, line in enumerate(found.lines())
        if number not in found.documents and number not in found.faults
    ]
    if not missing:
        return
    tokenizer = open_tokenizer(config.tokenizer)
    job = Job(TASKS[task], config, Path(config.tokenizer), None, datetime.now(), False, ())
    encoder = Encoder(job, tokenizer)
    for begin in range(0, len(missing), _ENCODED_AT_ONCE):
        some = missing[begin : begin + _ENCODED_AT_ONCE]
        numbers = [number for number, _ in some]

        def on_fault(index: int, fault: BadDataError, numbers: Sequence[int] = numbers) -> None:
            found.faults[numbers[index]] = str(fault).partition(" (data.min_targets")[0]

        encoder.encode([record for _, record in some], shape, encoder.context(Names()), on_fault)
