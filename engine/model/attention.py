"""Attention over packed documents that never see each other, without a T x T mask.

Transformers looks attention functions up by name, so one function serves every model that uses
its interface (Llama, Qwen, Mistral, GPT-2, ...). It receives all documents of a micro-batch as
one sequence and their boundaries as ``cu_seq_lens_q``, and computes each document by itself: on
CUDA with torch's variable-length FlashAttention kernel, else with scaled-dot-product calls (see
`engine.model.attention_groups`). No mask is made for this name, so nothing quadratic in the row is ever
allocated. Models that see the whole document and models that see what precedes are told apart by
``is_causal`` of their modules.

Models that bypass the interface, or mix positions outside attention (state-space and convolution
layers), are found by `engine.model.isolation`, which runs the model itself, and refused.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from engine.model.attention_groups import Rule, by_documents, by_groups
from engine.model.cpu_bf16 import is_bf16_slow

PACKED_ATTENTION = "fulltune_packed"

# What some models pass that changes the scores; computing without it would be silently wrong.
_UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias")


class CannotPackError(NotImplementedError):
    """This model asks packed attention for something that it cannot compute."""


try:
    from torch.nn.attention.varlen import varlen_attn

    _HAS_VARLEN = {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen_attn).parameters)
except ImportError:
    _HAS_VARLEN = False


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, H, N, D), key and value (1, K, N, D); returns ((1, N, H, D), None).

    `cu_seq_lens_q` (D + 1,) int32 holds the documents' borders, `max_length_q` the longest one.
    Raises CannotPackError for score changes this kernel does not know, and without borders.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise CannotPackError(f"packed attention does not implement `{name}` of {type(module).__name__}")
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None:
        raise CannotPackError(f"{type(module).__name__} hides document borders from attention: documents would mix")
    window = None if sliding_window is None or sliding_window >= max_length_q else sliding_window
    is_causal = kwargs.get("is_causal")
    rule = Rule(bool(getattr(module, "is_causal", True) if is_causal is None else is_causal), window, scaling, dropout)
    if dropout == 0.0 and _has_varlen_kernel(query):
        return _by_varlen_kernel(query, key, value, cu_seq_lens_q, max_length_q, rule), None
    dtype = query.dtype
    if dtype == torch.bfloat16 and query.device.type == "cpu" and is_bf16_slow():
        query, key, value = query.float(), key.float(), value.float()
    inside = by_groups if query.is_cuda else by_documents
    return inside(query, key, value, cu_seq_lens_q, rule).to(dtype)[None].contiguous(), None


def _by_varlen_kernel(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, rule: Rule) -> Tensor:
    """(1, N, H, D)."""
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    reach = -1 if rule.window is None else rule.window - 1
    output = varlen_attn(
        q,
        k,
        v,
        borders,
        borders,
        longest,
        longest,
        scale=rule.scaling,
        window_size=(reach, 0 if rule.is_causal else reach),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)


def _has_varlen_kernel(query: Tensor) -> bool:
    """True if torch's variable-length FlashAttention takes tensors like `query` (1, H, N, D)."""
    width = query.shape[-1]
    return (
        _HAS_VARLEN
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and width <= 256
        and width % 8 == 0
        and torch.cuda.get_device_capability(query.device)[0] >= 8
    )


def register_packed_attention() -> None:
    """Make PACKED_ATTENTION known to transformers; repeating it does no harm."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def document_borders(lengths: list[int]) -> Tensor:
    """Borders (D + 1,) int32 of documents of `lengths` tokens laid one after the other."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
