"""Classification of whole texts, or of pairs of texts: one label a document."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from engine.errors import DataError
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

    return transformers.AutoModelForSequenceClassification


def _batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, _draw: Draw) -> "Batch":
    """Targets are rows and their labels. Column pair_starts has the first token of a second text, or 0."""
    import torch

    from engine.batches import padded_batch, segments_of

    documents, _, _, _ = segments_of(index, rows)
    labels = store.column("labels")[documents]
    padded = padded_batch(store, index, rows, filler_row, ("pair_starts",))
    return replace(
        padded, target_positions=torch.arange(len(rows)), target_ids=torch.from_numpy(labels.astype("int64"))
    )


def _sample(vocab_size: int, end_id: int) -> "Batch":
    import torch

    from engine.batches import Batch

    ids = (torch.arange(64) % vocab_size).reshape(2, 32)
    ids[:, -1] = end_id
    starts = torch.tensor([0, 16])
    rows = torch.arange(2)
    lengths = torch.tensor([32, 32])
    return Batch(ids, rows, torch.zeros_like(rows), (0, 1), 64, lengths=lengths, columns={"pair_starts": starts})


def classification_logits(model: Any, batch: "Batch") -> "Tensor":
    """Label logits of each row, (B, L).

    Heads that pool the last token get it by the stored length: the stock ones search for it by
    comparing ids with the padding or end token, which is wrong as soon as a text contains one.
    Encoders pool the first token, or a masked mean, and need no help.
    """
    import torch

    assert batch.lengths is not None
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    last = (torch.arange(len(batch.lengths), device=batch.lengths.device), batch.lengths - 1)
    if model.config.is_encoder_decoder:
        ends = batch.input_ids[last]
        if (ends != model.config.eos_token_id).any():
            raise DataError(
                f"documents do not end with the model's end token {model.config.eos_token_id}, which its "
                "classification head needs: use the model's own tokenizer, and drop over-long records"
            )
        # The model shifts its own input right for the decoder, as the stock class does.
        decoder_ids = model._shift_right(batch.input_ids)
        hidden = model.base_model(**inputs, decoder_input_ids=decoder_ids, use_cache=False).last_hidden_state
        return cast("Tensor", model.classification_head(hidden[last]))
    if hasattr(model, "score"):
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        return cast("Tensor", model.score(hidden[last]))
    if (getattr(model.config, "type_vocab_size", None) or 1) > 1:  # BERT kinds tell the texts of a pair apart
        inputs["token_type_ids"] = _token_types(batch)
    return cast("Tensor", model(**inputs).logits)


def _token_types(batch: "Batch") -> "Tensor":
    """(B, T): 1 for the tokens of the second text of a pair, else 0."""
    import torch

    starts = batch.columns["pair_starts"][:, None]
    positions = torch.arange(batch.input_ids.shape[1], device=starts.device)
    return ((starts > 0) & (positions >= starts)).long() * batch.attention_mask


def _loss(model: Any, batch: "Batch", _options: LossOptions) -> Output:
    return label_loss(classification_logits(model, batch)[batch.target_positions], batch.target_ids)


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


TASK = Task(
    name="sequence_classification",
    pipeline="text-classification",
    auto_class=_auto_class,
    packs=False,
    causal=False,
    new_head=True,
    columns={"labels": "holds scores or several labels a text; one label each can be trained yet"},
    batch=_batch,
    sample=_sample,
    loss=_loss,
    results=_results,
    figures=_figures,
    metrics={"accuracy": "max", "macro_f1": "max", "loss": "min"},
    best="accuracy",
    second_texts="pair_starts",
    predictions=_predictions,
    heads=("ForSequenceClassification",),
)
