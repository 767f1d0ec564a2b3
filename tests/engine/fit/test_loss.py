"""Weights of labels and smoothing: their numbers, and the loss that comes of them against torch and transformers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_fixtures import bert_vocabulary, prepared, section, write_jsonl
from sklearn.utils.class_weight import compute_class_weight
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from engine.errors import ConfigError
from engine.fit.loss import balanced_weights, given_weights, loss_options
from engine.sections import LossSection
from engine.tasks import TASKS, label_sets, scores, single_labels
from engine.tasks.task import UNKNOWN_LABEL, LossOptions, label_loss

TEXTS = [{"text": "the river", "label": name} for name in ("a", "b", "b", "c", "b", "b")]


def test_balanced_weights_are_those_of_scikit_learn_with_the_mean_1() -> None:
    labels = np.random.default_rng(1).choice(4, 300, p=[0.7, 0.2, 0.09, 0.01])
    counts = np.bincount(labels, minlength=4)
    assert balanced_weights(counts) == pytest.approx(compute_class_weight("balanced", classes=np.arange(4), y=labels))
    assert balanced_weights(counts)[labels].mean() == pytest.approx(1.0)
    assert balanced_weights(np.array([3, 0, 1])).tolist() == pytest.approx([2 / 3, 1.0, 2.0])


def test_given_weights_keep_their_proportions_and_have_the_mean_1() -> None:
    counts = np.array([5, 3, 2])
    weights = given_weights({"c": 4.0, "a": 0.5}, ("a", "b", "c"), counts)
    assert (weights / weights[1]).tolist() == pytest.approx([0.5, 1.0, 4.0])
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1.0)
    with pytest.raises(ConfigError, match=r"loss\.class_weights: cc, x is no label of the data; did you mean 'c'"):
        given_weights({"cc": 1.0, "x": 2.0}, ("a", "b", "c"), counts)


def test_the_models_own_order_and_its_further_labels(tmp_path: Path) -> None:
    store, _ = prepared(
        section(tmp_path, bert_vocabulary(tmp_path / "v.txt"), write_jsonl(tmp_path / "t.jsonl", TEXTS)),
        "sequence_classification",
    )
    task = TASKS["sequence_classification"]
    assert task.label_counts is not None and task.label_counts(store).tolist() == [1, 4, 1]
    weights = LossSection(label_smoothing=0.2, class_weights="balanced")
    options = loss_options(weights, task, store, (3, 0, 2), 5)
    assert options.label_smoothing == 0.2
    assert options.class_weights == pytest.approx((0.5, 1.0, 2.0, 2.0, 1.0))
    assert loss_options(LossSection(), task, store, None, 3) == LossOptions()


@pytest.mark.parametrize("task", ["token_classification"])
def test_tags_have_weights_too(tmp_path: Path, task: str) -> None:
    records = [{"tokens": ["old", "river", "stone"], "tags": ["O", "X", "O"]}] * 3
    store, _ = prepared(
        section(tmp_path, bert_vocabulary(tmp_path / "v.txt"), write_jsonl(tmp_path / "t.jsonl", records)), task
    )
    counts = TASKS[task].label_counts
    assert counts is not None and counts(store).tolist() == [6, 3] and counts(store).sum() == store.num_targets
    options = loss_options(LossSection(class_weights={"X": 5.0}), TASKS[task], store, None, 2)
    assert options.class_weights == pytest.approx((3 / 7, 15 / 7))


def random_logits(count: int, num_labels: int) -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, num_labels, generator=generator, requires_grad=True), generator


def test_the_loss_of_training_is_a_plain_computation_with_weights_and_smoothing() -> None:
    logits, generator = random_logits(20, 4)
    labels = torch.randint(0, 4, (20,), generator=generator)
    weights, smoothing = (0.5, 2.0, 1.0, 3.0), 0.3
    ours = label_loss(logits, labels, LossOptions(smoothing, weights)).loss_sum
    expected = 0.0
    for row, label in zip(logits.detach().double().softmax(-1).log().numpy(), labels.tolist(), strict=True):
        spread = sum(weights[other] * row[other] for other in range(4)) / 4
        expected -= (1 - smoothing) * weights[label] * row[label] + smoothing * spread
    assert ours.item() == pytest.approx(expected, rel=1e-6)
    assert label_loss(logits, labels).loss_sum.item() == pytest.approx(F.cross_entropy(logits, labels).item() * 20)


def test_an_evaluation_leaves_weights_and_smoothing_out() -> None:
    logits, generator = random_logits(20, 4)
    labels = torch.randint(0, 4, (20,), generator=generator)
    labels[3] = UNKNOWN_LABEL
    with torch.no_grad():
        output = single_labels.loss(logits, labels, LossOptions(0.3, (0.5, 2.0, 1.0, 3.0)))
    expected = F.cross_entropy(logits, labels, reduction="none", ignore_index=UNKNOWN_LABEL)
    assert torch.equal(output.values["losses"], expected)


@pytest.mark.parametrize("options", [LossOptions(), LossOptions(0.1, (1.0, 2.0, 3.0))], ids=["plain", "weighted"])
def test_no_targets_have_a_loss_of_zero_with_a_gradient(options: LossOptions) -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    for output in (
        single_labels.loss(logits, torch.zeros(0, dtype=torch.int64), options),
        label_sets.loss(logits, torch.zeros(0, 3)),
        scores.loss(logits, torch.zeros(0)),
    ):
        assert output.loss_sum.item() == 0.0 and output.loss_sum.requires_grad


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_the_mean_over_targets_is_transformers_own_loss(problem: str) -> None:
    """Its value and its gradient, for each kind of target: a target is a document."""
    num_labels = 1 if problem == "regression" else 5
    logits, generator = random_logits(16, num_labels)
    kinds: dict[str, Any] = {
        "single_label_classification": torch.randint(0, 5, (16,), generator=generator),
        "multi_label_classification": (torch.rand(16, 5, generator=generator) < 0.4).float(),
        "regression": torch.randn(16, generator=generator),
    }
    targets = kinds[problem]
    config = SimpleNamespace(problem_type=problem, num_labels=num_labels)
    theirs = ForSequenceClassificationLoss(targets, logits, config)
    (expected,) = torch.autograd.grad(theirs, logits)
    output = {
        "single_label_classification": lambda: single_labels.loss(logits, targets, LossOptions()),
        "multi_label_classification": lambda: label_sets.loss(logits, targets),
        "regression": lambda: scores.loss(logits, targets),
    }[problem]()
    ours = output.loss_sum / len(targets)
    (gradient,) = torch.autograd.grad(ours, logits)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected)
