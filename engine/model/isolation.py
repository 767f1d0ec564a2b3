"""Finds out whether a model is fit for packed rows: runs a small form of it, as weights do not matter."""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.batches import Batch
from engine.errors import DataError
from engine.model.attention import PACKED_ATTENTION, CannotPackError, find_leak
from engine.tasks.task import Task

#: Widths that no computation between tokens depends on, by the names that families give them.
_WIDTHS = {
    "vocab_size": 96, "max_position_embeddings": 128, "head_dim": 16, "rotary_dim": 8,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "qk_head_dim": 32, "v_head_dim": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "word_embed_proj_dim": 0, "lm_head_rank": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_INNER_WIDTHS = (
    "intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "moe_intermediate_size", "mlp_dim",
    "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "intermediate_size_mlp",
)  # fmt: skip
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
#: A family whose narrow form does not run is tried as it is, up to this many parameters.
_MAX_PARAMETERS = 1_000_000_000


def check_isolation(config: Any, task: Task) -> None:
    """DataError when packed documents, or a token and those after it, would see each other in this family.

    `config` is the configuration of a model for `task`. The model that is run has as many layers, of
    the same kinds, but is narrow and has random weights, so that neither the size of the model nor
    its weights matter. The state of the random generator is left as it was.
    """
    name = config.model_type
    failure: Exception | None = None
    for change in (_narrow, deepcopy):
        try:
            leak = _find_leak(change(config), task)
        except CannotPackError as error:
            raise DataError(f"model type {name} cannot keep packed documents apart: {error}") from error
        except Exception as error:
            # Some families have sizes of their own that the narrow form does not fit: then as it is.
            failure = failure or error
            continue
        if leak:
            raise DataError(f"model type {name} cannot be trained on packed rows: {leak}")
        return
    reason = " ".join(str(failure).split())
    raise DataError(f"model type {name} cannot keep packed documents apart: {reason}") from failure


def _find_leak(config: Any, task: Task) -> str | None:
    classes = task.auto_class()
    options = {"dtype": torch.float32, "attn_implementation": PACKED_ATTENTION}
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in classes.from_config(deepcopy(config), **options).parameters())
    if size > _MAX_PARAMETERS:
        raise ValueError("it does not run in a narrow form, and is too large to be tried as it is")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = classes.from_config(deepcopy(config), **options)
        return find_leak(model, partial(_loss, model, task))


def _narrow(config: Any) -> Any:
    """A copy with every width small; depth, kinds of layers, windows and switches as they are."""
    small = deepcopy(config)
    text = small.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 2
    groups = getattr(text, "num_key_value_heads", None)
    narrow_groups = None if groups is None else min(groups, 2)
    narrow_heads = min(heads, 2 * (narrow_groups or 1))
    if groups == heads:
        narrow_groups = narrow_heads
    hidden = 16 * narrow_heads
    widths = _WIDTHS | dict.fromkeys(_INNER_WIDTHS, 32) | {
        "hidden_size": hidden, "embedding_size": hidden, "word_embed_proj_dim": hidden,
        "num_attention_heads": narrow_heads, "num_key_value_heads": narrow_groups,
    }  # fmt: skip
    for key, value in widths.items():
        if getattr(text, key, None) is not None and value is not None:
            setattr(text, key, value)
    for key in _TOKENS:
        if getattr(text, key, None) is not None:
            setattr(text, key, 0)
    if isinstance(getattr(text, "rope_parameters", None), dict):
        text.rope_parameters = _plain_rope(text.rope_parameters)
    return small


def _plain_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions without tables whose length depends on the width; nested ones are by kind of layer."""
    if "rope_type" in parameters:
        kept: dict[str, Any] = {
            key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters
        }
        return {"rope_type": "default", **kept}
    return {key: _plain_rope(value) if isinstance(value, dict) else value for key, value in parameters.items()}


def _loss(model: Any, task: Task, input_ids: Tensor, positions: Tensor, borders: Tensor, targets: Tensor) -> Tensor:
    longest = int(borders.diff().max())
    batch = Batch(input_ids, targets, input_ids[0, targets], (), input_ids.numel(), positions, borders, longest)
    return task.loss(model, batch).loss_sum
