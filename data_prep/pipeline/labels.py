"""Labels and tags: which a store has, in which order, and those of held-out records that train has not."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.config import DataConfig
from data_prep.errors import BadDataError, UnusableError
from data_prep.pipeline.parts import Part, PartAccount
from data_prep.shapes.label_names import NO_GOLD
from data_prep.tasks.data_task import DataTask

_MOST_LISTED = 20  # labels that are not known
_MOST_KNOWN = 100  # labels that a message gives in full

#: How often a label occurs, and the place of the first.
Occurrences = tuple[int, str]


@dataclass(frozen=True)
class KnownLabels:
    """The labels of a preparation in the order of their numbers, and where all of them can be read."""

    names: Sequence[str]
    listed_in: str = "data.label_names"

    def __str__(self) -> str:
        if len(self.names) <= _MOST_KNOWN:
            return ", ".join(self.names)
        return f"the {len(self.names)} labels that are listed in {self.listed_in}"


def find_labels(accounts: Sequence[PartAccount], task: DataTask) -> list[str]:
    """The labels that parts hold in the order of their numbers: numbers by value, texts sorted."""
    found = {name: where for one in accounts for name, where in zip(one.names, one.first_seen, strict=True)}
    columns = {name for one in accounts for block in one.blocks for name, _, _ in block}
    labelled = any(column.name in columns for column in task.columns if column.holds == "label numbers")
    # A task that marks no tokens may have empty lists of labels only.
    if labelled and len(found) < 2 and (found or task.marks_tokens):
        where = next(iter(found.values()), "data.train")
        raise BadDataError(f"{where}: only {len(found)} different labels in train; classification needs two")
    numeric = all(re.fullmatch(r"-?[0-9]+", name) for name in found)
    return sorted(found, key=int) if numeric else sorted(found)


def unknown_labels(parts: Sequence[Part], names: Sequence[str], task: DataTask) -> dict[str, Occurrences]:
    """The labels in parts that are not among `names`, in the order in which they occur."""
    known = set(names)
    columns = [column.name for column in task.columns if column.holds == "label numbers"]
    found: dict[str, Occurrences] = {}
    for part in parts:
        own = part.account.names
        if known.issuperset(own):
            continue
        counts = np.zeros(len(own), dtype=np.int64)
        for block in part.blocks():
            for values in (block[name] for name in columns if name in block):
                counts += np.bincount(values[values >= 0], minlength=len(own))
        for name, where, count in zip(own, part.account.first_seen, counts.tolist(), strict=True):
            if name not in known:
                before, first = found.get(name, (0, where))
                found[name] = (before + count, first)
    return found


def check_labels(config: DataConfig, split: str, unknown: Mapping[str, Occurrences], known: KnownLabels) -> None:
    """Raise UnusableError, which lists the `unknown` labels of a split, unless they are to count as wrong.

    A mark of no gold label is no wrong answer: it never counts as one.
    """
    marks = [name for name in unknown if name in NO_GOLD]
    if not unknown or (split == "validation" and config.unknown_labels == "count_wrong" and not marks):
        return
    lines = [f"{where}: label {name!r} ({_times(count)})" for name, (count, where) in unknown.items()]
    name, (count, where) = next(iter(unknown.items()))
    of = f"is not one of {known} (data.label_names, or those of train)"
    lines[0] = f"{where}: label {name!r} {of}; {_times(count)}"
    if len(lines) > _MOST_LISTED:
        others = list(unknown)[_MOST_LISTED:]
        more = " ..." if len(others) > _MOST_KNOWN else ""
        lines[_MOST_LISTED:] = [f"and {len(others)} more labels: {', '.join(others[:_MOST_KNOWN])}{more}"]
    advice = "mend, or name all labels in data.label_names or data.label_map"
    if split == "validation":
        advice += ", or set data.unknown_labels=count_wrong, which evaluates such records as wrong"
    if marks:
        advice += (
            f"; {marks[0]!r} means no gold label where data.label_names names the others: such records are left out"
        )
    raise UnusableError([*lines, advice])


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
