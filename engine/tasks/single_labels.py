"""Texts with a label each: loss, figures, and the view of them for people."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from engine.tasks.task import UNKNOWN_LABEL, DocumentResult, LossOptions, Output, Task, document_results, label_loss

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from data_prep.token_store import TokenStore
    from engine.batches import Batch

METRICS: Mapping[str, Literal["min", "max"]] = {
    "accuracy": "max",
    "macro_f1": "max",
    "weighted_f1": "max",
    "matthews": "max",
    "out_of_scope_recall": "max",
    "in_scope_accuracy": "max",
    "loss": "min",
}


def loss(logits: "Tensor", labels: "Tensor", options: LossOptions) -> Output:
    """The cross-entropy of logits (U, L) for labels (U,)."""
    return label_loss(logits, labels, options)


def results(output: Output, batch: "Batch") -> list[DocumentResult]:
    """With the true and the predicted label of each document."""
    labels, predicted = batch.target_ids.tolist(), output.values["predicted"].tolist()
    details = [{"label": label, "predicted": guess} for label, guess in zip(labels, predicted, strict=True)]
    known = batch.target_ids != UNKNOWN_LABEL  # the others have no loss
    losses, owners = output.values["losses"][known], batch.target_owners[known]
    return document_results(losses, owners, len(batch.rows), details)


def _labels(results: Sequence[DocumentResult]) -> tuple["NDArray[np.int64]", "NDArray[np.int64]"]:
    """The true and the predicted labels (N,)."""
    import numpy as np

    truth, predicted = (
        np.array([result.details[key] for result in results], dtype=np.int64) for key in ("label", "predicted")
    )
    return truth, predicted


def figures(results: Sequence[DocumentResult], store: "TokenStore") -> dict[str, float]:
    """Accuracy, macro and weighted F1, and Matthews' correlation."""
    from engine.tasks.metrics import label_figures

    return label_figures(*_labels(results), len(store.label_names))


def report(results: Sequence[DocumentResult], store: "TokenStore") -> dict[str, "str | NDArray[np.uint8]"]:
    """A table by label, the labels that are confused most, and the whole confusion as a picture."""
    from engine.tasks.label_tables import confusion_picture, label_table, most_confused
    from engine.tasks.metrics import confusion_of

    confusion = confusion_of(*_labels(results), len(store.label_names))
    return {
        "labels": label_table(confusion, store.label_names),
        "most confused": most_confused(confusion, store.label_names),
        "confusion": confusion_picture(confusion, store.label_names),
    }


def predictions(output: Output, _batch: "Batch", store: "TokenStore") -> list[dict[str, Any]]:
    """The likeliest label of each document, and the probability of every label."""
    names = store.label_names
    labels = output.values["predicted"].tolist()
    probabilities = output.values["logits"].float().softmax(-1).tolist()
    return [
        {"label": names[label], "probabilities": dict(zip(names, own, strict=True))}
        for label, own in zip(labels, probabilities, strict=True)
    ]


def with_scope(task: Task, label: str) -> Task:
    """`task` with figures about the records of `label`, which belong to none of the other labels, if a store has it."""

    def both(results: Sequence[DocumentResult], store: "TokenStore") -> dict[str, float]:
        from engine.tasks.metrics import scope_figures

        names = store.label_names
        found = scope_figures(*_labels(results), names.index(label)) if label in names else {}
        return figures(results, store) | found

    padded = None if task.padded is None else with_scope(task.padded, label)
    return replace(task, figures=both, padded=padded)
