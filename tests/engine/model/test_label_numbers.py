"""A model with a head of its own order inside `TaskModel`: batches and results have the store's numbers, it has its own."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

from engine.batches import Batch
from engine.model.task_model import TaskModel, label_numbers
from engine.tasks import TASKS
from engine.tasks.task import UNKNOWN_LABEL

NAMES = ("neutral", "positive", "mixed", "negative")
STORE = ("negative", "neutral", "positive")
#: The model's numbers of the store's labels.
NUMBERS = (3, 0, 1)


def model_of(task: str) -> Any:
    torch.manual_seed(3)
    names = dict(enumerate(NAMES))
    config = hf.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=1.0,
        id2label=names, label2id={name: number for number, name in names.items()},
    )  # fmt: skip
    return TASKS[task].auto_class(config).from_config(config)


def batch_of(task: str, numbers: list[int]) -> Batch:
    """Six texts of four tokens with a target each: the text, or its second token."""
    ids = torch.randint(5, 40, (6, 4), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(6) if task == "sequence_classification" else torch.arange(6) * 4 + 1
    columns = {"pair_starts": torch.zeros(6, dtype=torch.int64)}
    return Batch(
        ids, positions, torch.tensor(numbers), tuple(range(6)), 24, lengths=torch.full((6,), 4), columns=columns,
        target_owners=torch.arange(6),
    )  # fmt: skip


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification"])
def test_losses_and_predictions_are_the_models_in_the_stores_numbers(task: str) -> None:
    model = model_of(task)
    assert label_numbers(model, STORE) == NUMBERS
    numbers = [0, 1, 2, 2, 1, 0]
    theirs = batch_of(task, [NUMBERS[number] for number in numbers])
    plain, wrapped = TaskModel(model, TASKS[task]), TaskModel(model, TASKS[task], NUMBERS)
    ours = batch_of(task, numbers)
    assert torch.equal(wrapped(ours).loss_sum, plain(theirs).loss_sum)
    assert not torch.equal(plain(ours).loss_sum, plain(theirs).loss_sum)
    with torch.no_grad():
        expected, output = plain(theirs), wrapped(ours)
    assert torch.equal(output.values["losses"], expected.values["losses"])
    names = [*STORE, "mixed"]  # what the store lacks comes behind
    guessed = [names[number] for number in output.values["predicted"].tolist()]
    assert guessed == [NAMES[number] for number in expected.values["predicted"].tolist()]
    assert len(set(guessed)) > 1
    by_name = dict(zip(NAMES, expected.values["logits"].unbind(1), strict=True))
    assert torch.equal(output.values["logits"], torch.stack([by_name[name] for name in names], 1))


def test_a_label_that_train_has_not_stays_one() -> None:
    model, task = model_of("sequence_classification"), TASKS["sequence_classification"]
    batch = batch_of("sequence_classification", [0, UNKNOWN_LABEL, 2, 2, 1, 0])
    with torch.no_grad():
        losses = TaskModel(model, task, NUMBERS)(batch).values["losses"]
    assert losses[1] == 0 and (losses != 0).sum() == 5
    results = task.results(TaskModel(model.eval(), task, NUMBERS)(batch)._replace(values=_values(model, batch)), batch)
    assert results[1].num_targets == 0


def _values(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return TaskModel(model, TASKS["sequence_classification"], NUMBERS)(dataclasses.replace(batch)).values


def test_figures_count_a_label_that_the_data_lack_as_wrong() -> None:
    model, task = model_of("sequence_classification"), TASKS["sequence_classification"]
    with torch.no_grad():
        model.classifier.bias[2] = 100.0  # always mixed, which no record has
        batch = batch_of("sequence_classification", [0, 1, 2, 2, 1, 0])
        output = TaskModel(model, task, NUMBERS)(batch)
    figures = task.figures(task.results(output, batch), SimpleNamespace(label_names=STORE))
    assert figures == {"accuracy": 0.0, "macro_f1": 0.0, "weighted_f1": 0.0, "matthews": 0.0}


def test_equal_orders_need_no_numbers() -> None:
    assert label_numbers(model_of("token_classification"), NAMES) is None
    assert label_numbers(model_of("token_classification"), ()) is None
