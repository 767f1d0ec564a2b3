"""Layer-wise learning rates: each layer's share of the learning rate, the higher the nearer it is to the head."""

import re
from typing import Any

_LAYER = re.compile(r".*?\.\d+(?=\.)")  # up to the first number in a name: bert.encoder.layer.3


def layer_scales(model: Any, decay: float) -> dict[str, float]:
    """The share of the learning rate that each parameter gets, by name.

    Layers are numbered in the order of the model, through an encoder and then a decoder. The last one has `decay`, the
    one below it `decay` squared and so on; what comes before the first layer (embeddings) has one power more than the
    first. What stands between two layers goes with the one before it. The head, and what follows the last layer (a
    final norm, a pooler), have 1.
    """
    names = [name for name, _ in model.named_parameters()]
    prefix = f"{model.base_model_prefix}."
    body = [name for name in names if name.startswith(prefix)] or names
    depths: dict[str, int] = {}
    numbers: dict[str, int] = {}
    for name in body:
        if found := _LAYER.match(name):
            numbers.setdefault(found.group(), len(numbers) + 1)
        depths[name] = numbers[found.group()] if found else len(numbers)
    top = len(numbers) + 1
    last = max((place for place, name in enumerate(body) if _LAYER.match(name)), default=len(body))
    for name in body[last + 1 :]:
        depths[name] = top
    return {name: decay ** (top - depths.get(name, top)) for name in names}
