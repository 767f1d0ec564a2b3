"""The data half of a task as one value: what its records are, how they are encoded, and how `inspect` shows them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.config import Overlong, ShapeName
from data_prep.encode.blocks import NO_NAME, Block, Column
from data_prep.encode.content import Context
from data_prep.shapes.examples import Example
from data_prep.sources.records import Record
from data_prep.token_store import TokenStore

_COUNTED_AT_ONCE = 1 << 22
_MOST_NAMES = 40


@dataclass(frozen=True)
class Histogram:
    """Counts in labelled bins; `second` counts the same bins in another unit."""

    title: str
    labels: tuple[str, ...]
    unit: str
    counts: tuple[int, ...]
    second_unit: str = ""
    second: tuple[int, ...] = ()


@dataclass(frozen=True)
class DocumentView:
    """Tokens start..stop of a document as its task sees them."""

    learned: np.ndarray  # bool [stop - start]: the tokens that `inspect` marks
    num_targets: int
    facts: tuple[str, ...] = ()  # about the document as a whole
    tags: tuple[str | None, ...] = ()  # the name at each token; empty where tokens have no names
    answer: tuple[int, ...] = ()  # token ids of a text of its own that is to be generated


@dataclass(frozen=True)
class Blank:
    """How records without anything to learn are read for predictions: what stands in the place of what they lack.

    `field` is our name for it, `value` gives it from the other fields of a record, by our names. `repeats` are fields
    that a prediction has beside it, so that people see what it is about.
    """

    shape: ShapeName
    field: str
    value: Callable[[Mapping[str, Any]], Any]
    repeats: tuple[str, ...] = ()


def _no_histograms(_store: TokenStore) -> list[Histogram]:
    return []


@dataclass(frozen=True)
class DataTask:
    """The data half of a task. Nothing outside this folder knows a task or a column by its name."""

    name: str
    shapes: tuple[ShapeName, ...]  # of the records that it takes
    encode: Callable[[Sequence[Record], Sequence[Example], Context], Block]  # raises BadDataError
    learned: str | None  # the word for the tokens that `view` marks; None where it marks none
    view: Callable[[TokenStore, int, int, int], DocumentView]  # of a document's number, its tokens start..stop
    columns: tuple[Column, ...] = ()  # in the order of the manifest
    marks_tokens: bool = False  # targets are marked tokens; else a target column's values, or one a document
    packs: bool = False  # documents share rows and may be cut where a row ends; else each has a row of its own
    splits: bool = False  # `encode` makes several documents of a longer text where `context.splits` says so
    needs_eos: bool = False
    needs_mask: bool = False  # the store then has the id of the mask token, and the ids of all control tokens
    has_label_names: bool = False
    tags_words: bool = False  # of words; with `overlong: split`, long sentences become overlapping windows
    histograms: Callable[[TokenStore], list[Histogram]] = _no_histograms
    legend: str = ""  # what `inspect` adds to its legend in the terminal
    #: (config.json of a model, its label names) -> what records to predict with it get; None: nothing is predicted.
    blank: Callable[[Mapping[str, Any], Sequence[str]], Blank] | None = None
    revision: int = 0  # is part of a store's key: raised when the same records become other columns than before

    @property
    def takes_chats(self) -> bool:
        """True if its records may be conversations, which a chat template writes."""
        return "messages" in self.shapes

    @property
    def target_column(self) -> str | None:
        """The ragged column whose values are the targets."""
        return next((column.name for column in self.columns if column.are_targets), None)

    def makes_windows(self, overlong: Overlong) -> bool:
        """True if a record may become several documents; then a column holds the number of each document's record."""
        numbered = any(column.holds == "record numbers" for column in self.columns)
        return numbered and (overlong == "split" or not self.tags_words)

    def records_of(self, block: Block) -> np.ndarray:
        """[documents]: the number of each document's record among those that the block was made of."""
        numbered = [column.name for column in self.columns if column.holds == "record numbers"]
        numbers = next((block.columns[name] for name in numbered if name in block.columns), block.owners)
        return np.arange(block.num_documents) if numbers is None else numbers


def name_of(store: TokenStore, label: int) -> str:
    """The name of a label's number; held-out labels that train has not have none."""
    if label == NO_NAME:
        return "(not a label of train)"
    return store.label_names[label] if 0 <= label < len(store.label_names) else str(label)


def name_histogram(store: TokenStore, column: Column, title: str, unit: str) -> Histogram:
    """How often each name is used in a column of their numbers; the names that are used most come first."""
    names, indices = store.label_names, store.values(column.name)
    counts = np.zeros(len(names), dtype=np.int64)
    for begin in range(0, len(indices), _COUNTED_AT_ONCE):
        block = indices[begin : begin + _COUNTED_AT_ONCE]
        counts += np.bincount(block[block >= 0], minlength=len(names))[: len(names)]
    order = np.argsort(-counts, kind="stable")
    shown = order[:_MOST_NAMES]
    labels, values = [names[index] for index in shown], [int(counts[index]) for index in shown]
    if len(order) > len(shown):
        labels.append(f"{len(order) - len(shown)} more")
        values.append(int(counts[order[_MOST_NAMES:]].sum()))
    return Histogram(title, tuple(labels), unit, tuple(values))


#: Of a document of two texts: the place of the first token of the second one; 0 where there is none.
PAIR_STARTS = Column("pair_starts", per="document")


def pair_fact(store: TokenStore, document: int) -> tuple[str, ...]:
    """The place where the second text of a document begins, in words; nothing where there is none."""
    first = int(store.column(PAIR_STARTS.name)[document]) if PAIR_STARTS.name in store.columns else 0
    return (f"second text from token {first}",) if first else ()
