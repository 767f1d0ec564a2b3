"""The dropout of a run in place of a configuration's own; a model that is saved keeps what its base says."""

import copy
from typing import Any

from torch import nn

from engine.errors import ConfigError


def set_dropout(config: Any, dropout: float) -> dict[str, float]:
    """Set every dropout probability of a configuration; returns the ones it had, by key, to be put back.

    A key is one whose name speaks of dropout and that holds a number: those that hold nothing follow another one.
    Leaving out whole layers (layerdrop) is another thing. ConfigError where there is no such key.
    """
    text = config.get_text_config()
    before = {
        key: value
        for key, value in text.to_dict().items()
        if ("dropout" in key or key.endswith("pdrop"))
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }
    if not before:
        raise ConfigError(f"model.dropout: model type {config.model_type} has no dropout in its configuration")
    for key in before:
        setattr(text, key, dropout)
    return before


def set_layer_dropout(model: nn.Module, dropout: float) -> None:
    """Set the probability of every dropout layer of a made model: heads may have one that is in no configuration."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout


def keep_saved_dropout(model: Any, before: dict[str, float]) -> None:
    """Let the configuration that is saved with a made model have the values `before` again.

    The parts of the model go on with the configuration that they were made with.
    """
    model.config = copy.deepcopy(model.config)
    text = model.config.get_text_config()
    for key, value in before.items():
        setattr(text, key, value)
