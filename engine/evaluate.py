"""Exact figures on a held-out store: weighted by targets, whatever ranks and row counts are."""

import math
import time
from typing import Any

import numpy as np
import torch

from engine.batches import RowIndex, Store, row_lengths, split_rows
from engine.config import TaskName
from engine.distributed import Ranks
from engine.errors import NumericalStopError
from engine.tasks import build_batch


def evaluate(
    engine: Any, task: TaskName, store: Store, index: RowIndex, num_labels: int, ranks: Ranks, micro_rows: int
) -> dict[str, float]:
    """Loss over all targets of the store; perplexity, or accuracy and macro F1. All ranks call it.

    Every row is used exactly once; where rows do not divide by ranks, some ranks run a filler row
    that counts for nothing, so that all take part in every collective.
    """
    started = time.perf_counter()
    lengths = row_lengths(index)
    loss_sum, num_targets = 0.0, 0
    confusion = np.zeros((num_labels, num_labels), dtype=np.int64)
    was_training = engine.module.training
    engine.eval()
    with torch.no_grad():
        for parts in split_rows(np.arange(len(lengths)), lengths, ranks.world_size, micro_rows):
            batch = build_batch(task, store, index, parts[ranks.rank], filler_row=0).to(ranks.device)
            batch_loss, predictions = engine(batch)
            loss_sum += float(batch_loss)
            num_targets += len(batch.target_ids)
            if predictions is not None:
                np.add.at(confusion, (batch.target_ids.cpu().numpy(), predictions.cpu().numpy()), 1)
    engine.train(was_training)
    totals = ranks.sum([loss_sum, float(num_targets), *confusion.ravel().astype(float)])
    loss = totals[0] / max(1.0, totals[1])
    if not math.isfinite(loss):
        raise NumericalStopError("the held-out loss is not finite: the weights are unusable; go back to a checkpoint")
    figures = {"loss": loss}
    if num_labels:
        confusion = np.array(totals[2:]).reshape(num_labels, num_labels)
        figures |= {"accuracy": float(np.trace(confusion) / max(1.0, totals[1])), "macro_f1": macro_f1(confusion)}
    else:
        figures["perplexity"] = math.exp(min(loss, 700.0))
    return figures | {"targets": totals[1], "seconds": time.perf_counter() - started}


def macro_f1(confusion: np.ndarray[Any, Any]) -> float:
    """Mean over labels of F1; confusion[i, j] counts label i predicted as j. A label that neither
    occurs nor is predicted counts as 0, as in scikit-learn's default over all labels."""
    hits = np.diag(confusion).astype(float)
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float(np.mean(np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)))
