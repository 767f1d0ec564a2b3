"""Classification of whole texts, or of pairs of texts: one label, several labels or a score for a document.

A target is a document, whatever the kind; the store's columns decide which it is.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from engine.errors import DataError
from engine.tasks import label_sets, scores, single_labels
from engine.tasks.task import Draw, LossOptions, Output, Task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from data_prep.token_store import Rows, TokenStore
    from engine.batches import Batch, Rows64


def _auto_class(_config: Any) -> Any:
    import transformers

    return transformers.AutoModelForSequenceClassification


#: The targets of documents (U): labels (U,), sets of labels (U, L) as ones and zeros, or scores (U,); and columns of
#: the batch that belong to them.
_Learned = tuple["Tensor", dict[str, "Tensor"]]


def _batch(
    learned: Callable[["TokenStore", "NDArray[np.int64]"], _Learned],
    store: "TokenStore",
    index: "Rows",
    rows: "Rows64",
    filler_row: int,
    _draw: Draw,
) -> "Batch":
    """Targets are rows and what is `learned` of them. Column pair_starts has the first token of a second text, or 0."""
    import torch

    from engine.batches import padded_batch, segments_of

    documents, _, _, _ = segments_of(index, rows)
    padded = padded_batch(store, index, rows, filler_row, ("pair_starts",))
    targets, columns = learned(store, documents)
    columns = {**padded.columns, **columns}
    return replace(padded, target_positions=torch.arange(len(rows)), target_ids=targets, columns=columns)


def _labels(store: "TokenStore", documents: "NDArray[np.int64]") -> _Learned:
    import torch

    return torch.from_numpy(store.column("labels")[documents].astype("int64")), {}


def _label_sets(store: "TokenStore", documents: "NDArray[np.int64]") -> _Learned:
    sets = [store.ragged("label_sets", document) for document in documents.tolist()]
    return label_sets.targets_of(sets, len(store.label_names))


def _scores(store: "TokenStore", documents: "NDArray[np.int64]") -> _Learned:
    import torch

    return torch.from_numpy(store.column("scores")[documents].astype("float32")), {}


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


def _target_logits(model: Any, batch: "Batch") -> "Tensor":
    """The logits (U, L) of the batch's targets."""
    return classification_logits(model, batch)[batch.target_positions]


def _label_loss(model: Any, batch: "Batch", options: LossOptions) -> Output:
    return single_labels.loss(_target_logits(model, batch), batch.target_ids, options)


def _set_loss(model: Any, batch: "Batch", _options: LossOptions) -> Output:
    return label_sets.loss(_target_logits(model, batch), batch.target_ids)


def _score_loss(model: Any, batch: "Batch", _options: LossOptions) -> Output:
    return scores.loss(_target_logits(model, batch), batch.target_ids)


def _label_counts(store: "TokenStore") -> "NDArray[np.int64]":
    import numpy as np

    return np.bincount(store.column("labels"), minlength=len(store.label_names))


_ONE_LABEL = Task(
    name="sequence_classification",
    pipeline="text-classification",
    auto_class=_auto_class,
    packs=False,
    causal=False,
    new_head=True,
    columns={"labels": "holds no labels, sets of labels or scores"},
    batch=partial(_batch, _labels),
    sample=_sample,
    loss=_label_loss,
    results=single_labels.results,
    figures=single_labels.figures,
    metrics=single_labels.METRICS,
    best="accuracy",
    report=single_labels.report,
    problem="single_label_classification",
    label_counts=_label_counts,
    out_of_scope=single_labels.with_scope,
    second_texts="pair_starts",
)
_SEVERAL_LABELS = replace(
    _ONE_LABEL,
    columns={"label_sets": "holds no sets of labels"},
    batch=partial(_batch, _label_sets),
    loss=_set_loss,
    results=label_sets.results,
    figures=label_sets.figures,
    metrics=label_sets.METRICS,
    best="micro_f1",
    report=label_sets.report,
    problem="multi_label_classification",
    label_counts=None,
    out_of_scope=None,
)
_SCORES = replace(
    _SEVERAL_LABELS,
    columns={"scores": "holds no scores"},
    batch=partial(_batch, _scores),
    loss=_score_loss,
    results=scores.results,
    figures=scores.figures,
    metrics=scores.METRICS,
    best="pearson",
    report=None,
    problem="regression",
)
TASK = replace(_ONE_LABEL, kinds={"labels": _ONE_LABEL, "label_sets": _SEVERAL_LABELS, "scores": _SCORES})
