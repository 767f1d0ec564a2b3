"""Attention over packed documents that never see each other, without a T x T mask.

Transformers looks attention functions up by name, so one function serves every model that uses
its interface (Llama, Qwen, Mistral, GPT-2, ...). It receives all documents of a micro-batch as
one sequence and their boundaries as ``cu_seq_lens_q``, and computes each document by itself: on
CUDA with torch's variable-length FlashAttention kernel, else with one scaled-dot-product call a
document. No mask is made for this name, so nothing quadratic in the row is ever allocated.

Models that bypass the interface, or mix positions outside attention (state-space and convolution
layers), are found by `engine.model.isolation`, which runs the model itself, and refused.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    causal = bool(getattr(module, "is_causal", True))
    if sliding_window is not None and (not causal or sliding_window >= max_length_q):
        sliding_window = None
    if dropout == 0.0 and _has_varlen_kernel(query):
        left = -1 if sliding_window is None else sliding_window - 1
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        borders, longest = cu_seq_lens_q, max_length_q
        output = varlen_attn(
            q,
            k,
            v,
            borders,
            borders,
            longest,
            longest,
            scale=scaling,
            window_size=(left, 0 if causal else -1),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(output, Tensor)
        return output.unsqueeze(0), None
    dtype = query.dtype
    if dtype == torch.bfloat16 and query.device.type == "cpu" and is_bf16_slow():
        query, key, value = query.float(), key.float(), value.float()
    lengths = cu_seq_lens_q.diff().tolist()
    documents = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [_one_document(q, k, v, dropout, scaling, causal, sliding_window) for q, k, v in documents]
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype).contiguous(), None


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


def _one_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    causal: bool,
    sliding_window: int | None,
) -> Tensor:
    """Scaled dot-product attention inside one document, (1, H, L, D)."""
    length = query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if sliding_window is None or length <= sliding_window:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
        )
    # Queries in blocks of one window: block i needs the keys of blocks i - 1 and i alone, so the
    # band mask stays (window x 2 windows) however long the document is.
    outputs = []
    for start in range(0, length, sliding_window):
        stop, first = min(start + sliding_window, length), max(0, start - sliding_window)
        distance = torch.arange(start, stop, device=query.device)[:, None] - torch.arange(
            first, stop, device=query.device
        )
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, first:stop],
                value[:, :, first:stop],
                attn_mask=(distance >= 0) & (distance < sliding_window),
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs, dim=2)


def register_packed_attention() -> None:
    """Make PACKED_ATTENTION known to transformers; repeating it does no harm."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def document_borders(lengths: list[int]) -> Tensor:
    """Borders (D + 1,) int32 of documents of `lengths` tokens laid one after the other."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
