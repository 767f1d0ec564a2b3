"""The work of an evaluation or of predictions with a model folder, and what its processes leave. No torch."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.token_store import TokenStore, open_rows
from engine.config import configured_task
from engine.errors import DataError
from engine.figures import Entry, figures_of
from engine.sections import EvaluationSection
from engine.tasks.task import Task

PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class Plan:
    """The work of all processes of an evaluation, or of predictions where it `predicts`."""

    model: str  # a Hugging Face folder
    task: str
    store: str
    row_tokens: int
    predicts: bool
    one_document_a_row: bool = False
    micro_rows: int = 32
    micro_tokens: int | None = None  # goes before `micro_rows`
    workers: int = 1
    evaluation: dict[str, Any] = field(default_factory=dict)  # that section of a run file

    def settled_task(self, store: TokenStore) -> Task:
        """The task as it is on `store`, with the settings of its evaluations. DataError for a store without targets."""
        section = EvaluationSection.model_validate(self.evaluation)
        task, label = configured_task(self.task, section).on(store), section.out_of_scope_label
        for column, fault in task.columns.items():
            if column not in store.columns:
                raise DataError(f"{store.path}: {fault}")
        return task if label is None or task.out_of_scope is None else task.out_of_scope(task, label)

    def write(self, folder: Path) -> None:
        """Write the plan into the folder that its processes work in."""
        (folder / PLAN_NAME).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """The plan that `write` left in `folder`."""
        return cls(**json.loads((folder / PLAN_NAME).read_text(encoding="utf-8")))


def part_path(folder: Path, number: int) -> Path:
    """The file of lines of JSON that process `number` writes: an `Entry` each, or a document and its prediction."""
    return folder / f"part-{number}.jsonl"


def error_path(folder: Path, number: int) -> Path:
    """The file in which process `number` leaves its exit code and why it failed."""
    return folder / f"error-{number}.json"


def read_figures(plan: Plan, folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """The figures of the whole store, from the parts of all processes, and the task's tables of them by name.

    NumericalStopError as `figures_of`.
    """
    entries: list[Entry] = []
    for number in range(plan.workers):
        with part_path(folder, number).open(encoding="utf-8") as file:
            entries += [_entry(json.loads(line)) for line in file]
    store = TokenStore.open(Path(plan.store))
    entries.sort(key=lambda entry: entry[:2])
    shown: dict[str, Any] = {}
    rows, task = open_rows(store, plan.row_tokens), plan.settled_task(store)
    figures = figures_of(entries, task, store, rows, shown.update)
    return figures, {name: text for name, text in shown.items() if isinstance(text, str)}


def _entry(values: list[Any]) -> Entry:
    document, start, source, loss, targets, details = values
    return document, start, source, loss, targets, details


class Predictions:
    """The predictions of all documents of a store, read from the parts when they are asked for."""

    def __init__(self, plan: Plan, folder: Path):
        """Note where in the parts each document's prediction stands."""
        store = TokenStore.open(Path(plan.store))
        num_documents = store.num_documents
        self._part = np.full(num_documents, -1, dtype=np.int32)
        self._offset = np.zeros(num_documents, dtype=np.int64)
        self._files = [part_path(folder, number).open("rb") for number in range(plan.workers)]
        self._join = plan.settled_task(store).join
        for number, file in enumerate(self._files):
            for document, offset in _places(file):
                self._part[document], self._offset[document] = number, offset

    def close(self) -> None:
        """Close the parts."""
        for file in self._files:
            file.close()

    def of(self, documents: list[int]) -> dict[str, Any]:
        """The prediction of a record, which has these documents. DataError if one of them has none."""
        found = [self._read(document) for document in documents]
        if self._join is not None:
            return self._join(found)
        if len(found) != 1:
            raise DataError(f"a record has {len(found)} documents, and its task does not join their predictions")
        return found[0]

    def _read(self, document: int) -> dict[str, Any]:
        if self._part[document] < 0:
            raise DataError(f"document {document} has no prediction")
        file = self._files[int(self._part[document])]
        file.seek(int(self._offset[document]))
        prediction: dict[str, Any] = json.loads(file.readline())[1]
        return prediction


def _places(file: Any) -> Iterator[tuple[int, int]]:
    """The document of each line of a part, and the place of the line."""
    offset = 0
    for line in file:
        yield int(line[1 : line.index(b",")]), offset
        offset += len(line)
