"""Exact figures on a held-out store, equal to the last digit on any number of ranks.

Rows are put into micro-batches before they are dealt to ranks, so every document goes through the
model with the same neighbours however many ranks there are. Of each document a result stays, a few
numbers, never logits. The results of all ranks come together in the order of documents, and rank 0
computes the figures from them once: two kinds of hosts cannot disagree about which model is the best.
"""

import itertools
import time
from collections.abc import Sequence

import numpy as np
import torch

from data_prep.token_store import Rows, TokenStore
from engine.batches import Rows64, segments_of
from engine.figures import Entry, Show, entries_of, figures_of
from engine.micro_batches import MicroBatches, groups_of_sources
from engine.ranks import heartbeat
from engine.ranks.agreement import from_rank_0, gather_json
from engine.ranks.distributed import Ranks
from engine.ranks.stop import StopSignal
from engine.tasks.task import STILL, Task
from engine.zero.zero_model import DeepSpeedEngine


def evaluate(
    engine: DeepSpeedEngine,
    task: Task,
    store: TokenStore,
    index: Rows,
    ranks: Ranks,
    size: MicroBatches,
    stop: StopSignal | None = None,
    show: Show | None = None,
) -> dict[str, float] | None:
    """Loss over all targets of the store, and the task's figures. All ranks call it.

    On rank 0 `show` gets the task's report for people: texts and pictures by name.
    None if `stop` was asked for on any rank in the meantime: then nothing has been counted.
    With several sources, also the loss of each, as ``loss/<name>``. Every row is used exactly once.
    Raises NumericalStopError when the loss is not finite.
    """
    started = time.perf_counter()
    groups = groups_of_sources(index, size)
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
    figures = from_rank_0(lambda: figures_of(sorted(itertools.chain(*(parts or []))), task, store, index, show))
    return figures | {"seconds": time.perf_counter() - started}


def _own_entries(
    engine: DeepSpeedEngine,
    task: Task,
    store: TokenStore,
    index: Rows,
    groups: Sequence[tuple[int, Rows64]],
    ranks: Ranks,
    stop: StopSignal | None,
) -> list[Entry] | None:
    """The results of this rank's documents, or None after a request to stop. A group has its source's number and rows.

    All ranks run the model equally often, because ZeRO-3 needs every rank in every collective: where
    micro-batches do not divide by ranks, some ranks run a filler row at last, which counts for nothing.
    """
    nothing = (0, np.zeros(0, dtype=np.int64))
    entries: list[Entry] = []
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
            places = zip(documents.tolist(), starts.tolist(), strict=True)
            entries += entries_of(task.results(output, batch), places, number)
    return entries
