"""Labels of a store against those of a model that already has a head for such a task: names decide, not numbers.

A store numbers its labels in its own order. Where the model knows them by name, training, evaluation and
export keep the model's numbers, and all of its labels. A trained head for other labels is an error, unless the run
file asks for a new one. LABEL_0, LABEL_1 ... are no names: such a head takes the store's labels where it has as many.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.finding import Finding
from engine.tasks.task import Problem

_NAME = "label names"
_GENERIC = re.compile(r"LABEL_(\d+)")
_NAMED = 12
_ANEW = "set model.new_head: true, which keeps the body of the model and makes a new head"


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


def match_labels(model: Sequence[str], store: Sequence[str], new_head: bool = False) -> Labels:
    """How the labels of a store, by its numbers, become those of a model that has the labels `model` (() for none).

    With `new_head` (model.new_head) they take the place of the model's, whatever these are.
    """
    model, store = tuple(model), tuple(store)
    own = tuple(range(len(store)))
    if new_head:
        found = f"the head of the model is made anew for {_list(store)} (model.new_head)"
        return Labels(store, own, keeps_head=False, finding=Finding(_NAME, "warning", found), is_about_head=True)
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
            found = (
                f"the model's {len(model)} labels have no names, and the data have {len(store)} labels: it gets a new "
                f"head for {_list(store)}"
            )
            return Labels(store, own, keeps_head=False, finding=Finding(_NAME, "warning", found), is_about_head=True)
        order = _pairs(own, store)
        found = f"the model's labels have no names ({_list(model)}), so those of the data take its numbers: {order}"
        to_do = "if its numbers mean something else, give data.label_names in that order"
        return Labels(store, own, keeps_head=True, finding=Finding(_NAME, "warning", found, to_do), is_about_head=True)
    return Labels(store, own, keeps_head=False, finding=_other_labels(model, store), is_about_head=True)


def fit_labels(
    model: Sequence[str], store: Sequence[str], problem: Problem | None, new_head: bool = False
) -> Labels | None:
    """The labels of a model that has the labels `model`, once it fits a store; None where a store has none to fit."""
    if problem == "regression":
        return _one_output(model, new_head)
    return match_labels(model, store, new_head) if store else None


def _one_output(model: Sequence[str], new_head: bool) -> Labels:
    """The labels of a model that has the labels `model` once its head gives a score: one, with a name or without."""
    names = tuple(model) if len(model) == 1 else ("LABEL_0",)
    if new_head:
        finding = Finding(_NAME, "warning", "the head of the model is made anew for a score (model.new_head)")
    elif len(model) > 1:
        found = f"the model's head tells {len(model)} labels apart ({_list(model)}), and the data have scores"
        finding = Finding(_NAME, "error", found, _ANEW)
    else:
        return Labels(names, (0,), keeps_head=True)
    return Labels(names, (0,), keeps_head=False, finding=finding, is_about_head=True)


def check_labels(labels: Labels | None, has_head: bool) -> Finding | None:
    """The line about matched labels, for a model whose files have a head for them or not."""
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


def _other_labels(model: tuple[str, ...], store: tuple[str, ...]) -> Finding:
    """The error for two sets of labels: both in full where they are short, else by their differences."""
    missing = [name for name in store if name not in model]
    unused = [name for name in model if name not in store]
    both = f"{_list(model)} in the model, {_list(store)} in the data"
    found = f"the model's head is for other labels than the data have: {both}"
    if len(missing) < len(store):
        found += f" (only in the data: {_list(missing)}; only in the model: {_list(unused) or 'none'})"
    return Finding(_NAME, "error", found, f"correct the records, or rename labels with data.label_map, or {_ANEW}")


def _pairs(numbers: Sequence[int] | range, names: Sequence[str]) -> str:
    return _list([f"{number} {name}" for number, name in zip(numbers, names, strict=True)])


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
