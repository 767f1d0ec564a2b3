"""Classification of whole texts, or of pairs of texts: one label a document."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.tasks.task import (
    UNKNOWN_LABEL,
    DocumentResult,
    Draw,
    LossOptions,
    Output,
    Task,
    document_results,
    label_loss,
)

if TYPE_CHECKING:
    from data_prep.token_store import Rows, TokenStore
    from engine.batches import Batch, Rows64


#: What a batch has of each document; column pair_starts has the first token of a second text, or 0.
_COLUMNS = ("labels", "pair_starts")
_SAMPLE = {"labels": (0, 0, 0), "pair_starts": (0, 7, 30)}


def _auto_class(_config: Any) -> Any:
    import transformers

    return transformers.AutoModelForSequenceClassification


def _flat_batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, _draw: Draw) -> "Batch":
    from engine.batches import flat_batch

    return _labelled(flat_batch(store, index, rows, filler_row, _COLUMNS))


def _padded_batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, _draw: Draw) -> "Batch":
    from engine.batches import padded_batch

    return _labelled(padded_batch(store, index, rows, filler_row, _COLUMNS))


def _labelled(batch: "Batch") -> "Batch":
    """The same batch with documents as targets, and their labels."""
    import torch

    documents = torch.arange(len(batch.rows))
    labels = batch.columns["labels"][documents]
    return replace(batch, target_positions=documents, target_owners=documents, target_ids=labels)


def _flat_sample(vocab_size: int, end_id: int) -> "Batch":
    from engine.batches import sample_batch

    return _labelled(sample_batch(vocab_size, end_id, is_padded=False, columns=_SAMPLE))


def _padded_sample(vocab_size: int, end_id: int) -> "Batch":
    from engine.batches import sample_batch

    return _labelled(sample_batch(vocab_size, end_id, is_padded=True, columns=_SAMPLE))


def _loss(model: Any, batch: "Batch", _options: LossOptions) -> Output:
    from engine.tasks.forward import document_logits

    return label_loss(document_logits(model, batch)[batch.target_positions], batch.target_ids)


def _results(output: Output, batch: "Batch") -> list[DocumentResult]:
    labels, predicted = batch.target_ids.tolist(), output.values["predicted"].tolist()
    details = [{"label": label, "predicted": guess} for label, guess in zip(labels, predicted, strict=True)]
    known = batch.target_ids != UNKNOWN_LABEL  # the others have no loss
    losses, owners = output.values["losses"][known], batch.target_positions[known]
    return document_results(losses, owners, len(batch.rows), details)


def _figures(results: Sequence[DocumentResult], store: "TokenStore") -> dict[str, float]:
    import numpy as np

    from engine.tasks.metrics import label_figures

    truth, predicted = (
        np.array([result.details[key] for result in results], dtype=np.int64) for key in ("label", "predicted")
    )
    return label_figures(truth, predicted, len(store.label_names))


def _predictions(output: Output, _batch: "Batch", store: "TokenStore") -> list[dict[str, Any]]:
    """The likeliest label of each document, and the probability of every label."""
    names = store.label_names
    return [
        {"label": names[label], "probabilities": dict(zip(names, probabilities, strict=True))}
        for label, probabilities in zip(
            output.values["predicted"].tolist(), output.values["logits"].float().softmax(-1).tolist(), strict=True
        )
    ]


_FLAT = Task(
    name="sequence_classification",
    pipeline="text-classification",
    auto_class=_auto_class,
    packs=True,
    causal=False,
    new_head=True,
    columns={"labels": "holds scores or several labels a text; one label each can be trained yet"},
    batch=_flat_batch,
    sample=_flat_sample,
    loss=_loss,
    results=_results,
    figures=_figures,
    metrics={"accuracy": "max", "macro_f1": "max", "loss": "min"},
    best="accuracy",
    second_texts="pair_starts",
    predictions=_predictions,
    heads=("ForSequenceClassification",),
)
TASK = replace(_FLAT, padded=replace(_FLAT, packs=False, batch=_padded_batch, sample=_padded_sample))
