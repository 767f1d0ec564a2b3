"""The turns of a source: how they are written, as its first records and its ``fields:`` show."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from data_prep.config import ShapeName, TurnRole
from data_prep.errors import BadDataError
from data_prep.shapes.fields import lookup
from data_prep.shapes.flags import FLAG_NAMES, Flags
from data_prep.shapes.roles import TurnForm, field_pair, roles_to_map, unknown_roles
from data_prep.shapes.shape import Shape
from data_prep.sources.records import Record

#: Our names for the two fields of a turn, in the shapes whose records hold turns.
FIELDS_OF_TURNS: Mapping[ShapeName, tuple[str, ...]] = dict.fromkeys(
    ("messages", "sharegpt", "prompt"), ("role", "content")
)
_LISTS = ("messages", "conversations", "prompt", "response")


def of_records(given: Mapping[str, str]) -> dict[str, str]:
    """The entries of ``fields:`` that name fields of records, not of turns, and no flags."""
    return {ours: theirs for ours, theirs in given.items() if ours not in FLAG_NAMES.union(("role", "content"))}


class TurnsAsked(NamedTuple):
    """The parts of a run file that decide how turns are read."""

    given: Mapping[str, str]  # `fields:` of the source
    roles: Mapping[str, TurnRole]
    apply_to: Sequence[str]
    takes_chats: bool  # the task takes conversations


def with_turns(shape: Shape, records: Sequence[Record], asked: TurnsAsked) -> Shape:
    """The shape with how its turns are written, what its prompts become, and which flags it has."""
    given, roles, apply_to, takes_chats = asked
    prompt = shape.fields["prompt"] if shape.name == "prompt" and takes_chats else None
    two_lists = prompt is not None and isinstance(lookup(records[0].value, prompt), list)
    usual = ("from", "value") if shape.name == "sharegpt" else ("role", "content")
    turns = next(iter(_lists_of(shape, records[:1])), None)
    form = TurnForm(
        *field_pair(turns, given, *usual), roles, Flags(given, frozenset(name.split(".")[0] for name in _taken(shape)))
    )
    tools = "tools" if two_lists else shape.fields.get("tools", "")
    return replace(
        shape,
        turns=form,
        two_lists=two_lists,
        as_chat=takes_chats and shape.name in apply_to and not two_lists,
        has_tools=any(lookup(record.value, tools) not in (None, "", []) for record in records if tools),
    )


def _taken(shape: Shape) -> set[str]:
    return {*shape.fields.values(), *(shape.refused if shape.name == "alpaca" else ())}


def refuse_unknown_roles(shape: Shape, records: Sequence[Record]) -> None:
    """BadDataError with all roles in `records` that are not known, and how often each of them stands there."""
    unknown: Counter[str] = Counter()
    where = ""
    for record in records if shape.has_turns else ():
        for turns in _lists_of(shape, [record]):
            found = unknown_roles(turns if isinstance(turns, list) else (), shape.turns)
            where = where or (record.where if found else "")
            unknown += found
    if unknown:
        raise BadDataError(f"{where}: {roles_to_map(unknown)}")


def _lists_of(shape: Shape, records: Sequence[Record]) -> list[Any]:
    """The lists of turns in some records."""
    names = [shape.fields[ours] for ours in _LISTS if ours in shape.fields]
    return [lookup(record.value, name) for record in records for name in names]


def turn_fields(shape: Shape, records: Sequence[Record]) -> list[str]:
    """The fields of the turns in `records` that are not null, without the two of the form and the flags."""
    lists = _lists_of(shape, records) if shape.has_turns else []
    turns = [turn for turns in lists if isinstance(turns, list) for turn in turns if isinstance(turn, dict)]
    own = {shape.turns.role, shape.turns.content, *shape.turns.flags.of_turn}
    return list(
        dict.fromkeys(name for turn in turns for name, value in turn.items() if value is not None and name not in own)
    )


def flags_seen(shape: Shape, records: Sequence[Record]) -> list[str]:
    """The training flags in `records` and their turns."""
    flags = shape.turns.flags
    found = [name for record in records for name in flags.found_in(record.value, flags.of_record)]
    lists = _lists_of(shape, records) if shape.has_turns else []
    found += [name for turns in lists for turn in turns for name in flags.found_in(turn, flags.of_turn)]
    return list(dict.fromkeys(found))
