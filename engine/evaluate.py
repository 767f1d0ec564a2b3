"""Exact figures on a held-out store: weighted by targets, whatever ranks and row counts are."""

import math
import time
from typing import Any

import numpy as np
import torch

from engine.batches import MicroBatches, RowIndex, Store, split_rows
from engine.config import TaskName
from engine.errors import NumericalStopError
from engine.ranks import heartbeat
from engine.ranks.distributed import Ranks
from engine.ranks.stop import StopSignal
from engine.tasks import build_batch
from engine.zero.zero_model import DeepSpeedEngine


def evaluate(
    engine: DeepSpeedEngine,
    task: TaskName,
    store: Store,
    index: RowIndex,
    num_labels: int,
    ranks: Ranks,
    size: MicroBatches,
    stop: StopSignal | None = None,
) -> dict[str, float] | None:
    """Loss over all targets of the store; perplexity, or accuracy and macro F1. All ranks call it.

    None if `stop` was asked for on any rank in the meantime: then nothing has been counted.

    With several sources, also the loss of each, as ``loss/<name>``. Every row is used exactly once;
    where rows do not divide by ranks, some ranks run a filler row that counts for nothing, so that all
    take part in every collective.
    """
    started = time.perf_counter()
    names = list(dict.fromkeys(source.name for source in index.sources))
    losses, counts = np.zeros(len(names)), np.zeros(len(names))
    confusion = np.zeros((num_labels, num_labels), dtype=np.int64)
    was_training = engine.module.training
    engine.eval()
    with torch.no_grad():
        for source in index.sources:
            number = names.index(source.name)
            rows = np.arange(source.first_row, source.first_row + source.num_rows)
            for parts in split_rows(index, rows, ranks.world_size, size):
                heartbeat.beat("batch")
                if stop is not None and ranks.any(stop.asked):
                    engine.train(was_training)
                    return None
                batch = build_batch(task, store, index, parts[ranks.rank], filler_row=source.first_row)
                batch = batch.to(ranks.device)
                batch_loss, predictions = engine(batch)
                losses[number] += float(batch_loss)
                counts[number] += len(batch.target_ids)
                if predictions is not None:
                    np.add.at(confusion, (batch.target_ids.cpu().numpy(), predictions.cpu().numpy()), 1)
    engine.train(was_training)
    sums = np.array(ranks.sum([*losses, *counts, *confusion.ravel().astype(float)]))
    losses, counts, hits = np.split(sums, [len(names), 2 * len(names)])
    num_targets = float(counts.sum())
    loss = float(losses.sum()) / max(1.0, num_targets)
    if not math.isfinite(loss):
        raise NumericalStopError("the held-out loss is not finite: the weights are unusable; go back to a checkpoint")
    figures = {"loss": loss}
    if num_labels:
        confusion = hits.reshape(num_labels, num_labels)
        figures |= {"accuracy": float(np.trace(confusion) / max(1.0, num_targets)), "macro_f1": macro_f1(confusion)}
    else:
        figures["perplexity"] = math.exp(min(loss, 700.0))
    if len(names) > 1:
        per_source = zip(names, losses, counts, strict=True)
        figures |= {f"loss/{name}": float(own / max(1.0, targets)) for name, own, targets in per_source}
    return figures | {"targets": num_targets, "seconds": time.perf_counter() - started}


def macro_f1(confusion: np.ndarray[Any, Any]) -> float:
    """Mean over labels of F1; confusion[i, j] counts label i predicted as j. A label that neither
    occurs nor is predicted counts as 0, as in scikit-learn's default over all labels."""
    hits = np.diag(confusion).astype(float)
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float(np.mean(np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)))
