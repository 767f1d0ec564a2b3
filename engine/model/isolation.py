"""Documents of a flat batch that see each other, and tokens that see those after them: found by running a narrow model.

A family whose documents stay apart computes the same on flat and on padded batches, which is tried too where a task
has both forms of rows of one document: the heads of encoders differ in how they pool.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.batches import Batch
from engine.errors import DataError
from engine.model.attention import PACKED_ATTENTION, CannotPackError, register_packed_attention
from engine.model.narrow import narrow_model
from engine.tasks.task import LossOptions, Task

_NOT_CAUSAL = "tokens see the ones that follow them (not a causal model)"
_SEE_EACH_OTHER = "documents in one row see each other (recurrent, convolution or bypassing layers)"
#: Largest difference between flat and padded batches, of the loss and of its gradient, as a share: rounding in fp32.
_SAME = 1e-4


def check_isolation(config: Any, task: Task) -> None:
    """DataError when documents, or a token of a causal task and those after it, would see each other in this family.

    `config` is the configuration of a model for `task`. The model that is run is narrow and has random
    weights, so that neither the size of the model nor its weights matter; see `engine.model.narrow`.
    """
    register_packed_attention()
    name = config.model_type
    failure: Exception | None = None
    for is_whole in (False, True):
        try:
            model = narrow_model(config, task, attention_of(task), is_whole)
            leak = find_leak(model, task, sample_of(task, model))
        except CannotPackError as error:
            raise DataError(f"model type {name} cannot keep packed documents apart: {error}{instead(task)}") from error
        except Exception as error:
            # Some families have sizes of their own that the narrow form does not fit: then as it is.
            failure = failure or error
            continue
        if leak:
            hint = "" if leak == _NOT_CAUSAL else instead(task)
            rows = "packed rows" if task.packs else "padded rows"
            raise DataError(f"model type {name} cannot be trained on {rows}: {leak}{hint}")
        return
    reason = " ".join(str(failure).split())
    fault = "keep packed documents apart" if task.packs else "be run"
    raise DataError(f"model type {name} cannot {fault}: {reason}{instead(task)}") from failure


def attention_of(task: Task) -> dict[str, str]:
    """Options for transformers: the attention a model is made with; the family's own where batches are padded."""
    return {"attn_implementation": PACKED_ATTENTION} if task.packs else {}


def fit_to_rows(config: Any, flat: Task, padded: Task) -> Task:
    """The form of a task that the family can train, `flat` if it can. DataError as `check_isolation` for neither."""
    try:
        check_isolation(config, flat)
        reason = "" if flat.causal else _difference(config, flat, padded)
    except DataError as error:
        reason = str(error).removesuffix(instead(flat))
    if not reason:
        return flat
    if padded.causal:
        check_isolation(config, padded)
    return replace(padded, why_padded=reason)


def find_leak(model: Any, task: Task, batch: Batch) -> str | None:
    """Run the model to see whether anything reaches a token that must not. Returns what leaks, or None.

    `batch` has several documents. The gradient of the loss at the targets of one in the middle (the first half
    of them, of a causal task) with respect to the embeddings of the others, and of the tokens that come after those
    targets, is exactly zero, in every precision, if and only if no path leads there.
    """
    middle = len(batch.document_lengths) // 2
    begin, length = int(batch.first_tokens[middle]), int(batch.document_lengths[middle])
    half, end = begin + length // 2, begin + length
    chosen = batch.target_owners == middle
    if task.causal:
        chosen &= batch.target_positions < half
    gradient = _embedding_gradient(model, task, batch.with_targets(chosen)).flatten(0, -2)
    if gradient[:begin].any() or gradient[end:].any():
        return _SEE_EACH_OTHER
    if task.causal and gradient[half:end].any():
        return _NOT_CAUSAL
    return None


def _embedding_gradient(model: Any, task: Task, batch: Batch) -> Tensor:
    """The gradient of the batch's loss with respect to the embedded tokens, (..., H)."""
    leaves: list[Tensor] = []

    def cut(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    was_training = model.training
    model.eval()
    handle = model.get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            value = task.loss(model, batch, LossOptions()).loss_sum
            (gradient,) = torch.autograd.grad(value, leaves[0])
    finally:
        handle.remove()
        model.train(was_training)
    return gradient


def _difference(config: Any, flat: Task, padded: Task) -> str:
    """The reason why flat batches cannot stand for padded ones of the same documents; empty if they can."""
    failures: list[Exception] = []
    for is_whole in (False, True):
        try:
            (loss, gradient), (other_loss, other_gradient) = (
                _loss_and_gradient(config, task, is_whole) for task in (flat, padded)
            )
        except Exception as error:
            failures.append(error)
            continue
        is_same_gradient = float((gradient - other_gradient).norm()) <= _SAME * float(other_gradient.norm())
        if is_same_gradient and abs(loss - other_loss) <= _SAME * abs(other_loss):
            return ""
        return f"model type {config.model_type} computes something else on documents laid end to end"
    return f"model type {config.model_type} does not run: {' '.join(str(failures[0]).split())}"


def _loss_and_gradient(config: Any, task: Task, is_whole: bool) -> tuple[float, Tensor]:
    """The loss of the task's sample, and its gradient with respect to the table of embeddings."""
    model = narrow_model(config, task, attention_of(task), is_whole)
    loss = task.loss(model, sample_of(task, model), LossOptions()).loss_sum
    (gradient,) = torch.autograd.grad(loss, model.get_input_embeddings().weight)
    return loss.item(), gradient


def sample_of(task: Task, model: Any) -> Batch:
    """A batch to try `model` with."""
    text = model.config.get_text_config()
    end = getattr(text, "eos_token_id", None)
    return task.sample(text.vocab_size, end if isinstance(end, int) else 0)


def instead(task: Task) -> str:
    """The way out for a family that cannot pack, as the end of a message."""
    return "; data.packing: none trains it on padded rows of one document each" if task.causal and task.padded else ""
