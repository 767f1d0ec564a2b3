"""The module that DeepSpeed wraps: a Hugging Face model with the loss of its task, and the order of its labels."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.batches import Batch
from engine.fit.labels import match_labels, names_of
from engine.tasks.task import UNKNOWN_LABEL, LossOptions, Output, Task


class TaskModel(nn.Module):
    """A Hugging Face model with the loss of its task: the module that DeepSpeed wraps.

    The stock model runs inside, so every family works that transformers supports, and what is
    trained is what an export computes. `label_numbers` are the model's numbers of the store's labels,
    where they differ: batches and results have the store's, the model inside has its own.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        label_numbers: Sequence[int] | None = None,
        options: LossOptions | None = None,
    ):
        super().__init__()
        self.model = model
        self.task = task
        self._options = options or LossOptions()
        # UNKNOWN_LABEL is -1 in the store and in the model: as an index it takes the last number, itself.
        self._to_model = None if label_numbers is None else torch.tensor([*label_numbers, UNKNOWN_LABEL])
        self._to_store = None if label_numbers is None else _inverse(label_numbers, model.config.num_labels)

    def forward(self, batch: Batch) -> Output:
        if self._to_model is None or self._to_store is None:
            return self.task.loss(self.model, batch, self._options)
        output = self.task.loss(self.model, dataclasses.replace(batch, target_ids=self._own(batch)), self._options)
        to_store = self._to_store.to(batch.target_ids.device)
        values = dict(output.values)
        if "predicted" in values:
            values["predicted"] = to_store[values["predicted"]]
        if "logits" in values:
            values["logits"] = values["logits"][:, to_store.argsort()]
        return output._replace(values=values)

    def _own(self, batch: Batch) -> Tensor:
        """The targets in the model's numbers: a number each (U,), or a value for each label (U, L)."""
        assert self._to_model is not None
        numbers, targets = self._to_model.to(batch.target_ids.device), batch.target_ids
        if targets.ndim == 1:
            return numbers[targets]
        own = targets.new_zeros(len(targets), self.model.config.num_labels)
        own[:, numbers[:-1]] = targets
        return own


def _inverse(label_numbers: Sequence[int], num_labels: int) -> Tensor:
    """The store's number (L,) of each label of the model; those that it lacks come after its own."""
    others = [number for number in range(num_labels) if number not in label_numbers]
    inverse = torch.empty(num_labels, dtype=torch.int64)
    inverse[torch.tensor([*label_numbers, *others])] = torch.arange(num_labels)
    return inverse


def label_numbers(model: Any, label_names: Sequence[str]) -> tuple[int, ...] | None:
    """The numbers in a model of `build_model` of the store's labels; None where they are the same."""
    if not label_names:
        return None
    labels = match_labels(names_of(model.config.id2label), label_names)
    return None if labels.is_in_order else labels.numbers
