"""Masked language modelling: the masked words of a text are predicted from the words on both sides."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from engine.errors import DataError
from engine.tasks.masking import chosen_tokens, masked_ids
from engine.tasks.task import DocumentResult, Draw, LossOptions, Output, Task, document_results, mean_loss, target_loss

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from data_prep.token_store import Rows, TokenStore
    from engine.batches import Batch, Rows64


def _auto_class(config: Any) -> Any:
    import transformers

    if config.is_encoder_decoder:
        raise DataError(f"model type {config.model_type} has a decoder: masks are for encoders such as BERT")
    return transformers.AutoModelForMaskedLM


class _Draws(NamedTuple):
    """The draw for the documents of some rows: D documents, N tokens of all of them."""

    documents: "Rows64"  # (D,)
    lengths: "Rows64"  # (D,)
    may_be_masked: "NDArray[np.bool_]"  # (N,)
    chosen: "NDArray[np.bool_]"  # (N,)


def _drawn(store: "TokenStore", index: "Rows", rows: "Rows64", draw: Draw) -> _Draws:
    import numpy as np

    from engine.batches import segments_of

    documents, starts, lengths, _ = segments_of(index, rows)
    begins, _ = store.borders(documents)
    stops = np.cumsum(lengths)
    places = np.repeat(begins + starts - (stops - lengths), lengths) + np.arange(int(lengths.sum()))
    pieces = store.values("word_pieces").take(places)
    return _Draws(documents, lengths, pieces > 0, chosen_tokens(pieces, documents, lengths, draw))


def _count_targets(store: "TokenStore", index: "Rows", rows: "Rows64", draw: Draw) -> int:
    """The masked tokens of `rows`, counted from the draw: the same on every rank, which therefore need not meet."""
    return int(_drawn(store, index, rows, draw).chosen.sum())


def _flat_batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, draw: Draw) -> "Batch":
    """Targets are the tokens of masked words, and their true ids."""
    from engine.batches import flat_batch

    return _masked(flat_batch(store, index, rows, filler_row), store, index, rows, draw)


def _padded_batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, draw: Draw) -> "Batch":
    from engine.batches import padded_batch

    return _masked(padded_batch(store, index, rows, filler_row), store, index, rows, draw)


def _masked(batch: "Batch", store: "TokenStore", index: "Rows", rows: "Rows64", draw: Draw) -> "Batch":
    """`batch`, whose targets are all tokens that may be masked, with those as targets that are, and masks in it."""
    import torch

    if len(rows) == 0:
        return batch
    drawn = _drawn(store, index, rows, draw)
    masked = batch.with_targets(torch.from_numpy(drawn.chosen[drawn.may_be_masked]))
    shown = masked_ids(store, masked.target_ids.numpy(), drawn.chosen, drawn.documents, drawn.lengths, draw)
    input_ids = batch.input_ids.clone()
    input_ids.view(-1)[masked.target_positions] = torch.from_numpy(shown)
    return replace(masked, input_ids=input_ids)


def _flat_sample(vocab_size: int, end_id: int) -> "Batch":
    from engine.batches import sample_batch

    return sample_batch(vocab_size, end_id, is_padded=False)


def _padded_sample(vocab_size: int, end_id: int) -> "Batch":
    from engine.batches import sample_batch

    return sample_batch(vocab_size, end_id, is_padded=True)


def masked_logits(model: Any, batch: "Batch") -> "Tensor":
    """Logits at the batch's targets, (U, V).

    The output layer sees the targets alone: it is most of the work where few tokens are masked. Families write the
    layers before it in many ways, but each as a function of the body's last hidden states, so these are exchanged
    for the ones at the targets, (1, U, H), as they leave the body.
    """
    from engine.tasks.forward import model_inputs

    positions = batch.target_positions

    def at_targets(_module: Any, _inputs: Any, output: Any) -> Any:
        if getattr(output, "last_hidden_state", None) is not None:
            output["last_hidden_state"] = output.last_hidden_state.flatten(0, 1)[positions][None]
        return output

    inputs = model_inputs(model, batch)
    if model.base_model is model:
        logits = model(**inputs).logits
    else:
        handle = model.base_model.register_forward_hook(at_targets)
        try:
            logits = model(**inputs).logits
        finally:
            handle.remove()
    if logits.shape[:2] == (1, len(positions)):
        return cast("Tensor", logits.squeeze(0))
    return cast("Tensor", logits.flatten(0, 1)[positions])  # this family's head does not begin at the body's end


def _loss(model: Any, batch: "Batch", _options: LossOptions) -> Output:
    return target_loss(masked_logits(model, batch), batch.target_ids)


def _results(output: Output, batch: "Batch") -> list[DocumentResult]:
    return document_results(output.values["losses"], batch.target_owners, len(batch.rows))


def _figures(results: Sequence[DocumentResult], _store: "TokenStore") -> dict[str, float]:
    return {"perplexity": math.exp(min(mean_loss(results), 700.0))}


_FLAT = Task(
    name="masked_lm",
    pipeline="fill-mask",
    auto_class=_auto_class,
    packs=True,
    causal=False,
    new_head=True,
    columns={"word_pieces": "does not say where words begin"},
    batch=_flat_batch,
    count_targets=_count_targets,
    sample=_flat_sample,
    loss=_loss,
    results=_results,
    figures=_figures,
    metrics={"loss": "min"},
    best="loss",
    heads=("ForMaskedLM",),
)
TASK = replace(_FLAT, padded=replace(_FLAT, packs=False, batch=_padded_batch, sample=_padded_sample))
