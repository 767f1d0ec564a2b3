"""A narrow model of a family: as deep as the real one and with the same kinds of layers, small enough to be run.

It shows how the family computes (which parameters a task reaches, which tokens see which) before any weight is read.
"""

from collections.abc import Iterable
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.errors import DataError
from engine.model.empty_model import empty_model, initialise
from engine.tasks.task import Task

#: Widths that no computation between tokens depends on, by the names that families give them.
_WIDTHS = {
    "vocab_size": 96, "max_position_embeddings": 128, "head_dim": 16, "rotary_dim": 8,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "qk_head_dim": 32, "v_head_dim": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "word_embed_proj_dim": 0, "lm_head_rank": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
#: Names of a number, those of what it is taken from, and True if it must divide that.
_WITHIN = (
    (
        ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k"),
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), False,
    ),
    (("num_key_value_heads",), ("num_attention_heads",), True),
)  # fmt: skip
_INNER_WIDTHS = (
    "intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "moe_intermediate_size", "mlp_dim",
    "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "intermediate_size_mlp",
)  # fmt: skip
#: Windows that are shorter than the documents a model is tried with.
_WINDOWS = {"sliding_window": 8, "local_attention": 16}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
#: A family whose narrow form does not run is tried as it is, up to this many parameters.
_MAX_PARAMETERS = 1_000_000_000


def check_shape(config: Any, name: str) -> None:
    """DataError for numbers of a text configuration that contradict one another, which only a step would show."""
    for parts, wholes, must_divide in _WITHIN:
        part, whole = (_first_number(config, names) for names in (parts, wholes))
        if part is None or whole is None:
            continue
        (part_key, count), (whole_key, total) = part, whole
        if must_divide and (count < 1 or total % count):
            raise DataError(f"model: {name}: {whole_key} {total} is no multiple of {part_key} {count}")
        if not must_divide and count > total:
            raise DataError(f"model: {name}: {part_key} {count} is more than {whole_key} {total}")


def _first_number(config: Any, names: Iterable[str]) -> tuple[str, int] | None:
    found = ((name, getattr(config, name, None)) for name in names)
    return next(((name, value) for name, value in found if type(value) is int), None)


def narrow_model(config: Any, task: Task, options: dict[str, Any], is_whole: bool = False) -> Any:
    """A model for `task` with random weights in fp32, on the CPU: of a narrow copy of `config`, or of `config` itself.

    Parts with a configuration of their own that is not the text's (vision and audio towers) get no values, unless
    `is_whole`: text does not run them. The state of the random generator is left as it was. Whatever
    transformers raises for a family that the narrow form does not fit is raised; ValueError for a model that is too
    large to be tried as it is.
    """
    model = empty_model(deepcopy(config) if is_whole else narrow(config), task, None, options, torch.float32)
    apart = () if is_whole else tuple(_towers(model))
    names = [name for name in model.state_dict() if not name.startswith(apart)]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if sum(shapes[name].numel() for name in names) > _MAX_PARAMETERS:
        raise ValueError("it does not run in a narrow form, and is too large to be tried as it is")
    with torch.random.fork_rng(devices=[]):
        initialise(model, names, 0)
    return model.eval()


def _towers(model: nn.Module) -> list[str]:
    """The prefixes of the parts that are models of another kind of input than text."""
    config: Any = model.config
    own = (type(config), type(config.get_text_config()))
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    return [f"{name}." for name, module in modules if type(module.config) not in own]


def narrow(config: Any) -> Any:
    """A copy with every width and window small; depth, kinds of layers and switches as they are."""
    small = deepcopy(config)
    text = small.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 2
    groups = getattr(text, "num_key_value_heads", None)
    narrow_groups = None if groups is None else min(groups, 2)
    narrow_heads = min(heads, 2 * (narrow_groups or 1))
    if groups == heads:
        narrow_groups = narrow_heads
    hidden = 16 * narrow_heads
    widths = _WIDTHS | _WINDOWS | dict.fromkeys(_INNER_WIDTHS, 32) | {
        "hidden_size": hidden, "embedding_size": hidden, "word_embed_proj_dim": hidden,
        "num_attention_heads": narrow_heads, "num_key_value_heads": narrow_groups,
    }  # fmt: skip
    for key, value in widths.items():
        # Some families compute one of these from the others, or have another in each layer.
        with suppress(AttributeError, ValueError):
            if getattr(text, key, None) is not None and value is not None:
                setattr(text, key, value)
    for number, key in enumerate(_TOKENS):
        if getattr(text, key, None) is not None:
            setattr(text, key, number)
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
