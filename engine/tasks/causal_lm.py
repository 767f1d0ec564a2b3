"""Language modelling: every marked token is predicted from the tokens of its document before it."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from engine.tasks.task import DocumentResult, Output, Task, document_results, mean_loss, target_loss

if TYPE_CHECKING:
    from torch import Tensor

    from data_prep.token_store import Rows, TokenStore
    from engine.batches import Batch, Rows64


def _auto_class() -> Any:
    import transformers

    return transformers.AutoModelForCausalLM


def _batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int) -> "Batch":
    from engine.batches import packed_batch

    return packed_batch(store, index, rows, filler_row)


def causal_logits(model: Any, batch: "Batch") -> "Tensor":
    """Next-token logits at the batch's target positions, (U, V): the output layer sees only those."""
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        cu_seq_lens_q=batch.document_ends,
        cu_seq_lens_k=batch.document_ends,
        max_length_q=batch.longest_document_tokens,
        max_length_k=batch.longest_document_tokens,
        logits_to_keep=batch.target_positions,
        use_cache=False,
    )
    return cast("Tensor", output.logits).squeeze(0)


def _loss(model: Any, batch: "Batch") -> Output:
    return target_loss(causal_logits(model, batch), batch.target_ids)


def _results(output: Output, batch: "Batch") -> list[DocumentResult]:
    import torch

    assert batch.document_ends is not None
    ends = batch.document_ends[1:].long()
    owners = torch.searchsorted(ends, batch.target_positions, right=True)
    return document_results(output.values["losses"], owners, len(ends))


def _figures(results: Sequence[DocumentResult], _names: Sequence[str]) -> dict[str, float]:
    return {"perplexity": math.exp(min(mean_loss(results), 700.0))}


TASK = Task(
    name="causal_lm",
    pipeline="text-generation",
    auto_class=_auto_class,
    packs=True,
    new_head=False,
    columns={},
    batch=_batch,
    loss=_loss,
    results=_results,
    figures=_figures,
    metrics={"loss": "min"},
    best="loss",
)
