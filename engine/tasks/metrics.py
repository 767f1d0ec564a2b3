"""Figures that several tasks have, from true and predicted labels or scores in the order of their documents."""

import numpy as np
from numpy.typing import NDArray

from engine.tasks.task import UNKNOWN_LABEL

Counts = NDArray[np.int64]
#: Figures that need a label for what belongs to none of the others.
SCOPE_METRICS = ("out_of_scope_recall", "in_scope_accuracy")


def confusion_of(truth: Counts, predicted: Counts, num_labels: int) -> Counts:
    """How often each label (rows) is predicted as each (columns), of labels by number, (N,) each.

    A model may have more labels than the data's `num_labels`. The last row and column are those of UNKNOWN_LABEL, a
    true label that train has not: nothing predicts it.
    """
    size = max(num_labels, int(predicted.max(initial=0)) + 1) + 1
    rows = np.where(truth == UNKNOWN_LABEL, size - 1, truth)
    return np.bincount(rows * size + predicted, minlength=size**2).reshape(size, size)


def label_figures(truth: Counts, predicted: Counts, num_labels: int) -> dict[str, float]:
    """Accuracy, macro and weighted F1 and Matthews' correlation of predicted labels, both (N,).

    Macro F1 is the mean over the labels that occur or are predicted, as in scikit-learn; so it is the same whether a
    model or its data name more labels. Weighted F1 is the mean over all true ones by their number. A true label that
    train has not (UNKNOWN_LABEL) is wrong whatever is predicted: it counts as a label of its own behind all others,
    with F1 0, and is left out of macro F1.
    """
    confusion = confusion_of(truth, predicted, num_labels)
    scores, support = f1_scores(confusion), confusion.sum(axis=1)
    known = scores[:-1][(support + confusion.sum(axis=0))[:-1] > 0]
    return {
        "accuracy": float(np.trace(confusion) / max(1, len(truth))),
        "macro_f1": float(known.mean()) if len(known) else 0.0,
        "weighted_f1": float((scores * support).sum() / max(1, support.sum())),
        "matthews": matthews(confusion),
    }


def f1_scores(confusion: Counts) -> NDArray[np.float64]:
    """F1 of each label (L,); 0 for one that neither occurs nor is predicted, as in scikit-learn."""
    return share(2 * np.diag(confusion), confusion.sum(axis=0) + confusion.sum(axis=1))


def precisions_and_recalls(confusion: Counts) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall of each label (L,); 0 where nothing is predicted, or nothing is there."""
    hits = np.diag(confusion)
    return share(hits, confusion.sum(axis=0)), share(hits, confusion.sum(axis=1))


def matthews(confusion: Counts) -> float:
    """Matthews' correlation for any number of labels (Gorodkin 2004); 0 where all labels, or all predictions, agree."""
    true, guessed = confusion.sum(axis=1).astype(float), confusion.sum(axis=0).astype(float)
    total = float(confusion.sum())
    spread = (total**2 - float(true @ true)) * (total**2 - float(guessed @ guessed))
    return 0.0 if spread == 0 else float((np.trace(confusion) * total - true @ guessed) / np.sqrt(spread))


def scope_figures(truth: Counts, predicted: Counts, label: int) -> dict[str, float]:
    """The share of records of an out-of-scope `label` that are found, and the accuracy on all others; 0 without any."""
    outside = truth == label
    right = truth == predicted
    values = (right[chosen].sum() / max(1, chosen.sum()) for chosen in (outside, ~outside))
    return dict(zip(SCOPE_METRICS, map(float, values), strict=True))


def set_figures(truth: NDArray[np.bool_], predicted: NDArray[np.bool_], num_unknown: Counts) -> dict[str, float]:
    """Micro and macro F1 and exact match of sets of labels, (N, L) and (N, M), M >= L: a model may have more labels.

    `num_unknown` (N,) are the true labels of each document that train has not: micro F1 counts them as missed, and no
    prediction matches such a set. Macro F1 is the mean over the data's labels, 0 for one that never occurs.
    """
    num_labels = truth.shape[1]
    full = np.zeros_like(predicted)
    full[:, :num_labels] = truth
    hits, true, guessed = ((counts).sum(axis=0) for counts in (full & predicted, full, predicted))
    exact = (full == predicted).all(axis=1) & (num_unknown == 0)
    return {
        "micro_f1": float(2 * hits.sum() / max(1, true.sum() + num_unknown.sum() + guessed.sum())),
        "macro_f1": float(np.mean(share(2 * hits, true + guessed)[:num_labels])),
        "exact_match": float(exact.sum() / max(1, len(exact))),
    }


def score_figures(truth: NDArray[np.float64], predicted: NDArray[np.float64]) -> dict[str, float]:
    """Pearson's and Spearman's correlation and the mean squared error of scores, both (N,)."""
    return {
        "pearson": pearson(truth, predicted),
        "spearman": pearson(_ranks(truth), _ranks(predicted)),
        "mse": float(np.mean((truth - predicted) ** 2)) if len(truth) else 0.0,
    }


def pearson(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Pearson's correlation; 0 where one of them never changes, so that there is nothing to compare."""
    if len(one) == 0 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    first, second = (_unit(values - values.mean()) for values in (one, other))
    return float(np.clip(first @ second, -1.0, 1.0))


def _unit(values: NDArray[np.float64]) -> NDArray[np.float64]:
    scaled = values / np.abs(values).max()  # squares of very large or small values would leave the range
    result: NDArray[np.float64] = scaled / np.sqrt(scaled @ scaled)
    return result


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[np.float64] = (ends - (counts - 1) / 2)[places]
    return ranks


def share(part: Counts, whole: Counts) -> NDArray[np.float64]:
    """part / whole for each label, 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
