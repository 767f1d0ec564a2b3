"""Attention over packed documents that never see each other, without a T x T mask.

Transformers looks attention functions up by name, so one function serves every model that uses
its interface (Llama, Qwen, Mistral, GPT-2, ...). It receives all documents of a micro-batch as
one sequence and their boundaries as ``cu_seq_lens_q``, and computes each document by itself: on
CUDA with torch's variable-length FlashAttention kernel, else with one scaled-dot-product call a
document. No mask is made for this name, so nothing quadratic in the row is ever allocated.

Models that bypass the interface, or mix positions outside attention (state-space and convolution
layers), are found by `find_leak`, which asks the model itself, and refused.
"""

import inspect
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import Batch
from engine.errors import DataError
from engine.model.cpu_bf16 import is_bf16_slow
from engine.tasks.task import Task

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
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype), None


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


def find_leak(model: Any, loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> str | None:
    """Run the model to see whether anything reaches a token that must not. Returns what leaks, or None.

    `loss(input_ids, position_ids, borders, targets)` runs it on packed documents; a scalar, the loss
    at the positions `targets`. The gradient of the loss at the first half of the middle one of three
    documents with respect to the embeddings of the other two, and of its own second half, is exactly
    zero, in every precision, if and only if no path leads there.
    """
    lengths = [23, 16, 41]
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(model.config.get_text_config().vocab_size, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    leaves: list[Tensor] = []

    def cut(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    was_training = model.training
    model.eval()
    handle = model.get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            begin, half = lengths[0], lengths[0] + lengths[1] // 2
            value = loss(input_ids, positions, document_borders(lengths), torch.arange(begin, half))
            (gradient,) = torch.autograd.grad(value, leaves[0])
    finally:
        handle.remove()
        model.train(was_training)
    gradient = gradient.squeeze(0)
    if gradient[:begin].any() or gradient[-lengths[2] :].any():
        return "documents in one row see each other (recurrent, convolution or bypassing layers)"
    if gradient[half : -lengths[2]].any():
        return "tokens see the ones that follow them (not a causal model)"
    return None


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
