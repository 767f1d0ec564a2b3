"""Tagging: one label for each marked token (the first of each word)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

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
    from torch import Tensor

    from data_prep.token_store import Rows, TokenStore
    from engine.batches import Batch, Rows64


def _auto_class(_config: Any) -> Any:
    import transformers

    return transformers.AutoModelForTokenClassification


def _flat_batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, _draw: Draw) -> "Batch":
    """Targets are the marked tokens and their tags."""
    from engine.batches import flat_batch

    return flat_batch(store, index, rows, filler_row, target_column="tags")


def _padded_batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, _draw: Draw) -> "Batch":
    from engine.batches import padded_batch

    return padded_batch(store, index, rows, filler_row, target_column="tags")


def _flat_sample(vocab_size: int, end_id: int) -> "Batch":
    from engine.batches import sample_batch

    return sample_batch(vocab_size, end_id, is_padded=False)


def _padded_sample(vocab_size: int, end_id: int) -> "Batch":
    from engine.batches import sample_batch

    return sample_batch(vocab_size, end_id, is_padded=True)


def tag_logits(model: Any, batch: "Batch") -> "Tensor":
    """Tag logits of the batch's targets, (U, L)."""
    from engine.tasks.forward import model_inputs

    return cast("Tensor", model(**model_inputs(model, batch)).logits).flatten(0, 1)[batch.target_positions]


def _loss(model: Any, batch: "Batch", _options: LossOptions) -> Output:
    return label_loss(tag_logits(model, batch), batch.target_ids)


def _results(output: Output, batch: "Batch") -> list[DocumentResult]:
    """With the true and the predicted tags of each document, in the order of its words."""
    owners = batch.target_owners
    details: list[dict[str, list[int]]] = [{"tags": [], "predicted": []} for _ in batch.rows]
    chosen = (owners.tolist(), batch.target_ids.tolist(), output.values["predicted"].tolist())
    for owner, tag, predicted in zip(*chosen, strict=True):
        details[owner]["tags"].append(tag)
        details[owner]["predicted"].append(predicted)
    known = batch.target_ids != UNKNOWN_LABEL  # the others have no loss
    return document_results(output.values["losses"][known], owners[known], len(batch.rows), details)


def _figures(results: Sequence[DocumentResult], store: "TokenStore") -> dict[str, float]:
    import numpy as np

    from engine.tasks.metrics import label_figures

    truth, predicted = (
        np.concatenate([np.array(result.details[key], dtype=np.int64) for result in results])
        for key in ("tags", "predicted")
    )
    return label_figures(truth, predicted, len(store.label_names))


def _predictions(output: Output, batch: "Batch", store: "TokenStore") -> list[dict[str, Any]]:
    """The likeliest tag of each word of each document."""
    tags: list[list[str]] = [[] for _ in batch.rows]
    for owner, predicted in zip(batch.target_owners.tolist(), output.values["predicted"].tolist(), strict=True):
        tags[owner].append(store.label_names[predicted])
    return [{"tags": own} for own in tags]


_FLAT = Task(
    name="token_classification",
    pipeline="token-classification",
    auto_class=_auto_class,
    packs=True,
    causal=False,
    new_head=True,
    columns={"tags": "holds no tags"},
    batch=_flat_batch,
    sample=_flat_sample,
    loss=_loss,
    results=_results,
    figures=_figures,
    metrics={"macro_f1": "max", "accuracy": "max", "loss": "min"},
    best="macro_f1",
    predictions=_predictions,
)
TASK = replace(_FLAT, padded=replace(_FLAT, packs=False, batch=_padded_batch, sample=_padded_sample))
