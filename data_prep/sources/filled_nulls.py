"""Nulls that a table puts into objects: a column of objects gives every row the keys of all rows.

A null inside of an object that comes from a table looks like one that the table added, so all of them are left out.
Nulls in lists, and a column's own nulls, are the record's.
"""

from typing import Any

from data_prep.sources.records import Record


def has_filled_nulls(column: Any) -> bool:
    """True if an Arrow array has objects, at any depth, and one of them lacks a value."""
    from pyarrow import types

    kind = column.type
    if types.is_struct(kind):
        parts = [column.field(index) for index in range(kind.num_fields)]
        return any(part.null_count or has_filled_nulls(part) for part in parts)
    if types.is_map(kind):
        return bool(column.items.null_count) or has_filled_nulls(column.items)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return has_filled_nulls(column.values)
    if types.is_dictionary(kind):
        return has_filled_nulls(column.dictionary)
    return False


def without_nulls(value: Any) -> tuple[Any, int]:
    """A JSON value without the nulls of the objects in it, and their number."""
    if isinstance(value, dict):
        kept = {key: without_nulls(item) for key, item in value.items() if item is not None}
        left_out = len(value) - len(kept) + sum(number for _, number in kept.values())
        return {key: item for key, (item, _) in kept.items()}, left_out
    if isinstance(value, list):
        items = [without_nulls(item) for item in value]
        return [item for item, _ in items], sum(number for _, number in items)
    return value, 0


def without_filled_nulls(record: Record) -> Record:
    """A record of a table without the nulls in the objects of its fields, which are counted."""
    found = {key: without_nulls(item) for key, item in record.value.items()}
    value = {key: item for key, (item, _) in found.items()}
    return record._replace(value=value, num_nulls=sum(number for _, number in found.values()))
