"""What the records of a source are: recognised by the fields of its first ones, then read as examples.

Nothing is guessed: records that two shapes fit, or that differ among themselves, are an error which says
how to decide (`shape:` and `fields:` of the source), and what was recognised is a line for people.
The result of reading:

    text                      TextExample
    prompt, parallel          PromptExample
    alpaca                    PromptExample, prompt = instruction and input with an empty line between;
                              ChatExample if the source has a field for a system prompt or history
    sharegpt, messages        ChatExample
    label, score              LabelledExample, ScoredExample
    tags, roles               TaggedExample, RolesExample
    question                  QuestionExample

A prompt's response and a text may be empty (the ledger counts what has nothing to train); a turn may not.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from data_prep.config import ShapeName, SourceConfig, TurnRole
from data_prep.errors import BadDataError, DataConfigError, none_usable
from data_prep.shapes.chat import TURN_FIELDS
from data_prep.shapes.examples import ChatExample, Example, QuestionExample
from data_prep.shapes.fields import (
    FIELDS_TO_LEAVE_OUT,
    OPTIONAL,
    Reading,
    candidates_of,
    field_names,
    known_fields,
    lookup,
    readings,
    shown,
    shown_list,
)
from data_prep.shapes.flags import FLAG_NAMES
from data_prep.shapes.misfit import how_to_ask, is_json, nearest_forms, other_format, other_table, readings_said
from data_prep.shapes.shape import Shape, number_of, to_example
from data_prep.shapes.turns import (
    FIELDS_OF_TURNS,
    TurnsAsked,
    flags_seen,
    of_records,
    refuse_unknown_roles,
    turn_fields,
    with_turns,
)
from data_prep.shapes.usual_names import other_order, usual_candidates
from data_prep.sources.lines import OnFault, raise_fault
from data_prep.sources.records import Record

TaskShapes = Mapping[str, Sequence[ShapeName]]


def recognise(
    records: Sequence[Record],
    config: SourceConfig,
    task: str,
    shapes_of: TaskShapes,
    on_fault: OnFault = raise_fault,
    roles: Mapping[str, TurnRole] | None = None,
    apply_to: Sequence[str] = (),
) -> Shape:
    """The one shape that all of `records`, the first of a source, have among those that `task` takes.

    `shapes_of` has the shapes that each task takes; those of other tasks are hints for a record that fits none.
    ``shape:`` and ``fields:`` of the source decide over what the records look like. `roles` gives the meaning of
    roles that the records have, `apply_to` the shapes of prompts that become conversations. `on_fault` gets records
    that cannot be read as examples. Raises BadDataError naming file:line (nothing fits, two shapes fit, records
    differ, every record is faulty), DataConfigError for a ``shape:`` or ``fields:`` that cannot be meant.
    """
    shapes = _shapes_asked(config, task, shapes_of[task])
    if not records:
        raise BadDataError(f"{config.path or config.hub or config.name or 'a source'}: holds no records")
    candidates = candidates_of(shapes, of_records(config.fields), config.shape is not None)
    asked = TurnsAsked(config.fields, roles or {}, apply_to, "messages" in shapes_of[task])
    fits = [readings(record.value, candidates) for record in records]
    fits = fits if any(fits) else [_usual_readings(record, shapes, config) for record in records]
    usable = [any(_reads(one, record, asked) for one in own) for record, own in zip(records, fits, strict=True)]
    first = usable.index(True) if any(usable) else next((index for index, own in enumerate(fits) if own), 0)
    found = fits[first]
    if len(found) != 1:
        _refuse(records[first:], found, config, task, shapes, shapes_of)
    _check_agreement(records, fits, usable, first)
    seen = [record for record, is_usable in zip(records, usable, strict=True) if is_usable] or [records[first]]
    shape = with_turns(_shape_of(found[0], seen, config, task, shapes_of[task]), seen, asked)
    read, examples, faults = _examples(shape, records)
    if not examples:
        refuse_unknown_roles(shape, records)
    for fault, line in faults:
        on_fault(fault, line)
    if not examples:
        raise none_usable([fault for fault, _ in faults])
    return replace(shape, summary=_summary(shape, read, examples, len(faults)), flagged=bool(flags_seen(shape, read)))


def _check_agreement(
    records: Sequence[Record], fits: Sequence[list[Reading]], usable: Sequence[bool], first: int
) -> None:
    """Raise BadDataError for a usable record that fits other shapes than record number `first`."""
    for record, others, is_usable in zip(records, fits, usable, strict=True):
        if is_usable and others != fits[first]:
            raise BadDataError(
                f"{record.where}: the records of a source must agree: this one fits {readings_said(others)},"
                f" {records[first].where} is {readings_said(fits[first])}; split the source, or say which with"
                " `shape:` and `fields:`"
            )


def _examples(
    shape: Shape, records: Sequence[Record]
) -> tuple[list[Record], list[Example], list[tuple[BadDataError, int]]]:
    """The records that can be read, their examples, and the faults of the others with their lines."""
    read: list[Record] = []
    examples: list[Example] = []
    faults: list[tuple[BadDataError, int]] = []
    for record in records:
        try:
            examples.append(to_example(shape, record))
            read.append(record)
        except BadDataError as fault:
            faults.append((fault, record.line))
    return read, examples, faults


def _reads(reading: Reading, record: Record, asked: TurnsAsked) -> bool:
    """True if a record can be read so, not only has the fields for it."""
    many = reading.shape == "label" and isinstance(lookup(record.value, dict(reading.names)["label"]), list)
    try:
        to_example(with_turns(Shape(reading.shape, dict(reading.names), many), [record], asked), record)
    except BadDataError:
        return False
    return True


def _usual_readings(record: Record, shapes: Sequence[ShapeName], config: SourceConfig) -> list[Reading]:
    """The readings under names that are usual in published data sets."""
    on_request = config.shape is not None
    return readings(record.value, usual_candidates(record.value, shapes, of_records(config.fields), on_request))


def _shapes_asked(config: SourceConfig, task: str, of_task: Sequence[ShapeName]) -> tuple[ShapeName, ...]:
    """The shapes to look for: the one asked for, else those of the task that have all the given fields."""
    given = list(config.fields)
    for ours, theirs in config.fields.items():
        if not theirs and ours not in FIELDS_TO_LEAVE_OUT | FLAG_NAMES:
            raise DataConfigError(f"fields: {shown(ours)} must be the name of a field, not empty")
    if config.shape is not None:
        if config.shape not in of_task:
            raise DataConfigError(f"shape: {config.shape} does not go with task {task}, which takes {_or(of_task)}")
        known = [*known_fields(config.shape), *FIELDS_OF_TURNS.get(config.shape, ())]
        if unknown := [name for name in given if name not in FLAG_NAMES.union(known)]:
            raise DataConfigError(
                f"fields: {shown(unknown[0])!r} is not a field of shape {config.shape};"
                f" its fields are {', '.join(known)}"
            )
        return (config.shape,)
    shapes = tuple(
        shape
        for shape in of_task
        if set(given) <= FLAG_NAMES.union(known_fields(shape), FIELDS_OF_TURNS.get(shape, ()))
    )
    if not shapes:
        listed = "; ".join(f"{shape}: {', '.join(known_fields(shape))}" for shape in of_task)
        raise DataConfigError(f"fields: no shape of task {task} has {shown_list(given)} (known are {listed})")
    return shapes


def _shape_of(
    reading: Reading, records: Sequence[Record], config: SourceConfig, task: str, of_task: Sequence[ShapeName]
) -> Shape:
    """The shape of records that all have `reading`: optional fields, and what only values tell."""
    name, fields = reading.shape, dict(reading.names)
    optional, refused = _optional_fields(name, records, of_records(config.fields))
    takes_chats = "messages" in of_task
    if not takes_chats and (later := [ours for ours in ("system", "history") if ours in optional]):
        raise DataConfigError(
            f"task {task} takes prompts, not conversations, but the records have {shown(optional[later[0]])!r}"
            f' ({records[0].where}); leave it out with an empty name: `fields: {{{later[0]}: ""}}`'
        )
    many = False
    if name == "label":
        values = [lookup(record.value, fields["label"]) for record in records]
        many = isinstance(values[0], list)
        if config.shape is None and _are_scores(values, fields["label"], records[0].where):
            name, fields = "score", {"score": fields.pop("label"), **fields}
    return Shape(name, {**fields, **optional}, many, refused)


def _optional_fields(
    name: ShapeName, records: Sequence[Record], given: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The optional fields that records have or may still have; and those that must not come unasked."""
    chosen: dict[str, str] = {}
    refused: list[str] = []
    for ours, candidates in OPTIONAL.get(name, {}).items():
        names = (given[ours],) if ours in given else candidates
        have = [theirs for theirs in names if _have(records, theirs)]
        if len(have) > 1:
            how = " or ".join(f"`fields: {{{ours}: {theirs}}}`" for theirs in have)
            raise BadDataError(
                f"{records[0].where}: {' and '.join(have)} could both be the {ours}; say which with {how}"
            )
        if not have and names[0] not in ("", *candidates):
            raise BadDataError(
                f"{records[0].where}: no record seen has field {shown(names[0])!r}, which `fields:` gives for {ours}"
                f" (fields: {field_names(records[0].value)})"
            )
        # A conversation and a prompt become different text: the records of a source must all be one or the other.
        if names[0] and (have or ours in given or ours not in ("system", "history") or name != "alpaca"):
            chosen[ours] = have[0] if have else names[0]
        if ours not in given and name == "alpaca":
            refused += [theirs for theirs in candidates if theirs != chosen.get(ours)]
    return chosen, tuple(refused)


def _have(records: Sequence[Record], name: str) -> bool:
    return any(lookup(record.value, name) is not None for record in records)


def _are_scores(values: Sequence[Any], name: str, where: str) -> bool:
    """True if what stands in a label field are scores: all numbers, and one of them not whole."""
    numbers = [number_of(value) for value in values]
    if any(number is None for number in numbers):
        return False
    if any(number is not None and not number.is_integer() for number in numbers):
        return True
    if any(not isinstance(value, int) and not str(value).strip(" ").lstrip("+-").isdigit() for value in values):
        raise BadDataError(
            f"{where}: field {shown(name)!r} holds whole numbers written with a decimal point; say with"
            " `shape: label` or `shape: score` what they are"
        )
    return False


def _summary(shape: Shape, records: Sequence[Record], examples: Sequence[Example], num_unusable: int) -> str:
    """The line that describe() shows, after the shape's name."""
    fields = {ours: theirs for ours, theirs in shape.fields.items() if _have(records, theirs)}
    notes = [f"{len(records)} records seen agree" if len(records) > 1 else "1 record seen", *_notes(shape, records)]
    if num_unusable:
        notes.insert(1, f"{num_unusable} more cannot be used")
    flags = flags_seen(shape, records)
    if any(isinstance(example, ChatExample) and example.trained for example in examples) and not shape.two_lists:
        notes.append(f"some turns say themselves whether they are trained: {shown_list(flags)}")
    elif flags:
        notes.append(f"some records say themselves whether they are trained: {shown_list(flags)}")
    if absent := [name for name in shape.turns.flags.given if name not in flags]:
        notes.append(f"none of them has the training flag {shown_list(absent)} that `fields:` gives")
    if moved := sum(example.num_moved for example in examples if isinstance(example, QuestionExample)):
        notes.append(f"answers that stand elsewhere than they say: {moved}")
    present = dict.fromkeys(name for record in records for name in record.value)
    heads = {name if name in present else name.split(".")[0] for name in fields.values()}
    if others := [name for name in present if name not in heads.union(flag.split(".")[0] for flag in flags)]:
        notes.append(f"not used: {shown_list(others)}")
    return f"{_mapping_line(shape, fields)} ({'; '.join(notes)})"


def _notes(shape: Shape, records: Sequence[Record]) -> list[str]:
    """What else people should know about how the records are read."""
    values = {ours: [lookup(record.value, theirs) for record in records] for ours, theirs in shape.fields.items()}
    if shape.many:
        return ["several labels a record"]
    if shape.name in ("tags", "roles") and any(
        isinstance(value, str) for column in values.values() for value in column
    ):
        return ["texts are split at blanks"]
    notes = []
    if shape.name == "text" and is_json([str(value) for value in values["text"]]):
        notes.append("its texts are JSON objects; of a file with one on a line, `format: jsonl` reads their fields")
    if shape.name == "parallel":
        if order := other_order(shape.fields):
            notes.append(order)
        if any(isinstance(value, list) for value in values["source"]):
            notes.append("the sentences of a source are joined with blanks")
        if any(isinstance(value, list) and len(value) > 1 for value in values["target"]):
            notes.append("of several targets the first is taken")
    if others := [name for name in turn_fields(shape, records) if name not in TURN_FIELDS]:
        notes.append(f"left to the template: {shown_list(others)}")
    return notes


def _mapping_line(shape: Shape, names: Mapping[str, str]) -> str:
    """Where the parts of an example come from."""
    theirs = {ours: shown(name) for ours, name in names.items()}
    turns = f" ({shown(shape.turns.role)}, {shown(shape.turns.content)})"
    match shape.name:
        case "alpaca":
            prompt = " + ".join(theirs[ours] for ours in ("instruction", "input") if ours in theirs)
            before = [f"{ours} = {theirs[ours]}" for ours in ("system", "history") if ours in theirs]
            return ", ".join([*before, f"prompt = {prompt}", f"response = {theirs['output']}"])
        case "parallel":
            return f"prompt = {theirs['source']}, response = {theirs['target']}"
        case "messages":
            theirs["messages"] += turns
        case "sharegpt":
            theirs["conversations"] += turns
        case "prompt" if shape.two_lists:
            theirs = {ours: name + turns for ours, name in theirs.items()}
    return ", ".join(f"{ours.replace('conversations', 'messages')} = {name}" for ours, name in theirs.items())


def _or(shapes: Iterable[str]) -> str:
    *most, last = shapes
    return f"{', '.join(most)} or {last}" if most else last


def _refuse(records: Sequence[Record], found: list[Reading], config: SourceConfig, task: str,
            shapes: Sequence[ShapeName], shapes_of: TaskShapes) -> NoReturn:  # fmt: skip
    """The error for a record that no shape fits, or more than one."""
    record = records[0]
    where, names = record.where, field_names(record.value)
    if found:
        how = " or ".join(how_to_ask(one, found) for one in found[:3])
        raise BadDataError(f"{where}: {len(found)} readings fit, {readings_said(found)}; say which with {how}")
    table = other_format(records, config, shapes) or other_table(record, config)
    if config.shape is not None or config.fields:
        shape = shapes[0]
        example = ", ".join(f"{name}: ..." for name in known_fields(shape) if name not in FIELDS_TO_LEAVE_OUT)
        what = f"shape {shape} with these names" if config.fields else f"shape {shape}"
        nearest = nearest_forms(record, shapes[:1], config.fields)
        raise BadDataError(
            f"{where}: {what} does not fit (fields: {names}); name them with `fields: {{{example}}}`{table}{nearest}"
        )
    others = {
        other: found[0].shape
        for other, its_shapes in shapes_of.items()
        if other != task and (found := readings(record.value, candidates_of(its_shapes, {}, False)))
    }
    hint = "".join(f"; for task {other} it would be {shape}" for other, shape in list(others.items())[:2])
    advice = (
        table
        or nearest_forms(record, shapes, {})
        or ("; say which with `shape:`, and what its fields are called with `fields:`")
    )
    raise BadDataError(f"{where}: no shape of task {task} ({', '.join(shapes)}) fits (fields: {names}){advice}{hint}")
