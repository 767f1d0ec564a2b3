"""Classification of whole texts, or of pairs of texts: one label, several labels or a score for a document.

A target is a document, whatever the kind; the store's columns decide which it is.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

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
    is_padded: bool,
    store: "TokenStore",
    index: "Rows",
    rows: "Rows64",
    filler_row: int,
    _draw: Draw,
) -> "Batch":
    """Targets are documents and what is `learned` of them."""
    from engine.batches import flat_batch, padded_batch, segments_of

    make = padded_batch if is_padded else flat_batch
    documents, _, _, _ = segments_of(index, rows)
    return _with_targets(make(store, index, rows, filler_row, ("pair_starts",)), *learned(store, documents))


def _sample(learned: Callable[[], "Tensor"], is_padded: bool, vocab_size: int, end_id: int) -> "Batch":
    from engine.batches import sample_batch

    batch = sample_batch(vocab_size, end_id, is_padded=is_padded, columns={"pair_starts": (0, 7, 30)})
    return _with_targets(batch, learned(), {})


def _with_targets(batch: "Batch", target_ids: "Tensor", columns: dict[str, "Tensor"]) -> "Batch":
    """The same batch with its documents as targets."""
    import torch

    documents = torch.arange(len(target_ids))
    return replace(
        batch,
        target_positions=documents,
        target_owners=documents,
        target_ids=target_ids,
        columns={**batch.columns, **columns},
    )


def _labels(store: "TokenStore", documents: "NDArray[np.int64]") -> _Learned:
    import torch

    return torch.from_numpy(store.column("labels")[documents].astype("int64")), {}


def _label_sets(store: "TokenStore", documents: "NDArray[np.int64]") -> _Learned:
    sets = [store.ragged("label_sets", document) for document in documents.tolist()]
    return label_sets.targets_of(sets, len(store.label_names))


def _scores(store: "TokenStore", documents: "NDArray[np.int64]") -> _Learned:
    import torch

    return torch.from_numpy(store.column("scores")[documents].astype("float32")), {}


def _sample_labels() -> "Tensor":
    import torch

    return torch.zeros(3, dtype=torch.int64)


def _sample_sets() -> "Tensor":
    import torch

    return torch.zeros(3, 1)  # for any number of labels


def _sample_scores() -> "Tensor":
    import torch

    return torch.zeros(3)


def _target_logits(model: Any, batch: "Batch") -> "Tensor":
    """The logits (U, L) of the batch's targets."""
    from engine.tasks.forward import document_logits

    return document_logits(model, batch)[batch.target_positions]


def _label_loss(model: Any, batch: "Batch", options: LossOptions) -> Output:
    return single_labels.loss(_target_logits(model, batch), batch.target_ids, options)


def _set_loss(model: Any, batch: "Batch", _options: LossOptions) -> Output:
    return label_sets.loss(_target_logits(model, batch), batch.target_ids)


def _score_loss(model: Any, batch: "Batch", _options: LossOptions) -> Output:
    return scores.loss(_target_logits(model, batch), batch.target_ids)


def _label_counts(store: "TokenStore") -> "NDArray[np.int64]":
    import numpy as np

    return np.bincount(store.column("labels"), minlength=len(store.label_names))


def _both_forms(
    task: Task,
    learned: Callable[["TokenStore", "NDArray[np.int64]"], _Learned],
    sample: Callable[[], "Tensor"],
) -> Task:
    """`task` on flat batches, and on padded ones."""
    flat, padded = (
        replace(
            task, packs=packs, batch=partial(_batch, learned, not packs), sample=partial(_sample, sample, not packs)
        )
        for packs in (True, False)
    )
    return replace(flat, padded=padded)


_LABELS = Task(
    name="sequence_classification",
    pipeline="text-classification",
    auto_class=_auto_class,
    packs=True,
    causal=False,
    new_head=True,
    columns={"labels": "holds no labels, sets of labels or scores"},
    batch=partial(_batch, _labels, False),
    sample=partial(_sample, _sample_labels, False),
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
    predictions=single_labels.predictions,
    heads=("ForSequenceClassification",),
)
_SETS = replace(
    _LABELS,
    columns={"label_sets": "holds no sets of labels"},
    loss=_set_loss,
    results=label_sets.results,
    figures=label_sets.figures,
    metrics=label_sets.METRICS,
    best="micro_f1",
    report=label_sets.report,
    problem="multi_label_classification",
    label_counts=None,
    out_of_scope=None,
    predictions=label_sets.predictions,
)
_SCORES = replace(
    _SETS,
    columns={"scores": "holds no scores"},
    loss=_score_loss,
    results=scores.results,
    figures=scores.figures,
    metrics=scores.METRICS,
    best="pearson",
    report=None,
    problem="regression",
    predictions=scores.predictions,
)
_KINDS = {
    "labels": _both_forms(_LABELS, _labels, _sample_labels),
    "label_sets": _both_forms(_SETS, _label_sets, _sample_sets),
    "scores": _both_forms(_SCORES, _scores, _sample_scores),
}
TASK = replace(_KINDS["labels"], kinds=_KINDS)
