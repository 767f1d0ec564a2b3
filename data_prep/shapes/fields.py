"""The fields of records: looked up by name, checked, and compared with the known forms of every shape.

A form maps our names for the fields of a shape to the names they go by in the wild. Recognising is nothing
more than looking which forms a record's fields fill.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.config import ShapeName
from data_prep.errors import BadDataError
from data_prep.sources.records import checked_text

_SHOWN_NAMES = 10
_SHOWN_CHARACTERS = 40


def shown(name: str) -> str:
    """A name from a record, fit for a message of one line: short, and escaped where it does not print."""
    short = name if len(name) <= _SHOWN_CHARACTERS else name[:_SHOWN_CHARACTERS] + "..."
    return short if short.isprintable() else ascii(short)


def shown_list(names: Iterable[str]) -> str:
    """Several names from records, the first ones of them if there are many."""
    texts = [shown(name) for name in names]
    more = len(texts) - _SHOWN_NAMES
    return ", ".join(texts[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "") or "none"


_SMALL_OBJECT = 4  # fields of an object whose fields are named one by one


def dotted_names(value: Mapping[str, Any]) -> list[str]:
    """The fields of a record; those of small objects in it dotted, as `fields:` wants them."""
    names: list[str] = []
    for name, found in value.items():
        only = isinstance(found, list) and len(found) == 1
        inner = found[0] if only else found
        nested = isinstance(inner, dict) and 0 < len(inner) <= _SMALL_OBJECT
        names += [f"{name}.0.{key}" if only else f"{name}.{key}" for key in inner] if nested else [name]
    return names


def field_names(value: Mapping[str, Any]) -> str:
    """The fields of a record for a message."""
    return shown_list(dotted_names(value))


def lookup(value: Mapping[str, Any], name: str) -> Any:
    """The value of field `name`; None where it is absent or null.

    A name that is no field itself is looked up part by part at its dots: into objects by key, into lists
    by position (``instances.0.output``).
    """
    if name in value or "." not in name:
        return value.get(name)
    found: Any = value
    for part in name.split("."):
        if isinstance(found, dict):
            found = found.get(part)
        elif isinstance(found, list) and part.isascii() and part.isdecimal() and len(part) < 9:
            found = found[int(part)] if int(part) < len(found) else None
        else:
            return None
    return found


def is_sound(text: str) -> bool:
    """True if a text can be written as UTF-8: no half of a surrogate pair stands in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def required_field(value: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of field `name`, which a record must have and must not leave null."""
    found = lookup(value, name)
    if found is None:
        state = "null" if name in value else "missing"
        raise BadDataError(
            f"{where}: field {shown(name)!r}, which the first records of this source have, is {state}"
            f" (fields: {field_names(value)})",
            f"{state}_field",
        )
    return found


def text_at(value: Mapping[str, Any], name: str, where: str) -> str:
    """The text in field `name` of a record. Raises BadDataError."""
    found = value.get(name)
    if type(found) is str and found.isascii():
        return found
    return checked_text(required_field(value, name, where), f"field {shown(name)!r}", where)


def checked_json(value: Any, what: str, where: str) -> Any:
    """`value` if JSON and UTF-8 can hold all of it (finite numbers, no half characters), else BadDataError."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadDataError(f"{where}: {what} holds half of a surrogate pair") from None
    except RecursionError:
        raise BadDataError(f"{where}: {what} is nested too deeply") from None
    except (TypeError, ValueError):
        raise BadDataError(f"{where}: {what} holds a value that JSON has no form for") from None
    return value


Form = dict[str, str]


def _pairs(ours: tuple[str, str], *theirs: tuple[str, str]) -> tuple[Form, ...]:
    return tuple(dict(zip(ours, names, strict=True)) for names in theirs)


_TEXTS: tuple[Form, ...] = (
    *({"text": name} for name in ("text", "sentence", "content", "text_a")),
    *_pairs(
        ("text", "pair"),
        ("text", "pair"),
        ("text", "text_pair"),
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("text_a", "text_b"),
        ("question1", "question2"),
        ("question", "sentence"),
    ),
)
_WORDS = ("tokens", "words", "text", "sentence", "text_a")
_TAGS = ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels", "label")
_ROLES = ("roles", "srl_tags")
_TURNS = ("messages", "conversations", "conversation")

_FORMS: dict[ShapeName, tuple[Form, ...]] = {
    "text": ({"text": "text"}, {"text": "content"}),
    "prompt": _pairs(
        ("prompt", "response"),
        ("prompt", "response"),
        ("prompt", "completion"),
        ("prompt", "answer"),
        ("question", "answer"),
        ("question", "response"),
        ("query", "response"),
        ("query", "answer"),
        ("problem", "solution"),
        ("input", "output"),
    ),
    "alpaca": _pairs(("instruction", "output"), ("instruction", "output"), ("instruction", "response")),
    "sharegpt": tuple({"conversations": name} for name in _TURNS),
    "messages": tuple({"messages": name} for name in _TURNS),
    "parallel": _pairs(("source", "target"), ("source", "target"), ("src", "tgt")),
    "label": tuple({**text, "label": name} for text in _TEXTS for name in ("label", "labels", "gold_label")),
    "score": tuple({**text, "score": name} for text in _TEXTS for name in ("score", "similarity_score")),
    "tags": tuple({"words": words, "tags": tags} for words in _WORDS for tags in _TAGS),
    "roles": tuple({"words": words, "roles": roles, "predicate": "predicate"} for words in _WORDS for roles in _ROLES),
    "question": ({"question": "question", "context": "context", "answers": "answers"},),
}
#: Forms that another shape has a better claim to: only where `shape:` asks for them.
_FORMS_ON_REQUEST: dict[ShapeName, tuple[Form, ...]] = {
    "prompt": _pairs(("prompt", "response"), ("instruction", "output"), ("instruction", "response")),
    "score": tuple({**text, "score": name} for text in _TEXTS for name in ("label", "labels")),
}
#: Fields that a record may do without, with the names they are known by.
OPTIONAL: dict[ShapeName, dict[str, tuple[str, ...]]] = {
    "alpaca": {"system": ("system",), "history": ("history",), "input": ("input", "context")},
    "sharegpt": {"system": ("system",), "tools": ("tools",)},
    "messages": {"system": ("system",), "tools": ("tools",)},
}
#: Fields that a run file may leave out by giving them an empty name.
FIELDS_TO_LEAVE_OUT = frozenset({"system", "history", "input", "tools", "pair"})


@dataclass(frozen=True)
class Reading:
    """One way to understand a record: a shape and (our name, name in the record) of its fields."""

    shape: ShapeName
    names: tuple[tuple[str, str], ...]
    used: frozenset[str] = field(compare=False)  # the record's fields it takes, optional ones included


def known_fields(shape: ShapeName) -> list[str]:
    """Our names for the fields of a shape, those that ``fields:`` may map."""
    names = [name for form in _FORMS[shape] for name in form] + list(OPTIONAL.get(shape, {}))
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Candidates:
    """What the records of a source are compared with: the forms of some shapes under a run file's names."""

    forms: tuple[tuple[ShapeName, Form], ...]
    given: Mapping[str, str]  # `fields:` of the source
    on_request: bool  # `shape:` was given


def candidates_of(shapes: Iterable[ShapeName], given: Mapping[str, str], on_request: bool) -> Candidates:
    """All forms of `shapes`, with the names that a run file gives in place of the usual ones."""
    found: list[tuple[ShapeName, Form]] = []
    for shape in shapes:
        fixed = {ours: theirs for ours, theirs in given.items() if ours not in OPTIONAL.get(shape, {})}
        for form in (*_FORMS[shape], *(_FORMS_ON_REQUEST.get(shape, ()) if on_request else ())):
            if "pair" in form and "pair" not in fixed and fixed.get("text", form["text"]) != form["text"]:
                continue  # the usual partner of a text that is not the one asked for
            names = {ours: theirs for ours, theirs in {**form, **fixed}.items() if theirs}
            if (shape, names) not in found:
                found.append((shape, names))
    return Candidates(tuple(found), given, on_request)


def readings(value: Mapping[str, Any], candidates: Candidates) -> list[Reading]:
    """All ways to understand a record, without those that leave out a field which another one takes as well."""
    found = []
    for shape, names in candidates.forms:
        if any(lookup(value, theirs) is None for theirs in names.values()):
            continue
        asked = candidates.on_request or not names.keys().isdisjoint(candidates.given)
        if not asked and shape in ("sharegpt", "messages") and _chat_shape(value, names) != shape:
            continue
        optional = {
            name
            for ours, usual in OPTIONAL.get(shape, {}).items()
            for name in ((candidates.given[ours],) if ours in candidates.given else usual)
            if lookup(value, name) is not None
        }
        found.append(Reading(shape, tuple(names.items()), frozenset(optional.union(names.values()))))
    return [one for one in found if not any(one.used < other.used for other in found)]


def _chat_shape(value: Mapping[str, Any], names: Form) -> ShapeName:
    """Both kinds of conversation go by the same field names; their turns tell them apart."""
    (name,) = names.values()
    turns = lookup(value, name)
    first = next((turn for turn in turns if isinstance(turn, dict)), {}) if isinstance(turns, list) else {}
    if "role" in first or "content" in first:
        return "messages"
    if "from" in first or "value" in first:
        return "sharegpt"
    return "messages" if name == "messages" else "sharegpt"
