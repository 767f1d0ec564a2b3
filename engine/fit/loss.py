"""The settings of a run that change its loss, for its data and its model."""

import difflib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.token_store import TokenStore
from engine.errors import ConfigError
from engine.sections import LossSection
from engine.tasks.task import LossOptions, Task


def loss_options(
    section: LossSection, task: Task, store: TokenStore, numbers: Sequence[int] | None, num_labels: int
) -> LossOptions:
    """The options of the loss for a model of `num_labels` labels; `numbers`: its numbers of the store's, None if equal.

    ConfigError for a weight of a label that the data lack.
    """
    if section.class_weights is None or task.label_counts is None:
        return LossOptions(section.label_smoothing)
    counts = task.label_counts(store)
    if section.class_weights == "balanced":
        own = balanced_weights(counts)
    else:
        own = given_weights(section.class_weights, store.label_names, counts)
    weights = np.ones(num_labels)
    weights[np.arange(len(own)) if numbers is None else np.array(numbers)] = own
    return LossOptions(section.label_smoothing, tuple(weights.tolist()))


def balanced_weights(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(L,): n / (K * count) for the K labels that occur among n targets; 1 for the others, which no target has.

    All labels that occur then have the same share of the loss, and the mean over the targets is 1.
    """
    occurs = counts > 0
    weights = np.ones(len(counts))
    weights[occurs] = counts.sum() / (occurs.sum() * counts[occurs])
    return weights


def given_weights(given: Mapping[str, float], names: Sequence[str], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(L,): the `given` weights by name, and 1 for all other labels, scaled to the mean 1 over the targets."""
    if unknown := [name for name in given if name not in names]:
        near = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"loss.class_weights: {', '.join(unknown)} is no label of the data{hint}")
    weights = np.array([given.get(name, 1.0) for name in names])
    scaled: NDArray[np.float64] = weights * (counts.sum() / (weights * counts).sum())
    return scaled
