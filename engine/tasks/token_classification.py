"""Tagging: one label for each marked token (the first of each word)."""

import inspect
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


def _batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, _draw: Draw) -> "Batch":
    """Targets are the marked tokens, at their positions in the flattened (B, T), and their tags."""
    import numpy as np
    import torch

    from engine.batches import pad, padded_batch, segments_of

    padded = padded_batch(store, index, rows, filler_row)
    if len(rows) == 0:
        return padded
    documents, starts, lengths, _ = segments_of(index, rows)
    pieces = zip(documents.tolist(), starts.tolist(), (starts + lengths).tolist(), strict=True)
    tags = pad(np.concatenate([store.token_column("tags", *piece) for piece in pieces]), lengths, -1)
    return replace(padded, target_ids=torch.from_numpy(tags.reshape(-1))[padded.target_positions])


def _sample(vocab_size: int, _end_id: int) -> "Batch":
    import torch

    from engine.batches import Batch

    ids = (torch.arange(64) % vocab_size).reshape(2, 32)
    targets = torch.arange(64)
    return Batch(ids, targets, torch.zeros_like(targets), (0, 1), 64, lengths=torch.tensor([32, 32]))


def tag_logits(model: Any, batch: "Batch") -> "Tensor":
    """Tag logits of the batch's targets, (U, L)."""
    # Causal families would keep keys and values for text to come, which never comes.
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
    return cast("Tensor", output.logits).flatten(0, 1)[batch.target_positions]


def _loss(model: Any, batch: "Batch", _options: LossOptions) -> Output:
    return label_loss(tag_logits(model, batch), batch.target_ids)


def _results(output: Output, batch: "Batch") -> list[DocumentResult]:
    """With the true and the predicted tags of each document, in the order of its words."""
    owners = batch.target_positions // batch.input_ids.shape[1]
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
    owners = batch.target_positions // batch.input_ids.shape[1]
    tags: list[list[str]] = [[] for _ in batch.rows]
    for owner, predicted in zip(owners.tolist(), output.values["predicted"].tolist(), strict=True):
        tags[owner].append(store.label_names[predicted])
    return [{"tags": own} for own in tags]


TASK = Task(
    name="token_classification",
    pipeline="token-classification",
    auto_class=_auto_class,
    packs=False,
    causal=False,
    new_head=True,
    columns={"tags": "holds no tags"},
    batch=_batch,
    sample=_sample,
    loss=_loss,
    results=_results,
    figures=_figures,
    metrics={"macro_f1": "max", "accuracy": "max", "loss": "min"},
    best="macro_f1",
    predictions=_predictions,
    heads=("ForTokenClassification",),
)
