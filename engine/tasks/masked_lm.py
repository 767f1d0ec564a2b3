"""Masked language modelling: the masked words of a text are predicted from the words on both sides."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from engine.errors import DataError
from engine.tasks.masking import chosen_tokens, masked_ids
from engine.tasks.task import DocumentResult, Draw, LossOptions, Output, Task, document_results, mean_loss, target_loss

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from data_prep.token_store import Rows, TokenStore
    from engine.batches import Batch, Rows64


def _auto_class(config: Any) -> Any:
    import transformers

    if config.is_encoder_decoder:
        raise DataError(f"model type {config.model_type} has a decoder: masks are for encoders such as BERT")
    return transformers.AutoModelForMaskedLM


def _chosen(
    store: "TokenStore", index: "Rows", rows: "Rows64", draw: Draw
) -> tuple["np.ndarray", tuple["Rows64", "Rows64", "Rows64"]]:
    """bool [N]: which tokens of `rows` are masked; documents, starts and lengths of the rows, a document each."""
    import numpy as np

    from engine.batches import segments_of

    documents, starts, lengths, _ = segments_of(index, rows)
    begins, _ = store.borders(documents)
    stops = np.cumsum(lengths)
    places = np.repeat(begins + starts - (stops - lengths), lengths) + np.arange(int(lengths.sum()))
    pieces = store.values("word_pieces").take(places)
    return chosen_tokens(pieces, documents, lengths, draw), (documents, starts, lengths)


def _count_targets(store: "TokenStore", index: "Rows", rows: "Rows64", draw: Draw) -> int:
    """The masked tokens of `rows`, counted from the draw: the same on every rank, which therefore need not meet."""
    import numpy as np

    return int(np.count_nonzero(_chosen(store, index, rows, draw)[0]))


def _batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, draw: Draw) -> "Batch":
    """Targets are the tokens of masked words, at their positions in the flattened (B, T), and their true ids."""
    import numpy as np
    import torch

    from engine.batches import pad, padded_batch

    padded = padded_batch(store, index, rows, filler_row)
    if len(rows) == 0:
        return padded
    chosen, (documents, starts, lengths) = _chosen(store, index, rows, draw)
    ids, _ = store.gather(documents, starts, lengths)
    shown = pad(masked_ids(store, ids, chosen, documents, lengths, draw), lengths, store.pad_id)
    targets = np.flatnonzero(pad(chosen, lengths, 0))
    return replace(
        padded,
        input_ids=torch.from_numpy(shown),
        target_positions=torch.from_numpy(targets),
        target_ids=torch.from_numpy(ids[chosen]),
    )


def _sample(vocab_size: int, _end_id: int) -> "Batch":
    import torch

    from engine.batches import Batch

    ids = (torch.arange(64) % vocab_size).reshape(2, 32)
    targets = torch.arange(3, 64, 7)
    return Batch(ids, targets, ids.flatten()[targets], (0, 1), 64, lengths=torch.tensor([32, 32]))


def masked_logits(model: Any, batch: "Batch") -> "Tensor":
    """Logits at the batch's targets, (U, V).

    The output layer sees the targets alone: it is most of the work where few tokens are masked. Families write the
    layers before it in many ways, but each as a function of the body's last hidden states, so these are exchanged
    for the ones at the targets, (1, U, H), as they leave the body.
    """
    positions = batch.target_positions

    def at_targets(_module: Any, _inputs: Any, output: Any) -> Any:
        if getattr(output, "last_hidden_state", None) is not None:
            output["last_hidden_state"] = output.last_hidden_state.flatten(0, 1)[positions][None]
        return output

    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if model.base_model is model:
        logits = model(**inputs).logits
    else:
        handle = model.base_model.register_forward_hook(at_targets)
        try:
            logits = model(**inputs).logits
        finally:
            handle.remove()
    if logits.shape[:2] == batch.input_ids.shape:  # a head of this family does not begin at the body's end
        return cast("Tensor", logits.flatten(0, 1)[positions])
    return cast("Tensor", logits.squeeze(0))


def _loss(model: Any, batch: "Batch", _options: LossOptions) -> Output:
    return target_loss(masked_logits(model, batch), batch.target_ids)


def _results(output: Output, batch: "Batch") -> list[DocumentResult]:
    owners = batch.target_positions // batch.input_ids.shape[1]
    return document_results(output.values["losses"], owners, len(batch.rows))


def _figures(results: Sequence[DocumentResult], _store: "TokenStore") -> dict[str, float]:
    return {"perplexity": math.exp(min(mean_loss(results), 700.0))}


TASK = Task(
    name="masked_lm",
    pipeline="fill-mask",
    auto_class=_auto_class,
    packs=False,
    causal=False,
    new_head=True,
    columns={"word_pieces": "does not say where words begin"},
    batch=_batch,
    count_targets=_count_targets,
    sample=_sample,
    loss=_loss,
    results=_results,
    figures=_figures,
    metrics={"loss": "min"},
    best="loss",
)
