"""Losses beside the cross-entropy that a family's configuration names: those that are added, and those left out.

The balancing loss of a router (Switch Transformers, Fedus et al. 2021) is a product of two means over tokens, so
the sum over parts of a batch is not the one of the whole. It is therefore defined for each row, by the family's own
formula, and a step's is the mean of its rows' weighted by their tokens: no split over ranks or micro-batches
changes that. A z-loss is a mean over targets of the squared logarithm of the softmax's denominator.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from engine.batches import Batch

BALANCING, Z_LOSS = "balancing_loss", "z_loss"
#: The names of all that `Output.auxiliary` may hold, and of its figures.
AUXILIARY = (BALANCING, Z_LOSS)
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
_ROUTER_KEYS = (*_COEFFICIENTS, "moe_loss_weight", "router_z_loss_coef")
_FORMULA = ("gate_logits", "num_experts", "top_k", "attention_mask")
#: Keys of configurations that ask for a loss; only some are computed, see `lines`.
_ASKS = re.compile(r"(?:aux|z|router|balanc\w*|mtp)_loss\w*|moe_loss_weight|num_(?:nextn_predict|mtp)_layers")


class Balancing(NamedTuple):
    """The balancing loss of a model: its family's formula, and what the formula needs."""

    key: str
    coefficient: float
    num_experts: int
    top_k: int
    formula: Callable[..., Any]


def balancing_of(model: Any) -> Balancing | None:
    """The balancing loss that transformers' class would add for this model's configuration; None where it adds none."""
    if not _asks_for_router_logits(model.config):
        return None
    formula = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    key, coefficient = _coefficient(model)
    if formula is None or not coefficient or tuple(inspect.signature(formula).parameters) != _FORMULA:
        return None
    experts = _first(model, "num_experts", "num_local_experts", "n_routed_experts")
    top_k = _first(model, "num_experts_per_tok", "moe_top_k")
    return Balancing(key, float(coefficient), int(experts), int(top_k), formula)


def balancing_sum(balancing: Balancing, output: Any, batch: "Batch") -> "Tensor":
    """The coefficient times the sum over rows of tokens x balancing loss, fp32; padding and filler rows add nothing."""
    import torch

    if (logits := output.get("router_logits")) is None:
        raise DataError(
            f"config.json asks for the router's balancing loss ({balancing.key}), but this family returns no router "
            "logits: set output_router_logits to false there"
        )
    layers = [layer.flatten(0, -2).float() for layer in logits]  # (T, E) each, or (B x T, E)
    total = torch.zeros((), device=batch.input_ids.device)
    begin = 0
    for number, tokens in enumerate(batch.row_tokens):
        begin = begin if batch.lengths is None else number * batch.input_ids.shape[1]
        row = tuple(layer[begin : begin + tokens] for layer in layers)
        total = total + tokens * balancing.formula(row, balancing.num_experts, balancing.top_k)
        begin += tokens
    return total * balancing.coefficient


def z_sum(model: Any, logits: "Tensor") -> "Tensor | None":
    """The coefficient times the sum over targets of logsumexp(logits)^2, of logits (U, V); None without a z-loss."""
    coefficient = getattr(model, "z_loss_coefficient", None)
    return logits.float().logsumexp(-1).square().sum() * coefficient if coefficient else None


def lines(model: Any, is_computed: bool) -> Iterator[str]:
    """Lines for people: the losses added to that of `model`, and those left out although its configuration names them.

    Without `is_computed` the task adds nothing.
    """
    asked = _asked(model.config.to_dict())
    if not _asks_for_router_logits(model.config):  # then transformers adds no balancing loss either
        asked = {key: value for key, value in asked.items() if key.rpartition(".")[2] not in _ROUTER_KEYS}
    balancing = balancing_of(model) if is_computed else None
    if balancing is not None:
        yield (
            f"balancing loss of the router added ({balancing.key} {balancing.coefficient:g}): computed for each row "
            "and averaged by tokens, whatever the ranks and micro-batches; transformers computes it over a whole batch"
        )
        asked = {key: value for key, value in asked.items() if key.rpartition(".")[2] != balancing.key}
    if is_computed and getattr(model, "z_loss_coefficient", None):
        yield f"z-loss added (z_loss_coefficient {model.z_loss_coefficient:g}): the mean over targets"
        asked.pop("z_loss_coefficient", None)
    if asked:
        keys = ", ".join(f"{key} {value:g}" for key, value in asked.items())
        yield f"not added to the loss, though config.json asks for it: {keys}"


def _asks_for_router_logits(config: Any) -> bool:
    return any(getattr(part, "output_router_logits", False) for part in (config, config.get_text_config()))


def _coefficient(model: Any) -> tuple[str, float]:
    for part in (model, model.config, model.config.get_text_config()):
        for key in _COEFFICIENTS:
            if (value := getattr(part, key, None)) is not None:
                inner = getattr(model.config, "ffn_config", None)
                return ("moe_loss_weight" if hasattr(inner, "moe_loss_weight") else key), value
    return "", 0.0


def _first(model: Any, *names: str) -> Any:
    parts = (model, model.config, model.config.get_text_config())
    return next(value for part in parts for name in names if (value := getattr(part, name, None)) is not None)


def _asked(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Coefficients and counts that are not zero, by dotted key."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _asked(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and value and _ASKS.search(key):
            found[prefix + key] = value
    return found


def auxiliary_sums(model: Any, output: Any, logits: "Tensor", batch: "Batch") -> dict[str, "Tensor"]:
    """The sums of all losses beside the cross-entropy, by name; none without gradients, as in an evaluation."""
    import torch

    if not torch.is_grad_enabled():
        return {}
    sums = {}
    if (balancing := balancing_of(model)) is not None:
        sums[BALANCING] = balancing_sum(balancing, output, batch)
    if (extra := z_sum(model, logits)) is not None:
        sums[Z_LOSS] = extra
    return sums


def weight(name: str, num_tokens: int, num_targets: int) -> float:
    """The factor that makes the mean of a loss's sum over a step: it is by tokens or by targets."""
    return 1.0 / max(1, num_tokens if name == BALANCING else num_targets)
