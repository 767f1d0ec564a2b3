"""Exact figures on a held-out store, equal to the last digit on any number of ranks.

Rows are put into micro-batches before they are dealt to ranks, so every document goes through the
model with the same neighbours however many ranks there are. Of each document a result stays, a few
numbers, never logits. The results of all ranks come together in the order of documents, and rank 0
computes the figures from them once: two kinds of hosts cannot disagree about which model is the best.
"""

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data_prep.token_store import Rows, TokenStore
from engine.batches import Rows64, segments_of
from engine.errors import NumericalStopError
from engine.micro_batches import MicroBatches, row_groups
from engine.ranks import heartbeat
from engine.ranks.agreement import from_rank_0, gather_json
from engine.ranks.distributed import Ranks
from engine.ranks.stop import StopSignal
from engine.tasks.task import STILL, DocumentResult, Task, mean_loss
from engine.zero.zero_model import DeepSpeedEngine

#: (document, its first token here, number of the source, loss, number of targets, details): as JSON carries it.
_Entry = tuple[int, int, int, float, int, dict[str, Any]]


def evaluate(
    engine: DeepSpeedEngine,
    task: Task,
    store: TokenStore,
    index: Rows,
    ranks: Ranks,
    size: MicroBatches,
    stop: StopSignal | None = None,
) -> dict[str, float] | None:
    """Loss over all targets of the store, and the task's figures. All ranks call it.

    None if `stop` was asked for on any rank in the meantime: then nothing has been counted.
    With several sources, also the loss of each, as ``loss/<name>``. Every row is used exactly once.
    Raises NumericalStopError when the loss is not finite.
    """
    started = time.perf_counter()
    groups = [
        (number, rows)
        for number, source in enumerate(index.sources)
        for rows in row_groups(index, np.arange(source.first_row, source.first_row + source.num_rows), size)
    ]
    was_training = engine.module.training
    engine.eval()
    with torch.no_grad():
        entries = _own_entries(engine, task, store, index, groups, ranks, stop)
    engine.train(was_training)
    if entries is None:
        return None
    heartbeat.beat("results")
    parts = gather_json(entries, ranks.cpu_group)
    del entries  # a few hundred bytes a document, which rank 0 holds a second time now
    figures = from_rank_0(lambda: _figures(sorted(itertools.chain(*(parts or []))), task, store, index))
    return figures | {"seconds": time.perf_counter() - started}


def _own_entries(
    engine: DeepSpeedEngine,
    task: Task,
    store: TokenStore,
    index: Rows,
    groups: Sequence[tuple[int, Rows64]],
    ranks: Ranks,
    stop: StopSignal | None,
) -> list[_Entry] | None:
    """The results of this rank's documents, or None after a request to stop. A group has its source's number and rows.

    All ranks run the model equally often, because ZeRO-3 needs every rank in every collective: where
    micro-batches do not divide by ranks, some ranks run a filler row at last, which counts for nothing.
    """
    nothing = (0, np.zeros(0, dtype=np.int64))
    entries: list[_Entry] = []
    for first in range(0, len(groups), ranks.world_size):
        heartbeat.beat("batch")
        if stop is not None and ranks.any(stop.asked):
            return None
        here = groups[first : first + ranks.world_size]
        number, rows = here[ranks.rank] if ranks.rank < len(here) else nothing
        batch = task.batch(store, index, rows, int(here[-1][1][-1]), STILL).to(ranks.device)
        output = engine(batch)
        if len(rows):
            documents, starts, _, _ = segments_of(index, rows)
            results = task.results(output, batch)
            entries += [
                (document, start, number, result.loss, result.num_targets, dict(result.details))
                for document, start, result in zip(documents.tolist(), starts.tolist(), results, strict=True)
            ]
    return entries


def _figures(entries: Sequence[_Entry], task: Task, store: TokenStore, index: Rows) -> dict[str, float]:
    """The figures of an evaluation, from the entries of all documents in their order."""
    results = [DocumentResult(loss, targets, details) for _, _, _, loss, targets, details in entries]
    loss = mean_loss(results)
    if not math.isfinite(loss):
        raise NumericalStopError("the held-out loss is not finite: the weights are unusable; go back to a checkpoint")
    figures = {"loss": loss} | task.figures(results, store)
    names = [source.name for source in index.sources]
    if len(set(names)) > 1:
        sources: dict[str, list[DocumentResult]] = {name: [] for name in names}
        for entry, result in zip(entries, results, strict=True):
            sources[names[entry[2]]].append(result)
        figures |= {f"loss/{name}": mean_loss(own) for name, own in sources.items()}
    return figures | {"targets": float(sum(result.num_targets for result in results))}
