"""Figures of labels, sets of labels and scores against scikit-learn and scipy, on many random cases."""

import warnings
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as oracle

from engine.tasks.metrics import label_figures, pearson, scope_figures, score_figures, set_figures
from engine.tasks.task import UNKNOWN_LABEL

CASES = 60


def labels_of(generator: np.random.Generator) -> tuple[Any, Any, int]:
    """True and predicted labels of up to 40 texts; often a label is absent, or all are the same."""
    num_labels, count = int(generator.integers(2, 9)), int(generator.integers(1, 40))
    most_true, most_guessed = generator.integers(1, num_labels + 1, 2)
    return generator.integers(0, most_true, count), generator.integers(0, most_guessed, count), num_labels


@pytest.mark.parametrize("seed", range(3))
def test_figures_of_labels_are_those_of_scikit_learn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    for _ in range(CASES):
        truth, predicted, num_labels = labels_of(generator)
        f1 = {kind: oracle.f1_score(truth, predicted, average=kind, zero_division=0) for kind in ("macro", "weighted")}
        assert label_figures(truth, predicted, num_labels) == pytest.approx(
            {
                "accuracy": oracle.accuracy_score(truth, predicted),
                "macro_f1": f1["macro"],
                "weighted_f1": f1["weighted"],
                "matthews": _matthews(truth, predicted),
            },
            abs=1e-12,
        )


def _matthews(truth: Any, predicted: Any) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single label
        return float(oracle.matthews_corrcoef(truth, predicted))


def test_labels_that_train_has_not_are_a_label_of_their_own_that_nothing_predicts() -> None:
    generator = np.random.default_rng(7)
    for _ in range(CASES):
        truth, predicted, num_labels = labels_of(generator)
        truth = np.where(generator.random(len(truth)) < 0.3, UNKNOWN_LABEL, truth)
        other = np.where(truth == UNKNOWN_LABEL, 99, truth)
        figures = label_figures(truth, predicted, num_labels)
        weighted = oracle.f1_score(other, predicted, average="weighted", zero_division=0)
        known = sorted({*other.tolist(), *predicted.tolist()} - {99})
        macro = oracle.f1_score(other, predicted, labels=known, average="macro", zero_division=0)
        assert figures["accuracy"] == pytest.approx(oracle.accuracy_score(other, predicted))
        assert figures["weighted_f1"] == pytest.approx(weighted) and figures["macro_f1"] == pytest.approx(macro)
        assert figures["matthews"] == pytest.approx(_matthews(other, predicted), abs=1e-12)


def test_no_texts_have_figures_of_zero() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert set(label_figures(none, none, 3).values()) == {0.0}
    assert set(score_figures(none.astype(float), none.astype(float)).values()) == {0.0}
    assert set(set_figures(np.zeros((0, 3), bool), np.zeros((0, 3), bool), none).values()) == {0.0}
    assert set(scope_figures(none, none, 1).values()) == {0.0}


def test_millions_of_texts_do_not_leave_the_range() -> None:
    truth = np.repeat(np.arange(4), 2_000_000)
    predicted = np.roll(truth, 500_000)
    assert label_figures(truth, predicted, 4)["matthews"] == pytest.approx(2 / 3)


def test_figures_of_sets_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(2)
    for _ in range(CASES):
        count, num_labels = int(generator.integers(1, 30)), int(generator.integers(2, 8))
        shape = (count, num_labels)
        truth, predicted = (generator.random(shape) < generator.random((1, num_labels)) for _ in range(2))
        truth[:, 0] &= generator.random() < 0.5  # one that never occurs
        figures = set_figures(truth, predicted, np.zeros(count, dtype=np.int64))
        assert figures == pytest.approx(
            {
                "micro_f1": oracle.f1_score(truth, predicted, average="micro", zero_division=0),
                "macro_f1": oracle.f1_score(truth, predicted, average="macro", zero_division=0),
                "exact_match": oracle.accuracy_score(truth, predicted),
            },
            abs=1e-12,
        )


def test_unknown_labels_of_a_set_are_missed_and_labels_of_the_model_alone_are_wrong() -> None:
    truth = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=bool)
    predicted = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=bool)
    unknown = np.array([0, 2, 0, 1])
    wide = np.zeros((4, 6), dtype=bool)  # two columns for the unknown ones, which nobody predicts
    wide[:, :2], wide[1, 3:5], wide[3, 3] = truth, True, True
    guessed = np.zeros((4, 6), dtype=bool)
    guessed[:, :3] = predicted
    assert set_figures(truth, predicted, unknown) == pytest.approx(
        {
            "micro_f1": oracle.f1_score(wide, guessed, average="micro"),
            "macro_f1": oracle.f1_score(truth, predicted[:, :2], average="macro"),
            "exact_match": oracle.accuracy_score(wide, guessed),
        }
    )
    assert oracle.accuracy_score(wide, guessed) == 0.25


def test_figures_of_scores_are_those_of_scipy_with_ties_too() -> None:
    generator = np.random.default_rng(5)
    for place in range(CASES):
        count = int(generator.integers(3, 50))
        truth = generator.integers(0, 5, count) / 2.0 if place % 2 else generator.normal(size=count) * 10.0**place
        truth[:2] = 0.0, 1.0
        predicted = np.round(truth * generator.normal() + generator.normal(size=count), place % 3)
        predicted[:2] = 1.5, -1.0
        figures = score_figures(truth, predicted)
        assert figures["pearson"] == pytest.approx(stats.pearsonr(truth, predicted)[0], abs=1e-9)
        assert figures["spearman"] == pytest.approx(stats.spearmanr(truth, predicted)[0], abs=1e-9)
        assert figures["mse"] == pytest.approx(oracle.mean_squared_error(truth, predicted))


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [2.0]], ids=["constant", "single"])
def test_scores_that_never_change_correlate_with_nothing(values: list[float]) -> None:
    other = np.arange(len(values), dtype=float)
    assert pearson(np.array(values), other) == 0.0 == pearson(other, np.array(values))
    assert score_figures(np.array(values), other)["spearman"] == 0.0


def test_tiny_and_huge_scores_correlate_as_others_do() -> None:
    values, others = np.array([1.0, 2.0, 4.0, 3.0]), np.array([2.0, 1.0, 5.0, 4.0])
    expected = stats.pearsonr(values, others)[0]
    assert pearson(values * 1e-200, others * 1e200) == pytest.approx(expected)
    assert pearson(values, values) == 1.0


def test_figures_about_what_is_out_of_scope() -> None:
    generator = np.random.default_rng(3)
    for _ in range(CASES):
        truth, predicted, _ = labels_of(generator)
        outside = truth == 1
        found = scope_figures(truth, predicted, 1)
        expected = oracle.recall_score(outside, predicted == 1, zero_division=0)
        assert found["out_of_scope_recall"] == pytest.approx(expected)
        rest = oracle.accuracy_score(truth[~outside], predicted[~outside]) if (~outside).any() else 0.0
        assert found["in_scope_accuracy"] == pytest.approx(rest)
