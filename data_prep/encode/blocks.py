"""Encoded documents as flat arrays: what encoding makes and the store keeps, with no Python object a token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

#: Task columns and how their values are counted out: one a token, one a document, or any number a document.
TASK_COLUMNS: dict[str, Literal["token", "document", "ragged"]] = {
    "labels": "document",
    "label_sets": "ragged",
    "scores": "document",
    "pair_starts": "document",
    "tags": "token",
    "answer_spans": "ragged",
    "questions": "document",
    "target_ids": "ragged",
}

RAGGED_LENGTHS = "_lengths"


@dataclass(frozen=True)
class Block:
    """Consecutive documents. `columns` holds input_ids and marks [tokens], lengths and lines [documents], and the
    task's columns; a ragged one with its lengths [documents] under ``<name>_lengths``.

    Without marks every token but the first of each document is a target.
    """

    columns: dict[str, np.ndarray]
    num_targets: int = 0
    num_answers: int = 0  # answers of conversations and prompts
    num_stops: int = 0  # those whose stop token is a target
    num_truncated: int = 0  # records cut at encoding
    num_extra: int = 0  # documents beyond the first of a record
    num_moved: int = 0  # answers found elsewhere than their record says

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
    counts = {
        name: sum(getattr(block, name) for block in blocks)
        for name in ("num_targets", "num_answers", "num_stops", "num_truncated", "num_extra", "num_moved")
    }
    given = [block.columns for block in blocks]
    if any("marks" in columns for columns in given):
        given = [{**columns, "marks": marks_of(columns)} for columns in given]
    columns = {name: np.concatenate([one[name] for one in given]) for name in given[0]}
    return Block(columns, **counts)


def marks_of(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """uint8 [tokens]: which tokens of a block are targets."""
    if "marks" in columns:
        return columns["marks"]
    marks = np.ones(len(columns["input_ids"]), dtype=np.uint8)
    marks[np.cumsum(columns["lengths"], dtype=np.int64) - columns["lengths"]] = 0
    return marks


@dataclass
class Names:
    """Label or tag names in the order in which they were met, each with the record that brought it first."""

    index: dict[str, int] = field(default_factory=dict)
    first_seen: list[str] = field(default_factory=list)

    def number(self, name: str, where: str) -> int:
        """The index of `name`, which becomes a new one if it has not been met."""
        number = self.index.get(name)
        if number is None:
            number = self.index[name] = len(self.index)
            self.first_seen.append(where)
        return number


def block_of_documents(
    documents: Sequence[Sequence[int]], lines: Sequence[int], id_type: np.dtype[Any], **counts: int
) -> tuple[Block, np.ndarray]:
    """A block without marks and task columns yet, and the document lengths (int64)."""
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    ids = np.fromiter((index for ids in documents for index in ids), id_type, int(lengths.sum()))
    columns = {
        "input_ids": ids,
        "marks": np.zeros(len(ids), dtype=np.uint8),
        "lengths": lengths.astype(np.uint32),
        "lines": np.array(lines, dtype=np.uint32),
    }
    return Block(columns, **counts), lengths


def ragged(values: Sequence[Sequence[int]], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The values one after the other, and how many each document has (uint32)."""
    lengths = np.array([len(part) for part in values], dtype=np.uint32)
    flat = np.fromiter((value for part in values for value in part), dtype, int(lengths.sum()))
    return flat, lengths
