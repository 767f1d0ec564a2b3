"""Looks into a record: fields by name, and checks that what they hold is what it should be."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

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


def field_names(value: Mapping[str, Any]) -> str:
    """The fields of a record for a message; those of small objects in it dotted, as `fields:` wants them."""
    names: list[str] = []
    for name, found in value.items():
        only = isinstance(found, list) and len(found) == 1
        inner = found[0] if only else found
        nested = isinstance(inner, dict) and 0 < len(inner) <= 4
        names += [f"{name}.0.{key}" if only else f"{name}.{key}" for key in inner] if nested else [name]
    return shown_list(names)


def lookup(value: Mapping[str, Any], name: str) -> Any:
    """What stands in field `name`; None where it is absent or null.

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
    """Whether a text can be written as UTF-8: no half of a surrogate pair stands in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def required_field(value: Mapping[str, Any], name: str, where: str) -> Any:
    """What stands in field `name`, which a record must have and must not leave null."""
    found = lookup(value, name)
    if found is None:
        state = "null" if name in value else "missing"
        raise BadDataError(
            f"{where}: field {shown(name)!r}, which the first records of this source have, is {state}"
            f" (fields: {field_names(value)})"
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
