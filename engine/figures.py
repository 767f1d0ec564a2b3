"""The figures of an evaluation, computed in one place from the results of all documents. Imports without torch."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.token_store import Rows, TokenStore
from engine.errors import NumericalStopError
from engine.tasks.task import DocumentResult, Task, mean_loss

#: (document, its first token here, number of the source, loss, number of targets, details): as JSON carries it.
Entry = tuple[int, int, int, float, int, dict[str, Any]]

#: Takes a task's report for people: texts, and pictures (H, W, 3), by name.
Show = Callable[[Mapping[str, str | NDArray[np.uint8]]], None]


def entries_of(results: Sequence[DocumentResult], places: Iterable[tuple[int, int]], source: int) -> list[Entry]:
    """The entries of documents of one source; `places` are (document, its first token) of each."""
    return [
        (document, start, source, result.loss, result.num_targets, dict(result.details))
        for (document, start), result in zip(places, results, strict=True)
    ]


def figures_of(
    entries: Sequence[Entry], task: Task, store: TokenStore, index: Rows, show: Show | None = None
) -> dict[str, float]:
    """The figures of an evaluation, from the entries of all documents in their order; `show` gets the task's report.

    NumericalStopError for a loss that is not finite.
    """
    results = [DocumentResult(loss, targets, details) for _, _, _, loss, targets, details in entries]
    loss = mean_loss(results)
    if not math.isfinite(loss):
        raise NumericalStopError("the held-out loss is not finite: the weights are unusable; go back to a checkpoint")
    figures = {"loss": loss} | task.figures(results, store)
    if show is not None and task.report is not None:
        show(task.report(results, store))
    names = [source.name for source in index.sources]
    if len(set(names)) > 1:
        sources: dict[str, list[DocumentResult]] = {name: [] for name in names}
        for entry, result in zip(entries, results, strict=True):
            sources[names[entry[2]]].append(result)
        figures |= {f"loss/{name}": mean_loss(own) for name, own in sources.items()}
    return figures | {"targets": float(sum(result.num_targets for result in results))}
