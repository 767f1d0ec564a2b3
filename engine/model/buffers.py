"""Buffers of a model that are saved with its weights."""

from torch import Tensor
from torch.nn import Module


def persistent_buffers(model: Module) -> dict[str, Tensor]:
    """The buffers that belong to a model's weights: those that its `state_dict` holds."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
