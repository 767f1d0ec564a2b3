"""The type `Task`: how rows become a batch, the loss, the figures of an evaluation, and which model fits.

Everything else (model, training loop, evaluation, export) takes a `Task` and knows no task by name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from data_prep.token_store import Rows, TokenStore
    from engine.batches import Batch, Rows64
    from engine.tasks.answers import AnswerOptions

#: transformers' names for what a head of the class for whole texts computes.
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]

#: Anything that JSON carries: results travel between ranks.
Detail = int | float | str | Sequence[int] | Sequence[float] | Sequence[str]


class Draw(NamedTuple):
    """The numbers from which a task draws what is random in a batch, together with each document's own number.

    No rank and no micro-batch is in it, so the same documents get the same masks however a step is split.
    """

    seed: int
    step: int  # of training, from 1; an evaluation has 0, so its draws stay the same
    mask_fraction: float = 0.15  # share of a document's words that are masked, where a task masks words


#: The draw of batches outside training.
STILL = Draw(0, 0)


@dataclass(frozen=True)
class LossOptions:
    """The settings of a run that change the loss of training; the defaults change nothing.

    An evaluation leaves them out: its loss is the plain one, so that runs with different settings can be compared.
    """

    label_smoothing: float = 0.0  # the share of a target's weight that is spread evenly over all labels
    class_weights: tuple[float, ...] | None = None  # by the model's number of a label; their mean over targets is 1


class Output(NamedTuple):
    """The result of a forward pass. A tuple, because DeepSpeed's hooks find tensors only in tuples, lists and dicts."""

    loss_sum: "Tensor"  # fp32 scalar: the sum of the losses of all targets, with a gradient
    values: dict[str, "Tensor"]  # for `Task.results`, empty in training: see `target_loss`
    auxiliary: dict[str, "Tensor"]  # sums of other losses by name, with gradients: see `engine.tasks.auxiliary`


@dataclass(frozen=True)
class DocumentResult:
    """All that an evaluation keeps of one document, or of one piece of it where rows are packed with pieces."""

    loss: float  # fp64 sum of the fp32 losses of its targets
    num_targets: int
    details: Mapping[str, Detail] = field(default_factory=dict)  # what the task's `figures` needs besides


@dataclass(frozen=True)
class Task:
    """Everything in which one task differs from another, for the engine."""

    name: str
    pipeline: str  # the Hub's name for it, for the model card
    auto_class: Callable[[Any], Any]  # configuration -> the transformers class that makes and loads its models
    packs: bool  # batches are flat, with documents end to end: attention keeps them apart, and models must be able to
    causal: bool  # a target is predicted from the tokens before it: models that see later ones are refused
    new_head: bool  # the head is made where the model's files have none; a head of another task is left out
    columns: Mapping[str, str]  # what it needs in the store, by column: what to say of a store without it
    #: (store, row index, rows, filler row, draw) -> the rows' tensors. Without rows: the filler row's, without targets.
    batch: Callable[["TokenStore", "Rows", "Rows64", int, Draw], "Batch"]
    sample: Callable[[int, int], "Batch"]  # (vocabulary, end token) -> a batch to try a model with, of any ids below
    loss: Callable[[Any, "Batch", LossOptions], Output]  # (Hugging Face model, batch, options) -> ...
    results: Callable[[Output, "Batch"], list[DocumentResult]]  # one for each document, in the batch's order
    #: (results of all documents in their order, the store they are of) -> figures beside the loss
    figures: Callable[[Sequence[DocumentResult], "TokenStore"], dict[str, float]]
    metrics: Mapping[str, Literal["min", "max"]]  # figures that the run file may choose the best model by
    best: str  # the metric that is taken where the run file names none
    #: (store, row index, rows, draw) -> how many targets they have; None: as many as the row index says.
    count_targets: Callable[["TokenStore", "Rows", "Rows64", Draw], int] | None = None
    #: The same results for people, by name: texts, and pictures (H, W, 3).
    report: Callable[[Sequence[DocumentResult], "TokenStore"], Mapping[str, "str | NDArray[np.uint8]"]] | None = None
    problem: Problem | None = None  # what the model's configuration calls it, where several are possible
    #: How often each label is a target of a store, by its number: weights and smoothing of labels have a meaning.
    label_counts: Callable[["TokenStore"], "NDArray[np.int64]"] | None = None
    #: (this task, a label) -> the same with figures about records that belong to none of the other labels.
    out_of_scope: Callable[["Task", str], "Task"] | None = None
    kinds: Mapping[str, "Task"] = field(default_factory=dict)  # by a column of the store: the task as it is with it
    second_texts: str | None = None  # the column with the first token of a pair's second text, 0 where there is none
    #: The task with a run file's settings of answers; None where it finds none.
    configured: Callable[["Task", "AnswerOptions"], "Task"] | None = None
    padded: "Task | None" = None  # the same for rows of one document, where attention cannot keep several apart
    why_padded: str = ""  # the reason for which a model's batches are padded, for people
    heads: tuple[str, ...] = ()  # endings of the names that transformers' classes for it have
    #: (output, batch, store) -> a JSON object for each document of an evaluation's batch, in the batch's order: what
    #: `fulltune predict` writes. It needs no true labels. None: the task predicts nothing of a record.
    predictions: Callable[[Output, "Batch", "TokenStore"], list[dict[str, Any]]] | None = None
    #: The objects of all documents of one record, in their order -> that of the record. None: a record is one document.
    join: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] | None = None

    def on(self, store: "TokenStore") -> "Task":
        """The task as it is on a store: its columns decide among the task's kinds."""
        return next((kind for column, kind in self.kinds.items() if column in store.columns), self)

    @property
    def known_metrics(self) -> dict[str, Literal["min", "max"]]:
        """The metrics of all its kinds."""
        return {name: mode for task in (self, *self.kinds.values()) for name, mode in task.metrics.items()}


#: The number of a held-out label that train has not: no prediction equals it, and it has no loss.
UNKNOWN_LABEL = -1


def target_loss(logits: "Tensor", target_ids: "Tensor", options: LossOptions | None = None) -> Output:
    """The cross-entropy of logits (U, V) for target_ids (U,), computed in fp32; 0 for UNKNOWN_LABEL.

    With gradients, as in training, it is that of torch with the weights and the smoothing of `options`. The weights
    have the mean 1 over the targets of the training store, so the sum is divided by the number of targets as ever.
    Without gradients, as in an evaluation, it is the plain one, and the values are "losses" (U,), fp32, and
    "predicted" (U,), the likeliest ids.
    """
    import torch
    import torch.nn.functional as F

    scores = logits.float()
    if torch.is_grad_enabled():
        options = options or LossOptions()
        weights = None if options.class_weights is None else scores.new_tensor(options.class_weights)
        smoothing = options.label_smoothing
        loss_sum = F.cross_entropy(
            scores, target_ids, weights, reduction="sum", ignore_index=UNKNOWN_LABEL, label_smoothing=smoothing
        )
        return Output(loss_sum, {}, {})
    loss_sum = F.cross_entropy(scores, target_ids, reduction="sum", ignore_index=UNKNOWN_LABEL)
    losses = F.cross_entropy(scores, target_ids, reduction="none", ignore_index=UNKNOWN_LABEL)
    return Output(loss_sum, {"losses": losses, "predicted": logits.argmax(-1)}, {})


def label_loss(logits: "Tensor", target_ids: "Tensor", options: LossOptions | None = None) -> Output:
    """As `target_loss`, of logits (U, L) over labels: without gradients, the values have these "logits" as well."""
    import torch

    output = target_loss(logits, target_ids, options)
    return output if torch.is_grad_enabled() else output._replace(values=output.values | {"logits": logits})


def document_results(
    losses: "Tensor", owners: "Tensor", num_documents: int, details: Sequence[Mapping[str, Detail]] | None = None
) -> list[DocumentResult]:
    """Returns a result for each of `num_documents`: the fp64 sums of `losses` (U,) by the document each belongs to.

    `owners` (U,) are numbers of documents.
    """
    import numpy as np

    places = owners.cpu().numpy()
    sums = np.bincount(places, losses.double().cpu().numpy(), num_documents).tolist()
    counts = np.bincount(places, minlength=num_documents).tolist()
    each = [{} for _ in counts] if details is None else details
    return [DocumentResult(*values) for values in zip(sums, counts, each, strict=True)]


def mean_loss(results: Sequence[DocumentResult]) -> float:
    """The mean over all targets; 0 without any. The sum is exact, so the order of results does not matter."""
    total = math.fsum(result.loss for result in results)
    return total / max(1, sum(result.num_targets for result in results))
