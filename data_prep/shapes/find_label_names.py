"""The names of a source's labels: by position for numbers, by a map, or from the data itself."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import zip_longest

from data_prep.errors import BadDataError, DataConfigError
from data_prep.shapes.examples import Example, LabelledExample, TaggedExample
from data_prep.shapes.fields import lookup, shown, shown_list
from data_prep.shapes.label_names import NO_GOLD, NUMBER, LabelNames
from data_prep.shapes.shape import Shape, to_example
from data_prep.sources.records import Record

_SHOWN_LABELS = 6


def label_field(shape: Shape) -> str | None:
    """The field of the records that holds labels or tags; None for shapes without any."""
    return shape.fields.get({"label": "label", "tags": "tags", "roles": "roles"}.get(shape.name, ""))


def with_label_names(
    shape: Shape,
    records: Sequence[Record],
    given: Sequence[str] | None,
    label_map: Mapping[str, str] | None,
    own: tuple[str, ...] | None,
    may_be_unknown: bool = False,
) -> Shape:
    """The shape of a source with the names of its labels, as its first records have them.

    With `may_be_unknown` a label without a name stays as it is. `given` is data.label_names, `label_map`
    data.label_map, `own` the names that the data has for its numbers. Raises BadDataError for labels that cannot be
    meant, DataConfigError where two of the three contradict each other.
    """
    name = label_field(shape)
    if name is None or (given is None and label_map is None and own is None):
        return shape
    records, examples = _readable(shape, records)
    labels = [one.labels for one in examples if isinstance(one, LabelledExample)]
    labels += [one.tags for one in examples if isinstance(one, TaggedExample)]
    positions = {} if own is None else {str(number): one for number, one in enumerate(own)}
    if own is not None and all(label in own for few in labels for label in few) and _are_texts(records, name):
        positions = {}  # the records have the names themselves, which may look like numbers
    names = _label_names_of(records, labels, given, label_map, own, positions, may_be_unknown)
    return replace(shape, labels=names, summary=f"{shape.summary[:-1]}; {names.note})" if names.note else shape.summary)


def _readable(shape: Shape, records: Sequence[Record]) -> tuple[list[Record], list[Example]]:
    """The records that can be read, with their examples; the others are met again when they are encoded."""
    read: list[Record] = []
    examples: list[Example] = []
    for record in records:
        with suppress(BadDataError):
            examples.append(to_example(shape, record))
            read.append(record)
    return read, examples


def _are_texts(records: Sequence[Record], name: str) -> bool:
    values = [lookup(record.value, name) for record in records]
    return all(isinstance(one, str) for value in values for one in (value if isinstance(value, list) else [value]))


def _label_names_of(
    records: Sequence[Record],
    labels: Sequence[Sequence[str]],
    given: Sequence[str] | None,
    label_map: Mapping[str, str] | None,
    own: tuple[str, ...] | None,
    positions: Mapping[str, str],
    may_be_unknown: bool,
) -> LabelNames:
    """How the `labels` of the first records become names; `positions`: the numbers of `own` names."""
    seen = dict.fromkeys(label for few in labels for label in few if label not in NO_GOLD or label in (given or ()))
    if label_map is not None:
        return replace(_mapped(records, labels, label_map, given, positions, may_be_unknown), own=own)
    if own is not None:
        return _own(own, given, positions)
    assert given is not None
    known = frozenset(given)
    numbers = [label for label in seen if label not in known and NUMBER.fullmatch(label)]
    names = [label for label in seen if label in known]
    if numbers and names:
        where = _where(records, labels, (numbers if next(iter(seen)) in known else names)[0])
        raise BadDataError(
            f"{where}: labels are numbers and names at once ({shown_list(numbers)}; {shown_list(names)}); write them"
            " all in one way, or give data.label_map"
        )
    if not numbers:
        return LabelNames({}, known)
    return _by_position(records, labels, numbers, given, may_be_unknown)


def _by_position(
    records: Sequence[Record],
    labels: Sequence[Sequence[str]],
    numbers: Sequence[str],
    given: Sequence[str],
    may_be_unknown: bool,
) -> LabelNames:
    """Numbers 0 to N - 1 for N names. Raises BadDataError for other numbers, with the map to write."""
    positions = {str(number): name for number, name in enumerate(given)}
    outside = sorted((number for number in numbers if number not in positions), key=int)
    if any("-1" in few for few in labels) and len(numbers) == len(given) - 1 and str(len(given) - 1) not in numbers:
        outside = ["-1"]  # with it there are as many numbers as names: it is a class, not a label that is missing
    from_one = outside == [str(len(given))] and "0" not in numbers
    if outside and (not may_be_unknown or from_one or outside == ["-1"]):
        where = _where(records, labels, outside[0])
        least = 1 if from_one else min(map(int, [*numbers, *outside]))
        most = max(least + len(given) - 1, *map(int, [*numbers, *outside]))
        every = zip_longest(
            range(least, min(most, least + _SHOWN_LABELS - 1) + 1), given[:_SHOWN_LABELS], fillvalue="..."
        )
        line = ", ".join(f"{number}: {shown(name)}" for number, name in every)
        more = ", ..." if most - least >= _SHOWN_LABELS else ""
        raise BadDataError(
            f"{where}: label {', '.join(outside[:_SHOWN_LABELS])} is no position in data.label_names, whose"
            f" {len(given)} names are 0 to {len(given) - 1}; say which number is which with"
            f" `data.label_map: {{{line}{more}}}`"
        )
    note = f"label numbers are positions in data.label_names: {_numbered(given)}"
    if "0" not in numbers:
        note += f"; no 0 among those seen, which are {shown_list(sorted(numbers, key=int))}"
    return LabelNames(positions, frozenset(given), True, note=note)


def _own(own: tuple[str, ...], given: Sequence[str] | None, positions: Mapping[str, str]) -> LabelNames:
    """The names in the file's own metadata; data.label_names may only bring them into another order, or add to them."""
    if given is not None and (missing := [name for name in own if name not in given]):
        raise DataConfigError(
            f"data.label_names lacks {shown_list(missing)}: the data says itself that its label numbers are"
            f" {_numbered(own)}; name these, or rename them with"
            f" `data.label_map: {{{', '.join(f'{shown(name)}: ...' for name in own[:_SHOWN_LABELS])}}}`"
        )
    note = f"label numbers are named by the data: {_numbered(own)}"
    if given is not None and list(given[: len(own)]) != list(own):
        note += "; data.label_names gives their order"
    return LabelNames(positions, frozenset(given or own), False, own, note)


def _numbered(names: Sequence[str]) -> str:
    first = ", ".join(f"{number} = {shown(name)}" for number, name in enumerate(names[:_SHOWN_LABELS]))
    return first + (f" and {len(names) - _SHOWN_LABELS} more" if len(names) > _SHOWN_LABELS else "")


def _mapped(
    records: Sequence[Record],
    labels: Sequence[Sequence[str]],
    label_map: Mapping[str, str],
    given: Sequence[str] | None,
    positions: Mapping[str, str],
    may_be_unknown: bool,
) -> LabelNames:
    """A map decides over all else: of a number, then of the name that the file's own metadata has for it."""
    names = {label: label_map.get(name, name) for label, name in positions.items()} | dict(label_map)
    known = frozenset(given if given is not None else [*label_map.values(), *names.values()])
    unmapped = dict.fromkeys(label for few in labels for label in few if label not in names and label not in known)
    left = [label for label in unmapped if label not in NO_GOLD and not may_be_unknown]
    strange = [name for name in dict.fromkeys(names.values()) if name not in known]
    if left or strange:
        where = _where(records, labels, left[0]) if left else records[0].where
        listed = ", ".join(f"{shown(label)}: ..." for label in [*left, *strange])
        raise BadDataError(f"{where}: data.label_map has no name for {shown_list([*left, *strange])}; add {listed}")
    return LabelNames(names, known, note=f"labels are renamed by data.label_map: {_renamed(label_map)}")


def _renamed(label_map: Mapping[str, str]) -> str:
    pairs = [f"{shown(label)} = {shown(name)}" for label, name in label_map.items()]
    return ", ".join(pairs[:_SHOWN_LABELS]) + (" ..." if len(pairs) > _SHOWN_LABELS else "")


def _where(records: Sequence[Record], labels: Sequence[Sequence[str]], label: str) -> str:
    return next((record.where for record, few in zip(records, labels, strict=True) if label in few), records[0].where)


def label_order(
    given: Sequence[str] | None, label_map: Mapping[str, str] | None, own: Iterable[Sequence[str] | None]
) -> tuple[str, ...] | None:
    """The labels in the order of their numbers, where the run file or the training data says it.

    `own`: of each source the names that it has itself. Of a map with numbers only, the order of the numbers; else its
    names, sorted. Raises DataConfigError for sources that differ.
    """
    if given is not None:
        return tuple(given)
    orders = list(dict.fromkeys(tuple(names) for names in own if names is not None))
    if label_map is not None:
        numeric = all(NUMBER.fullmatch(label) for label in label_map)
        first = [label_map[label] for label in sorted(label_map, key=int)] if numeric else sorted(label_map.values())
        renamed = [
            label_map.get(str(number), label_map.get(name, name))
            for order in orders
            for number, name in enumerate(order)
        ]
        return tuple(dict.fromkeys([*renamed, *first]))
    if len(orders) > 1:
        listed = " and ".join(f"({shown_list(order)})" for order in orders[:3])
        raise DataConfigError(
            f"the sources of data.train number their labels differently, {listed}; give data.label_names"
        )
    return orders[0] if orders else None
