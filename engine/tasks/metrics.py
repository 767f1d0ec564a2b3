"""Figures that several tasks have, from true and predicted labels."""

import numpy as np
from numpy.typing import NDArray

from engine.tasks.task import UNKNOWN_LABEL


def label_figures(truth: NDArray[np.int64], predicted: NDArray[np.int64], num_labels: int) -> dict[str, float]:
    """Accuracy and macro F1 of predicted labels, both (N,). A model may have more than the data's `num_labels`.

    A true label that train has not (UNKNOWN_LABEL) is wrong whatever is predicted: it counts as a label of its own,
    behind all others, that nothing predicts and that is left out of the mean.
    """
    size = max(num_labels, int(predicted.max(initial=0)) + 1) + 1
    rows = np.where(truth == UNKNOWN_LABEL, size - 1, truth)
    places = np.bincount(rows * size + predicted, minlength=size**2)
    confusion = places.reshape(size, size)
    return {"accuracy": float(np.trace(confusion) / max(1, len(truth))), "macro_f1": macro_f1(confusion, num_labels)}


def macro_f1(confusion: NDArray[np.int64], num_labels: int | None = None) -> float:
    """Mean over labels, or over the first `num_labels`, of F1; confusion[i, j] counts label i predicted as j. A label
    that neither occurs nor is predicted counts as 0, as in scikit-learn's default over all labels."""
    hits = np.diag(confusion).astype(float)
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    scores = np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)
    return float(np.mean(scores[:num_labels]))
