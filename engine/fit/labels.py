"""Labels of a store against those of a model that already has a head for such a task: names decide, not numbers.

A store numbers its labels in its own order. Where the model knows them by name, training, evaluation and
export keep the model's numbers, and all of its labels; else the model gets a new head for the store's.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.finding import Finding

_NAME = "label names"
_GENERIC = re.compile(r"LABEL_(\d+)")
_NAMED = 12


@dataclass(frozen=True)
class Labels:
    """The labels of a model once it fits the store: `names` by the model's number, and `numbers` by the store's.

    Without `keeps_head` the weights of a head in the model's files are those of other labels. `finding` has what
    a person may not expect; with `is_about_head` it is true only where the model's files have a head.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    keeps_head: bool
    finding: Finding | None = None
    is_about_head: bool = False

    @property
    def is_in_order(self) -> bool:
        """True if a label has the same number in the store and in the model."""
        return self.numbers == tuple(range(len(self.names)))


def names_of(id2label: Mapping[int, str] | None) -> tuple[str, ...]:
    """The labels of a configuration by number; () where it does not name each number once."""
    values = {int(number): str(name) for number, name in (id2label or {}).items()}
    names = tuple(values[number] for number in sorted(values))
    is_sound = sorted(values) == list(range(len(values))) and len(set(names)) == len(names)
    return names if is_sound else ()


def match_labels(model: Sequence[str], store: Sequence[str]) -> Labels:
    """How the labels of a store, by its numbers, become those of a model that has the labels `model` (() for none)."""
    model, store = tuple(model), tuple(store)
    own = tuple(range(len(store)))
    if not model:
        return Labels(store, own, keeps_head=True)
    if set(store) <= set(model):
        return _known(model, store, tuple(model.index(name) for name in store), "")
    folded = [name.strip().casefold() for name in model]
    wanted = [name.strip().casefold() for name in store]
    if set(wanted) <= set(folded) and len(set(wanted)) == len(wanted) and len(set(folded)) == len(folded):
        return _known(model, store, tuple(folded.index(name) for name in wanted), "in other letters ")
    if all(re.fullmatch(r"\d{1,9}", name) and int(name) < len(model) for name in store):
        numbers = tuple(int(name) for name in store)
        if len(set(numbers)) == len(numbers):
            return _numbered(model, numbers)
    if all(_GENERIC.fullmatch(name) for name in model):
        if len(model) != len(store):
            return Labels(store, own, keeps_head=False, finding=_new_head(model, store), is_about_head=True)
        order = _pairs(own, store)
        found = f"the model's labels have no names ({_list(model)}), so those of the data take its numbers: {order}"
        to_do = "if its numbers mean something else, give data.label_names in that order"
        return Labels(store, own, keeps_head=True, finding=Finding(_NAME, "warning", found, to_do), is_about_head=True)
    return Labels(store, own, keeps_head=False, finding=_new_head(model, store), is_about_head=True)


def check_labels(model: Sequence[str], has_head: bool, store: Sequence[str]) -> Finding | None:
    """The line about the labels of a store and those of a model, whose files have a head for them or not."""
    labels = match_labels(model, store) if store else None
    return None if labels is None or (labels.is_about_head and not has_head) else labels.finding


def _known(model: tuple[str, ...], store: tuple[str, ...], numbers: tuple[int, ...], how: str) -> Labels:
    """The model has every label of the store."""
    others = [name for name in model if model.index(name) not in numbers]
    says = []
    if how:
        says.append(f"the model names the labels {how}({_list(store)} in the data)")
    elif numbers != tuple(range(len(store))):
        says.append(f"the data have them in another order ({_list(store)})")
    if others:
        says.append(f"no record has {_list(others)}")
    finding = None
    if says:
        order = _pairs(range(len(model)), model)
        finding = Finding(_NAME, "warning", f"the model's own labels and numbers are kept: {order}; {'; '.join(says)}")
    return Labels(model, numbers, keeps_head=True, finding=finding)


def _numbered(model: tuple[str, ...], numbers: tuple[int, ...]) -> Labels:
    order = _pairs(numbers, [model[number] for number in numbers])
    finding = Finding(_NAME, "warning", f"the labels of the data are numbers, and taken as those of the model: {order}")
    return Labels(model, numbers, keeps_head=True, finding=finding)


def _new_head(model: tuple[str, ...], store: tuple[str, ...]) -> Finding:
    found = f"the model's labels are {_list(model)}, those of the data {_list(store)}: it gets a new head for these"
    missing = [name for name in store if name not in model]
    is_partial = len(missing) < len(store)
    to_do = f"the model has no {_list(missing)}: correct the records, if these are its labels" if is_partial else ""
    return Finding(_NAME, "warning", found, to_do)


def _pairs(numbers: Sequence[int] | range, names: Sequence[str]) -> str:
    return _list([f"{number} {name}" for number, name in zip(numbers, names, strict=True)])


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
