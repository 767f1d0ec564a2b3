"""Packed documents that see each other, and tokens that see those after them: found by running a narrow model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.batches import Batch
from engine.errors import DataError
from engine.model.attention import PACKED_ATTENTION, CannotPackError, document_borders, register_packed_attention
from engine.model.narrow import narrow_model
from engine.tasks.task import LossOptions, Task

#: Tokens of the documents that are tried: another number for each, so that no two are mistaken for one another.
_LENGTHS = (23, 16, 41)
_NOT_CAUSAL = "tokens see the ones that follow them (not a causal model)"


def check_isolation(config: Any, task: Task) -> None:
    """DataError when packed documents, or a token and those after it, would see each other in this family.

    `config` is the configuration of a model for `task`. The model that is run is narrow and has random
    weights, so that neither the size of the model nor its weights matter; see `engine.model.narrow`.
    """
    register_packed_attention()
    name = config.model_type
    options = {"attn_implementation": PACKED_ATTENTION} if task.packs else {}
    failure: Exception | None = None
    for is_whole in (False, True):
        try:
            model = narrow_model(config, task, options, is_whole)
            leak = find_leak(model, partial(_loss, model, task), _LENGTHS if task.packs else _LENGTHS[:1])
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


def fit_to_rows(config: Any, packed: Task, padded: Task) -> Task:
    """The form of a task that the family can train, `packed` if it can. DataError as `check_isolation` for neither."""
    try:
        check_isolation(config, packed)
    except DataError:
        check_isolation(config, padded)
        return padded
    return packed


def find_leak(
    model: Any, loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], lengths: Sequence[int] = _LENGTHS
) -> str | None:
    """Run the model to see whether anything reaches a token that must not. Returns what leaks, or None.

    `loss(input_ids, position_ids, borders, targets)` runs it on documents of `lengths` tokens; a scalar, the
    loss at the positions `targets`. The gradient of the loss at the first half of the middle document
    with respect to the embeddings of the others, and of its own second half, is exactly zero, in every
    precision, if and only if no path leads there.
    """
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(model.config.get_text_config().vocab_size, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    leaves: list[Tensor] = []

    def cut(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    middle = len(lengths) // 2
    begin = sum(lengths[:middle])
    half, end = begin + lengths[middle] // 2, begin + lengths[middle]
    was_training = model.training
    model.eval()
    handle = model.get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            value = loss(input_ids, positions, document_borders(list(lengths)), torch.arange(begin, half))
            (gradient,) = torch.autograd.grad(value, leaves[0])
    finally:
        handle.remove()
        model.train(was_training)
    gradient = gradient.squeeze(0)
    if gradient[:begin].any() or gradient[end:].any():
        return "documents in one row see each other (recurrent, convolution or bypassing layers)"
    if gradient[half:end].any():
        return _NOT_CAUSAL
    return None


def instead(task: Task) -> str:
    """The way out for a family that cannot pack, as the end of a message."""
    return "" if task.padded is None else "; data.packing: none trains it on padded rows of one document each"


def _loss(model: Any, task: Task, input_ids: Tensor, positions: Tensor, borders: Tensor, targets: Tensor) -> Tensor:
    batch = Batch(input_ids, targets, input_ids[0, targets], (), input_ids.numel())
    if task.packs:
        longest = int(borders.diff().max())
        batch = replace(batch, position_ids=positions, document_ends=borders, longest_document_tokens=longest)
    else:
        batch = replace(batch, lengths=torch.tensor([input_ids.numel()]))
    return task.loss(model, batch, LossOptions()).loss_sum
