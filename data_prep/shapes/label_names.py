"""Names for the labels that records have, and labels that are none."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data_prep.errors import NO_GOLD_LABEL, BadDataError, FatalDataError
from data_prep.shapes.examples import Example, LabelledExample, TaggedExample
from data_prep.shapes.fields import shown

NUMBER = re.compile(r"-?[0-9]+", re.ASCII)
#: What stands in a label's place where the annotators agreed on none (SNLI), or where it was held back (the Hub).
NO_GOLD = frozenset({"-1", "-", "-100"})


@dataclass(frozen=True)
class LabelNames:
    """How the labels of a source become names.

    `names`: label in the records -> name. `known`: all names there are, in no order. `numbers_only`: the numbers were
    named by their position, so a label that is no number has no meaning.
    """

    names: Mapping[str, str] = field(hash=False)
    known: frozenset[str]
    numbers_only: bool = False
    own: tuple[str, ...] | None = None  # the names that the data itself has for its numbers, in their order
    note: str = field(default="", compare=False)  # for people

    def key(self) -> dict[str, Any]:
        """The parts that change examples or the order of labels; empty where there are none."""
        return {
            **({"labels": dict(sorted(self.names.items()))} if self.names else {}),
            **({"own_labels": list(self.own)} if self.own else {}),
        }

    def name_all(self, labels: Sequence[str], where: str, without_gold: str) -> tuple[str, ...]:
        """The names of a record's labels; one that has none stays as it is, and is unknown where names are numbered.

        Raises BadDataError for a record without a gold label, with the reason `without_gold`, and for a name among
        numbers.
        """
        return tuple([self.names.get(label) or self._unnamed(label, where, without_gold) for label in labels])

    def _unnamed(self, label: str, where: str, without_gold: str) -> str:
        if label in NO_GOLD and label not in self.known:
            raise BadDataError(
                f"{where}: no gold label: {label!r} stands in its place, and is none of the labels", without_gold
            )
        if self.numbers_only and not NUMBER.fullmatch(label):
            raise FatalDataError(
                f"{where}: label {shown(label)!r} is a name, while the first records of this source have numbers, which"
                " data.label_names names by position; write them all in one way, or give data.label_map"
            )
        return label

    def name_example(self, example: Example, where: str) -> Example:
        """The example with the names of its labels or tags."""
        if isinstance(example, LabelledExample):
            return replace(example, labels=self.name_all(example.labels, where, NO_GOLD_LABEL))
        if isinstance(example, TaggedExample):
            return replace(example, tags=self.name_all(example.tags, where, "no_gold_tag"))
        return example
