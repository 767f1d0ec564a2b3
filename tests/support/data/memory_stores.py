"""Documents in memory in place of a token store, with what each task needs of one."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.token_store import RowSource

VOCABULARY = 61


@dataclass(frozen=True)
class MemoryStore:
    """Documents in memory, as the engine reads them."""

    documents: list[np.ndarray]
    marks: list[np.ndarray]
    labels: np.ndarray
    pad_id: int = 0
    label_names: tuple[str, ...] = ()
    tags: list[np.ndarray] = field(default_factory=list)
    columns: tuple[str, ...] = ("labels", "pair_starts", "tags")
    pair_starts: np.ndarray | None = None

    def gather(self, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pieces = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        ids, marks = (
            np.concatenate([column[document][piece] for document, piece in zip(documents, pieces, strict=True)])
            for column in (self.documents, self.marks)
        )
        return ids, marks

    def check_unchanged(self) -> None:
        pass

    def column(self, name: str) -> np.ndarray:
        pairs = np.zeros(len(self.labels), dtype=np.uint32) if self.pair_starts is None else self.pair_starts
        return {"labels": self.labels, "scores": self.labels * 0.7 - 0.5, "pair_starts": pairs}[name]

    def ragged(self, name: str, document: int) -> np.ndarray:
        """A set of labels: the bits of the document's number, so that each has none to three."""
        bits = [number for number in range(3) if document >> number & 1]
        return {"label_sets": np.array(bits, dtype=np.int32)}[name]

    def token_column(self, name: str, document: int, start: int, stop: int) -> np.ndarray:
        types = [np.arange(len(document)) == 2 for document in self.documents]  # the third token is the predicate
        return {"tags": self.tags, "predicate_types": types}[name][document][start:stop]

    def locate(self, document: int) -> str:
        return f"memory.jsonl:{document + 1}"


@dataclass(frozen=True)
class QuestionStore(MemoryStore):
    """Documents as windows, two of each question; their contexts lie between the first and the last token."""

    @property
    def counts(self) -> list[int]:
        return [len(document) - 2 for document in self.documents]

    def column(self, name: str) -> np.ndarray:
        numbers = np.arange(len(self.documents))
        behind = [0 if number % 2 == 0 else max(0, self.counts[number - 1] - 2) for number in numbers]
        return {
            "pair_starts": np.ones_like(numbers), "questions": numbers // 2, "context_counts": np.array(self.counts),
            "context_firsts": np.array(behind),
        }[name]  # fmt: skip

    def words(self, document: int) -> list[str]:
        """The words, of one token each, of the whole context of the question that a window belongs to."""
        second = document | 1
        number = max(self.counts[second - 1], int(self.column("context_firsts")[second]) + self.counts[second])
        return [f"w{(document // 2 * 5 + place) % 11}\u00e9" for place in range(number)]

    def answers(self, document: int) -> list[str]:
        """Those of the question: none for each third, all runs of two words for each first, else the first three."""
        words = self.words(document)
        runs = [" ".join(words[place : place + 2]) for place in range(len(words) - 1)]
        return (runs or words, [" ".join(words[:3])], [])[document // 2 % 3]

    def ragged(self, name: str, document: int) -> np.ndarray:
        words = [word.encode() for word in self.words(document)]
        ends = np.cumsum([len(word) + 1 for word in words])
        if name == "answer_spans":  # each fourth window has none
            last = self.counts[document]
            first = 1 + document % last
            spans = [] if document % 4 == 3 else [first, min(first + 2, last + 1), 1, 2]
            return np.array(spans, dtype=np.int32)
        if document % 2:
            return np.zeros(0, dtype=np.uint8)
        return {
            "context_texts": np.frombuffer(b" ".join(words), dtype=np.uint8),
            "context_offsets": np.stack((ends - [len(word) + 1 for word in words], ends - 1), axis=1).reshape(-1),
            "answer_texts": np.frombuffer(
                b"".join(text.encode() + b"\xff" for text in self.answers(document)), dtype=np.uint8
            ),
        }[name]

    def ragged_lengths(self, name: str) -> np.ndarray:
        return np.array([len(self.ragged(name, document)) for document in range(len(self.documents))])


@dataclass(frozen=True)
class MaskedStore(MemoryStore):
    """Documents whose tokens may be masked, in words of one and of two tokens, but the first and the last token."""

    manifest: dict[str, Any] = field(
        default_factory=lambda: {"largest_id": VOCABULARY - 1, "mask_id": 3, "control_ids": [0, 1, 2, 3]}
    )

    def borders(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ends = np.cumsum([len(document) for document in self.documents])
        return ends[documents] - [len(self.documents[document]) for document in documents], ends[documents]

    def values(self, name: str) -> np.ndarray:
        assert name == "word_pieces"
        inside = [1 + (np.arange(len(mark)) % 3 == 2) for mark in self.marks]
        return np.concatenate([np.where(mark, kind, 0) for mark, kind in zip(self.marks, inside, strict=True)])


@dataclass(frozen=True)
class MemoryRows:
    """Row index over a MemoryStore: `documents_a_row` documents each."""

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    row_ends: np.ndarray
    row_targets: np.ndarray
    sources: tuple[RowSource, ...]

    @property
    def num_rows(self) -> int:
        return len(self.row_ends)

    @property
    def epoch_rows(self) -> int:
        return self.num_rows

    def segments(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        chosen = slice(self.row_ends[row - 1] if row else 0, self.row_ends[row])
        return self.documents[chosen], self.starts[chosen], self.lengths[chosen]


def memory_store(task: str, per_row: int | None = None) -> tuple[MemoryStore, MemoryRows]:
    """Twenty-four ragged documents with ragged targets; three a row when packed, else one."""
    generator = np.random.default_rng(8)
    documents = [generator.integers(3, VOCABULARY, generator.integers(3, 20)) for _ in range(24)]
    for document in documents:
        document[-1] = 2  # the end token, where T5's head looks
    marks = [generator.random(len(document)) < 0.6 for document in documents]
    for mark in marks:
        mark[0], mark[-1] = True, True  # the first mark must be ignored: nothing precedes it
    names = () if task == "causal_lm" else ("bad", "good", "great")
    labels = generator.integers(0, 3, 24).astype(np.int32)
    tags = [np.where(mark, generator.integers(0, 3, len(mark)), -1).astype(np.int32) for mark in marks]
    if task == "masked_lm":
        marks = [np.isin(np.arange(len(mark)), (0, len(mark) - 1), invert=True) for mark in marks]
    kind = {"question_answering": QuestionStore, "masked_lm": MaskedStore}.get(task, MemoryStore)
    store = kind(documents, marks, labels, label_names=names, tags=tags)
    per_row = per_row or (3 if task == "causal_lm" else 1)
    lengths = np.array([len(document) for document in documents])
    counts = {
        "causal_lm": np.array([int(mark[1:].sum()) for mark in marks]).reshape(-1, per_row).sum(1),
        "sequence_classification": np.ones(24, dtype=np.int64),
        "question_answering": np.ones(24, dtype=np.int64),
    }
    marked = np.array([int(mark.sum()) for mark in marks])
    rows = MemoryRows(
        np.arange(24), np.zeros(24, dtype=np.int64), lengths, np.arange(per_row, 25, per_row),
        counts.get(task, marked),
        (RowSource("memory", 0, 24 // per_row, 24 // per_row),),
    )  # fmt: skip
    return store, rows
