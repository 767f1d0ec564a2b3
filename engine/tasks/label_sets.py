"""Any number of labels for each text: its loss, its figures, and what people see of them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from engine.tasks.task import UNKNOWN_LABEL, DocumentResult, Output, document_results

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from data_prep.token_store import TokenStore
    from engine.batches import Batch

METRICS: Mapping[str, Literal["min", "max"]] = {
    "micro_f1": "max",
    "macro_f1": "max",
    "exact_match": "max",
    "loss": "min",
}
#: A label is predicted where its probability is at least so much.
THRESHOLD = 0.5


def targets_of(sets: Sequence["NDArray[np.int32]"], num_labels: int) -> tuple["Tensor", dict[str, "Tensor"]]:
    """Sets of labels as ones and zeros (U, L), and (U,) how many of each set train has not."""
    import torch

    targets, unknown = torch.zeros(len(sets), num_labels), torch.zeros(len(sets), dtype=torch.int64)
    for place, numbers in enumerate(sets):
        known = numbers[numbers != UNKNOWN_LABEL]
        targets[place, torch.from_numpy(known.astype("int64"))] = 1.0
        unknown[place] = len(numbers) - len(known)
    return targets, {"num_unknown": unknown}


def loss(logits: "Tensor", targets: "Tensor") -> Output:
    """The binary cross-entropy of logits (U, L) for targets (U, L): of each document the mean over its labels.

    A target is a document, so the loss of a step is the mean over documents and labels, as transformers defines it.
    Targets (U, 1) stand for all labels alike. Without gradients the values are "losses" (U,), fp32, and "logits"
    (U, L).
    """
    import torch
    import torch.nn.functional as F

    own = targets.expand_as(logits)
    losses = F.binary_cross_entropy_with_logits(logits.float(), own, reduction="none").mean(-1)
    if torch.is_grad_enabled():
        return Output(losses.sum(), {}, {})
    return Output(losses.sum(), {"losses": losses, "logits": logits}, {})


def results(output: Output, batch: "Batch") -> list[DocumentResult]:
    """With the true and the predicted labels of each document, and how many of its labels train has not."""
    true, guessed = batch.target_ids > 0, output.values["logits"].float().sigmoid() >= THRESHOLD
    details = [
        {
            "labels": own.nonzero().flatten().tolist(),
            "predicted": guess.nonzero().flatten().tolist(),
            "unknown": unknown,
        }
        for own, guess, unknown in zip(true, guessed, batch.columns["num_unknown"].tolist(), strict=True)
    ]
    return document_results(output.values["losses"], batch.target_owners, len(batch.rows), details)


def _sets(
    results: Sequence[DocumentResult], num_labels: int
) -> tuple["NDArray[np.bool_]", "NDArray[np.bool_]", "NDArray[np.int64]"]:
    """True labels (N, L), predicted ones (N, M) and the numbers of unknown ones (N,); a model may have more labels."""
    import numpy as np

    true, guessed = ([cast("list[int]", result.details[key]) for result in results] for key in ("labels", "predicted"))
    size = max([num_labels, *(number + 1 for own in guessed for number in own)])
    truth, predicted = (np.zeros((len(results), width), dtype=bool) for width in (num_labels, size))
    for place, (own, guess) in enumerate(zip(true, guessed, strict=True)):
        truth[place, own] = True
        predicted[place, guess] = True
    return truth, predicted, np.array([result.details["unknown"] for result in results], dtype=np.int64)


def figures(results: Sequence[DocumentResult], store: "TokenStore") -> dict[str, float]:
    """Micro and macro F1, and the share of documents whose set is predicted exactly."""
    from engine.tasks.metrics import set_figures

    return set_figures(*_sets(results, len(store.label_names)))


def report(results: Sequence[DocumentResult], store: "TokenStore") -> dict[str, "str | NDArray[np.uint8]"]:
    """A table by label."""
    from engine.tasks.label_tables import set_table

    truth, predicted, _ = _sets(results, len(store.label_names))
    return {"labels": set_table(truth, predicted, store.label_names)}


def predictions(output: Output, _batch: "Batch", store: "TokenStore") -> list[dict[str, Any]]:
    """The labels of each document whose probability reaches the threshold, and the probability of every label."""
    names = store.label_names
    return [
        {
            "labels": [name for name, value in zip(names, own, strict=True) if value >= THRESHOLD],
            "probabilities": dict(zip(names, own, strict=True)),
        }
        for own in output.values["logits"].float().sigmoid().tolist()
    ]
