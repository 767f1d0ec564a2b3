"""Stock models on flat and padded batches: their inputs, and the logits of whole documents.

Heads of whole documents pool: the first token, the mean, or the last token. On a flat batch all documents are one
sequence, so the hidden states are pooled by document borders before the stock head sees them. It then gets each
document as a sequence of one token, (D, 1, H), of which the first token, and the mean, is the pooled state.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from engine.batches import Batch
from engine.errors import DataError


def model_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """The keyword arguments with which a stock model runs on `batch`, flat or padded.

    A column pair_starts of the batch, with the first token of each document's second text or 0, becomes the types
    of the tokens where the model has such. A model that keeps keys and values for text to come is told not to.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if batch.lengths is not None:
        inputs["attention_mask"] = batch.attention_mask
    else:
        ends, longest = batch.document_ends, batch.longest_document_tokens
        inputs["position_ids"] = _position_ids(model, batch)
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    if "pair_starts" in batch.columns and (getattr(model.config, "type_vocab_size", None) or 1) > 1:
        inputs["token_type_ids"] = _token_types(batch)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def document_logits(model: Any, batch: Batch) -> Tensor:
    """The logits of each document, (D, L), by the model's own head for sequences.

    Heads that pool the last token get it by the stored length: the stock ones search for it by
    comparing ids with the padding or end token, which is wrong as soon as a text contains one.
    Encoders pool the first token, or a masked mean.
    """
    inputs = model_inputs(model, batch)
    if model.config.is_encoder_decoder:
        return _decoded_logits(model, batch, inputs)
    if hasattr(model, "score"):
        hidden = model.base_model(**inputs).last_hidden_state
        return cast(Tensor, model.score(hidden.flatten(0, 1)[batch.last_tokens]))
    if batch.lengths is not None:
        return cast(Tensor, model(**inputs).logits)
    with _pooled(model, batch):
        return cast(Tensor, model(**inputs).logits)


def _decoded_logits(model: Any, batch: Batch, inputs: dict[str, Any]) -> Tensor:
    ends = batch.input_ids.flatten()[batch.last_tokens]
    if (ends != model.config.eos_token_id).any():
        raise DataError(
            f"documents do not end with the model's end token {model.config.eos_token_id}, which its "
            "classification head needs: use the model's own tokenizer, and drop over-long records"
        )
    # The model shifts its own input right for the decoder, as the stock class does.
    decoder_ids = model._shift_right(batch.input_ids)
    inputs |= {"decoder_input_ids": decoder_ids, "use_cache": False}
    hidden = model.base_model(**inputs).last_hidden_state
    return cast(Tensor, model.classification_head(hidden.flatten(0, 1)[batch.last_tokens]))


def _position_ids(model: Any, batch: Batch) -> Tensor:
    """(1, T): positions in each document. RoBERTa kinds count real tokens, from the row after padding's."""
    assert batch.position_ids is not None
    embeddings = getattr(model.base_model, "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    if padding is None:
        return batch.position_ids
    real = (batch.input_ids[0] != padding).long()
    counts = real.cumsum(0)
    before = (counts - real)[batch.first_tokens]
    positions: Tensor = (counts - before[batch.token_owners]) * real + padding
    return positions[None]


def _token_types(batch: Batch) -> Tensor:
    """As input_ids: 1 for the tokens of the second text of a pair, else 0."""
    starts = batch.columns["pair_starts"]
    if batch.lengths is None:
        assert batch.position_ids is not None
        own = starts[batch.token_owners][None]
        return ((own > 0) & (batch.position_ids >= own)).long()
    positions = torch.arange(batch.input_ids.shape[1], device=starts.device)
    return ((starts[:, None] > 0) & (positions >= starts[:, None])).long() * batch.attention_mask


@contextmanager
def _pooled(model: Any, batch: Batch) -> Iterator[None]:
    """Meanwhile, the model's head sees the pooled states of documents, (D, 1, H), in place of (1, T, H)."""
    is_mean = getattr(model.config, "classifier_pooling", None) == "mean"

    def pool(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        pooled = _means(hidden[0], batch) if is_mean else hidden[0, batch.first_tokens]
        pooled = pooled[:, None]
        if isinstance(output, Tensor):
            return pooled
        if isinstance(output, tuple):
            return (pooled, *output[1:])
        output.last_hidden_state = pooled
        return output

    handle = _body(model).register_forward_hook(pool)
    try:
        yield
    finally:
        handle.remove()


def _body(model: Any) -> nn.Module:
    """The module whose output a head pools: the one before a pooler inside the base model, else the base model."""
    base = cast(nn.Module, model.base_model)
    before = base
    for name, child in base.named_children():
        if "pooler" in name:
            return before
        before = child
    return base


def _means(hidden: Tensor, batch: Batch) -> Tensor:
    """(D, H) of (T, H): the mean over each document's tokens, added up in fp32."""
    means = torch.segment_reduce(hidden.float(), "mean", lengths=batch.document_lengths, axis=0)
    return means.to(hidden.dtype)
