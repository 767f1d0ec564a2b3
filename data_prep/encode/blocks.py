"""Encoded documents as flat arrays: what encoding makes and the store keeps, with no Python object a token."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, Unpack, cast

import numpy as np

from data_prep.sources.records import Record

_LENGTHS = "_lengths"  # ends the name of the column with the lengths of a ragged one
#: Columns of parts, not of stores: the tokens and targets that encoding cut off each document.
CUT_TOKENS, CUT_TARGETS = "cut_tokens", "cut_targets"
#: The number of a name that is not among those of the store.
NO_NAME = -1


@dataclass(frozen=True)
class Column:
    """A column of a task: how its values are counted out, and what they are.

    A ragged column has any number of values a document. `holds` decides what becomes of them where parts are joined:

    label numbers   are numbered anew, for each part numbers the names as it meets them; -1 is no name
    record numbers  go on from batch to batch; each is that of the document's record in its batch
    values          stay as they are
    """

    name: str
    per: Literal["token", "document", "ragged"]
    holds: Literal["values", "label numbers", "record numbers"] = "values"
    are_targets: bool = False  # of a ragged column: each value is a target of its document

    @property
    def lengths_name(self) -> str:
        """The column of a block that has the number of values of each document, where this column is ragged."""
        return f"{self.name}{_LENGTHS}"

    @property
    def ends_name(self) -> str:
        """The column of a store that has the end of each document's values, where this column is ragged."""
        return f"{self.name}_ends"


class Counts(TypedDict, total=False):
    """The counts of a block, as `Block` has them."""

    num_targets: int
    num_answers: int
    num_stops: int
    num_truncated: int
    num_extra: int
    num_moved: int


@dataclass(frozen=True)
class Block:
    """Consecutive documents. `columns` holds input_ids and marks [tokens], lengths and lines [documents], and the
    task's columns; a ragged one with its lengths [documents] under `Column.lengths_name`.

    Without marks every token but the first of each document is a target.
    """

    columns: dict[str, np.ndarray]
    num_targets: int = 0
    num_answers: int = 0  # answers of conversations and prompts
    num_stops: int = 0  # those whose stop token is a target
    num_truncated: int = 0  # records cut at encoding
    num_extra: int = 0  # documents beyond the first of a record
    num_moved: int = 0  # answers found elsewhere than their record says
    notes: Mapping[str, int] = field(default_factory=dict)  # what people should know of the records, counted
    owners: np.ndarray | None = None  # [documents]: the number of each document's record; None: one a record

    @property
    def num_documents(self) -> int:
        return len(self.columns["lengths"])

    @property
    def num_tokens(self) -> int:
        return len(self.columns["input_ids"])


def join_blocks(blocks: Sequence[Block]) -> Block:
    """One block of all documents of `blocks`, which have the same columns."""
    if len(blocks) == 1:
        return blocks[0]
    counts = cast(Counts, {name: sum(getattr(block, name) for block in blocks) for name in Counts.__annotations__})
    given = [block.columns for block in blocks]
    if any("marks" in columns for columns in given):
        given = [{**columns, "marks": marks_of(columns)} for columns in given]
    columns = {name: np.concatenate([one[name] for one in given]) for name in given[0]}
    return Block(columns, **counts, notes=add_counts(block.notes for block in blocks))


def add_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of counts by their names."""
    total: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return total


def marks_of(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """uint8 [tokens]: which tokens of a block are targets."""
    if "marks" in columns:
        return columns["marks"]
    marks = np.ones(len(columns["input_ids"]), dtype=np.uint8)
    marks[np.cumsum(columns["lengths"], dtype=np.int64) - columns["lengths"]] = 0
    return marks


def values_per_document(columns: Mapping[str, np.ndarray], name: str, of_task: Sequence[Column]) -> np.ndarray | None:
    """How many values of column `name` of a block each document has ([documents]); None where each has one."""
    if f"{name}{_LENGTHS}" in columns:
        return columns[f"{name}{_LENGTHS}"]
    per_token = {"input_ids", "marks"}.union(column.name for column in of_task if column.per == "token")
    return columns["lengths"] if name in per_token else None


@dataclass
class Names:
    """Label or tag names in the order in which they were met, each with the record that brought it first."""

    index: dict[str, int] = field(default_factory=dict)
    first_seen: list[str] = field(default_factory=list)

    def number(self, name: str, record: Record, item: int = 0) -> int:
        """The index of `name`, which becomes a new one if it has not been met before item `item` of `record`."""
        number = self.index.get(name)
        if number is None:
            number = self.index[name] = len(self.index)
            self.first_seen.append(record.place(item))
        return number

    def forget(self, count: int) -> None:
        """Keep the first `count` names only."""
        self.index = dict(list(self.index.items())[:count])
        del self.first_seen[count:]


def block_of_documents(
    documents: Sequence[Sequence[int]], lines: Sequence[int], id_type: np.dtype[Any], **counts: Unpack[Counts]
) -> Block:
    """A block whose documents have no marks and no task columns yet."""
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    ids = np.fromiter((index for ids in documents for index in ids), id_type, int(lengths.sum()))
    columns = {
        "input_ids": ids,
        "marks": np.zeros(len(ids), dtype=np.uint8),
        "lengths": lengths.astype(np.uint32),
        "lines": np.array(lines, dtype=np.uint32),
    }
    return Block(columns, **counts)


def ragged(column: Column, values: Sequence[Sequence[int]], dtype: Any) -> dict[str, np.ndarray]:
    """A ragged column and its lengths (uint32) as columns of a block."""
    lengths = np.array([len(part) for part in values], dtype=np.uint32)
    flat = np.fromiter((value for part in values for value in part), dtype, int(lengths.sum()))
    return {column.name: flat, column.lengths_name: lengths}


def cut_columns(tokens: Sequence[int], targets: Sequence[int]) -> dict[str, np.ndarray]:
    """The tokens and targets that encoding cut off each document, as columns of a block; none where it cut nothing."""
    if not any(tokens) and not any(targets):
        return {}
    return {CUT_TOKENS: np.array(tokens, dtype=np.uint32), CUT_TARGETS: np.array(targets, dtype=np.uint32)}


def block_of_tokens(
    ids: np.ndarray, marks: np.ndarray | None, lengths: np.ndarray, lines: Sequence[int], **counts: Unpack[Counts]
) -> Block:
    """A block of the tokens of all documents, one document after the other; None as Block has it: no marks."""
    columns = {"input_ids": ids, "lengths": lengths.astype(np.uint32), "lines": np.array(lines, dtype=np.uint32)}
    if marks is None:
        counts["num_targets"] = len(ids) - len(lengths)
        return Block(columns, **counts)
    counts["num_targets"] = int(np.count_nonzero(marks))
    return Block({**columns, "marks": marks}, **counts)


def spans_to_marks(length: int, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """uint8 [length]: 1 inside any of the ascending spans [start, stop); neighbours may share one place."""
    change = np.zeros(length + 1, dtype=np.int8)
    np.add.at(change, starts, 1)
    np.subtract.at(change, stops, 1)
    return (np.cumsum(change[:-1], dtype=np.int8) > 0).view(np.uint8)
