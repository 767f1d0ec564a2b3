"""Semantic roles: a role for each word of a sentence and one predicate; the figures are those of the arguments.

An argument is found if its words and its role are right. The verb itself (V, and C-V for its second part) is left out,
as the official scorers of CoNLL-2005 and CoNLL-2012 do. Roles that stand on one word each, as the Universal PropBanks
mark the head of an argument, are arguments of one word; of B- and I- tags the arguments are the spans that conlleval
finds. The continuation of an argument (C-ARG1) is an argument of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.tasks.entities import OUTSIDE, Entity, Tag, lenient_entities, scheme_of, score_of
from engine.tasks.task import DocumentResult, Draw, LossOptions, Output, label_loss
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


def _batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, draw: Draw) -> "Batch":
    """As for tags, with the token types of the predicate, in the form of the input ids."""
    import torch

    from engine.batches import pad, row_lengths

    batch = tag_batch(store, index, rows, filler_row, draw)
    if len(rows) == 0:
        return batch
    types = pad(token_values(store, index, rows, _TYPES), row_lengths(index, rows), 0)
    return replace(batch, columns={**batch.columns, _TYPES: torch.from_numpy(types)})


def _loss(model: Any, batch: "Batch", _options: LossOptions) -> Output:
    return label_loss(tag_logits(model, batch, **_types_of(model, batch)), batch.target_ids)


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


TASK = replace(
    TAGGING,
    name="semantic_roles",
    columns={"tags": "holds no roles", _TYPES: "does not say which words are the predicate"},
    batch=_batch,
    loss=_loss,
    figures=_figures,
    metrics={"f1": "max", "accuracy": "max", "loss": "min"},
    best="f1",
)
