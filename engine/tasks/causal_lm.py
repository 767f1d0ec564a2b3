"""Language modelling: every marked token is predicted from the tokens of its document before it."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from engine.tasks.auxiliary import auxiliary_sums, balancing_of
from engine.tasks.task import DocumentResult, Draw, LossOptions, Output, Task, document_results, mean_loss, target_loss

if TYPE_CHECKING:
    from torch import Tensor

    from data_prep.token_store import Rows, TokenStore
    from engine.batches import Batch, Rows64


def _auto_class(config: Any) -> Any:
    """The class for text, or for text and images where the weights are of such a model or the family has no other."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    multimodal = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if multimodal is not None and (own is None or multimodal in (config.architectures or ())):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def _batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, _draw: Draw) -> "Batch":
    """Documents of all rows, one after the other. Targets are positions whose next token is marked."""
    from engine.batches import flat_batch

    return _next_tokens(flat_batch(store, index, rows, filler_row))


def _padded_batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, _draw: Draw) -> "Batch":
    from engine.batches import padded_batch

    return _next_tokens(padded_batch(store, index, rows, filler_row))


def _next_tokens(batch: "Batch") -> "Batch":
    """The same batch with the positions before its targets: nothing precedes the first token, which is no target."""
    follows = batch.target_positions != batch.first_tokens[batch.target_owners]
    batch = batch.with_targets(follows)
    return replace(batch, target_positions=batch.target_positions - 1)


def _sample(vocab_size: int, end_id: int) -> "Batch":
    from engine.batches import sample_batch

    return _next_tokens(sample_batch(vocab_size, end_id, is_padded=False))


def _padded_sample(vocab_size: int, end_id: int) -> "Batch":
    from engine.batches import sample_batch

    return _next_tokens(sample_batch(vocab_size, end_id, is_padded=True))


def causal_logits(model: Any, batch: "Batch") -> "Tensor":
    """Next-token logits at the batch's target positions, (U, V)."""
    return _packed_forward(model, batch)[0]


def _packed_forward(model: Any, batch: "Batch") -> tuple["Tensor", Any]:
    """The logits at the targets, (U, V), and all that the model returns: the output layer sees the targets alone."""
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        cu_seq_lens_q=batch.document_ends,
        cu_seq_lens_k=batch.document_ends,
        max_length_q=batch.longest_document_tokens,
        max_length_k=batch.longest_document_tokens,
        logits_to_keep=batch.target_positions,
        use_cache=False,
        **_router_options(model),
    )
    return cast("Tensor", output.logits).squeeze(0), output


def _router_options(model: Any) -> dict[str, bool]:
    return {} if balancing_of(model) is None else {"output_router_logits": True}


def _padded_forward(model: Any, batch: "Batch") -> tuple["Tensor", Any]:
    """As `_packed_forward`, of a padded batch by the model's own attention.

    The output layer sees the columns that hold a target, where the family can choose them.
    """
    import torch

    known = inspect.signature(model.forward).parameters
    width = batch.input_ids.shape[1]
    columns, places = torch.unique(batch.target_positions % width, return_inverse=True)
    options: dict[str, Any] = {"use_cache": False, "logits_to_keep": columns}
    taken = {name: value for name, value in options.items() if name in known}
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    output = model(**inputs, **taken, **_router_options(model))
    places = places if "logits_to_keep" in taken else batch.target_positions % width
    return cast("Tensor", output.logits)[batch.target_positions // width, places], output


def _loss(model: Any, batch: "Batch", _options: LossOptions) -> Output:
    logits, output = (_packed_forward if batch.lengths is None else _padded_forward)(model, batch)
    return target_loss(logits, batch.target_ids)._replace(auxiliary=auxiliary_sums(model, output, logits, batch))


def _results(output: Output, batch: "Batch") -> list[DocumentResult]:
    return document_results(output.values["losses"], batch.target_owners, len(batch.document_lengths))


def _figures(results: Sequence[DocumentResult], _store: "TokenStore") -> dict[str, float]:
    return {"perplexity": math.exp(min(mean_loss(results), 700.0))}


_PACKED = Task(
    name="causal_lm",
    pipeline="text-generation",
    auto_class=_auto_class,
    packs=True,
    causal=True,
    new_head=False,
    columns={},
    batch=_batch,
    sample=_sample,
    loss=_loss,
    results=_results,
    figures=_figures,
    metrics={"loss": "min"},
    best="loss",
    heads=("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"),
)
#: Where packing is impossible, a row of one document is padded, and the model's own attention computes it.
_PADDED = replace(_PACKED, packs=False, batch=_padded_batch, sample=_padded_sample)
TASK = replace(_PACKED, padded=_PADDED)
