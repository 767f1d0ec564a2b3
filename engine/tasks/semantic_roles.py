"""Semantic roles: a role for each word of a sentence and one predicate; the figures are those of the arguments.

An argument is found if its words and its role are right. The verb itself (V, and C-V for its second part) is left out,
as the official scorers of CoNLL-2005 and CoNLL-2012 do. Roles that stand on one word each, as the Universal PropBanks
mark the head of an argument, are arguments of one word; of B- and I- tags the arguments are the spans that conlleval
finds. The continuation of an argument (C-ARG1) is an argument of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.tasks.entities import OUTSIDE, Entity, Tag, kinds_table, lenient_entities, scheme_of, score_of
from engine.tasks.task import DocumentResult, Draw, LossOptions, Output, Task, label_loss
from engine.tasks.token_classification import TASK as TAGGING
from engine.tasks.token_classification import (
    TagPair,
    entities_of,
    sentences_of,
    tag_batch,
    tag_logits,
    token_values,
    word_figures,
)

if TYPE_CHECKING:
    from torch import Tensor

    from data_prep.token_store import Rows, TokenStore
    from engine.batches import Batch, Rows64

_TYPES = "predicate_types"
_VERB = ("V", "C-V")


def _role_batch(make: Any, store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int) -> "Batch":
    """As for tags, with the token types of the predicate, in the form of the input ids."""
    import torch

    from engine.batches import pad, row_lengths

    batch = tag_batch(make, store, index, rows, filler_row)
    if len(rows) == 0:
        return batch
    types = token_values(store, index, rows, _TYPES).astype("int64")
    shaped = types[None] if batch.lengths is None else pad(types, row_lengths(index, rows), 0)
    return replace(batch, columns={**batch.columns, _TYPES: torch.from_numpy(shaped)})


def _flat_batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, _draw: Draw) -> "Batch":
    from engine.batches import flat_batch

    return _role_batch(flat_batch, store, index, rows, filler_row)


def _padded_batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, _draw: Draw) -> "Batch":
    from engine.batches import padded_batch

    return _role_batch(padded_batch, store, index, rows, filler_row)


def _loss(model: Any, batch: "Batch", options: LossOptions) -> Output:
    return label_loss(tag_logits(model, batch, **_types_of(model, batch)), batch.target_ids, options)


def _types_of(model: Any, batch: "Batch") -> "dict[str, Tensor]":
    """The token types, for models that have them."""
    has_types = (getattr(model.config, "type_vocab_size", None) or 1) > 1
    return {"token_type_ids": batch.columns[_TYPES]} if has_types and _TYPES in batch.columns else {}


def _arguments(sentence: int, tags: Sequence[Tag]) -> Iterator[Entity]:
    """The arguments of roles that stand on one word each."""
    for place, tag in enumerate(tags):
        if tag != OUTSIDE:
            yield Entity(sentence, place, place, tag.kind)


def arguments_of(sentences: Sequence[TagPair], names: Sequence[str]) -> tuple[set[Entity], set[Entity]]:
    """The true and the predicted arguments, the verb left out."""
    if scheme_of(names) is not None:
        both = entities_of(sentences, names, lenient_entities)
    else:
        plain = [name if name == OUTSIDE.prefix else f"I-{name}" for name in names]
        both = entities_of(sentences, plain, _arguments)
    truth, found = ({one for one in side if one.kind not in _VERB} for side in both)
    return truth, found


def _figures(results: Sequence[DocumentResult], store: "TokenStore") -> dict[str, float]:
    sentences = sentences_of(results)
    score = score_of(*arguments_of(sentences, store.label_names))
    figures = {"f1": score.f1, "precision": score.precision, "recall": score.recall, "arguments": float(score.support)}
    return figures | {"accuracy": word_figures(sentences, len(store.label_names))["accuracy"]}


def _report(results: Sequence[DocumentResult], store: "TokenStore") -> dict[str, Any]:
    """A table by role."""
    return {"arguments": kinds_table(*arguments_of(sentences_of(results), store.label_names))}


def _as_roles(tagging: Task) -> Task:
    """The task of tags, flat or padded, as that of roles."""
    return replace(
        tagging,
        name="semantic_roles",
        columns={"tags": "holds no roles", _TYPES: "does not say which words are the predicate"},
        batch=_flat_batch if tagging.packs else _padded_batch,
        loss=_loss,
        figures=_figures,
        report=_report,
        metrics={"f1": "max", "accuracy": "max", "loss": "min"},
        best="f1",
        padded=None if tagging.padded is None else _as_roles(tagging.padded),
    )


TASK = _as_roles(TAGGING)
