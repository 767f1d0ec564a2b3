"""Figures that several tasks have, from true and predicted labels."""

import numpy as np
from numpy.typing import NDArray


def label_figures(truth: NDArray[np.int64], predicted: NDArray[np.int64], num_labels: int) -> dict[str, float]:
    """Accuracy and macro F1 of predicted labels, both (N,)."""
    places = np.bincount(truth * num_labels + predicted, minlength=num_labels**2)
    confusion = places.reshape(num_labels, num_labels)
    return {"accuracy": float(np.trace(confusion) / max(1, len(truth))), "macro_f1": macro_f1(confusion)}


def macro_f1(confusion: NDArray[np.int64]) -> float:
    """Mean over labels of F1; confusion[i, j] counts label i predicted as j. A label that neither
    occurs nor is predicted counts as 0, as in scikit-learn's default over all labels."""
    hits = np.diag(confusion).astype(float)
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float(np.mean(np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)))
