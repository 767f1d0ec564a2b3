"""The values that ``"auto"`` stands for in a DeepSpeed JSON, and the blocks of it that are left out. Imports no torch.

Batch sizes, clipping and the optimizer's numbers are the run file's. Bucket sizes follow from the model's hidden size,
by the rule of transformers' Trainer; but ZeRO-3 never gathers a small model, because every rank can hold its weights.
Half precision is bf16. Everything else has DeepSpeed's own default.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.arithmetic import is_hub_name
from engine.config import RunConfig

_HIDDEN_SIZES = ("hidden_size", "hidden_sizes", "d_model", "n_embd", "dim")
_THRESHOLD = "stage3_param_persistence_threshold"
_FROM_HIDDEN_SIZE: Mapping[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda size: size * size,
    "stage3_prefetch_bucket_size": lambda size: int(0.9 * size * size),
    _THRESHOLD: lambda size: 10 * size,
}
#: A model of so many parameters or fewer is small: the shipped configurations let ZeRO-3 keep as many gathered anyway.
SMALL_MODEL_PARAMETERS = 500_000_000
_NUMS_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
_NUMS_DECODER_LAYERS = ("num_decoder_layers", "decoder_layers")
_INNER_SIZES = ("intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim", "ffn_dim", "hidden_dim")
#: Blocks that say of themselves that they are off are left out; other values of theirs are refused.
_SWITCHED = ("amp", "tensorboard", "csv_monitor", "wandb", "comet", "elasticity", "autotuning", "data_efficiency")


@dataclass
class Filled:
    """A DeepSpeed JSON without ``"auto"``; `autos` are the values put in, by dotted key, and `left_out` the blocks."""

    values: dict[str, Any]
    autos: dict[str, Any] = field(default_factory=dict)
    defaults: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def notes(self, name: str) -> list[str]:
        """Everything that was put in or left out, in at most two lines."""
        texts = [f"{key} {json.dumps(value)}" for key, value in self.autos.items()]
        if self.defaults:
            texts.append(f"DeepSpeed's default for {', '.join(self.defaults)}")
        lines = [f'{name}: "auto" is {", ".join(texts)}'] if texts else []
        return lines + ([f"{name}: left out: {', '.join(self.left_out)}"] if self.left_out else [])


def fill_autos(given: Mapping[str, Any], config: RunConfig, owned: Mapping[str, Any]) -> Filled:
    """A copy of `given` with a value for every ``"auto"``; `owned` are the run file's values of top-level keys."""
    filled = Filled(copy.deepcopy(dict(given)))
    _leave_out(filled, config)
    known = dict(owned) | {"communication_data_type": "fp32", "data_types.grad_accum_dtype": "fp32"}
    known |= {f"optimizer.params.{key}": value for key, value in optimizer_values(config).items()}
    known |= {"fp16.enabled": False, "bf16.enabled": True, "zero_optimization.stage": 3}
    known |= {f"zero_optimization.{key}.device": "none" for key in ("offload_optimizer", "offload_param")}
    if config.nvme_path is not None:
        known["zero_optimization.offload_optimizer.nvme_path"] = str(config.nvme_path)
    zero = filled.values.get("zero_optimization")
    if isinstance(zero, dict) and any(zero.get(key) == "auto" for key in _FROM_HIDDEN_SIZE):
        model = model_values(config)
        size, count = hidden_size(model), _num_parameters(model)
        is_stage_3 = zero.get("stage") in (3, "auto")
        known |= {
            f"zero_optimization.{key}": rule(size)
            for key, rule in _FROM_HIDDEN_SIZE.items()
            if size is not None and (is_stage_3 or not key.startswith("stage3"))
        }
        if is_stage_3 and count is not None and count <= SMALL_MODEL_PARAMETERS:
            known[f"zero_optimization.{_THRESHOLD}"] = SMALL_MODEL_PARAMETERS
    _fill(filled, filled.values, "", known)
    return filled


def optimizer_values(config: RunConfig) -> dict[str, Any]:
    """The run file's values of what DeepSpeed calls ``optimizer.params``."""
    optimizer = config.optimizer
    betas = list(optimizer.betas)
    return {"lr": optimizer.learning_rate, "betas": betas, "eps": optimizer.eps, "weight_decay": optimizer.weight_decay}


def _leave_out(filled: Filled, config: RunConfig) -> None:
    """Take out the scheduler, for which the run file stands, and blocks that are switched off."""
    if filled.values.pop("scheduler", None) is not None:
        ours = f"schedule {config.optimizer.schedule}, warmup_steps {config.optimizer.warmup_steps}"
        filled.left_out.append(f"scheduler (the run file's section optimizer has the learning rate: {ours})")
    for key in _SWITCHED:
        block = filled.values.get(key)
        if block is False or (isinstance(block, dict) and block.get("enabled") in (False, "auto")):
            del filled.values[key]
            filled.left_out.append(f"{key} (it is off)")


def _fill(filled: Filled, section: dict[str, Any], prefix: str, known: Mapping[str, Any]) -> None:
    """Replace every "auto" below `section`; one without a known value goes, so that DeepSpeed's default counts."""
    for key, value in list(section.items()):
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            _fill(filled, value, f"{dotted}.", known)
        elif value == "auto" and dotted in known:
            section[key] = filled.autos[dotted] = known[dotted]
        elif value == "auto":
            del section[key]
            filled.defaults.append(dotted)


def model_values(config: RunConfig) -> Mapping[str, Any]:
    """The model's configuration; empty where none is known here yet."""
    section = config.model
    if section.config is not None:
        return section.config
    folder = Path(section.path or "")
    file: Any = folder / "config.json"
    if not folder.is_dir() and is_hub_name(str(section.path)):
        from huggingface_hub import try_to_load_from_cache  # no torch

        file = try_to_load_from_cache(str(section.path), "config.json", revision=section.revision)
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return {}  # the model's own loader names the fault
    return values if isinstance(values, dict) else {}


def hidden_size(values: Mapping[str, Any]) -> int | None:
    """The hidden size, the largest of several; None without one."""
    for key in _HIDDEN_SIZES:
        found = values.get(key)
        if isinstance(found, list) and found and all(isinstance(size, int) for size in found):
            return max(map(int, found))
        if isinstance(found, int):
            return found
    inner = values.get("text_config")
    return hidden_size(inner) if isinstance(inner, dict) else None


def _num_parameters(values: Mapping[str, Any]) -> int | None:
    """About how many parameters a transformer has, by its configuration; None where that does not say enough.

    Counted are embeddings, attention with as many heads of keys as of queries, and a gated network after it. A model
    of several parts, or with experts, is none of these.
    """
    size, layers = hidden_size(values), _first_int(values, _NUMS_LAYERS)
    vocabulary = values.get("vocab_size")
    has_parts = any(isinstance(value, Mapping) and "model_type" in value for value in values.values())
    if size is None or layers is None or not isinstance(vocabulary, int) or has_parts or "expert" in " ".join(values):
        return None
    inner = _first_int(values, _INNER_SIZES) or 4 * size
    is_pair = values.get("is_encoder_decoder") is True
    decoder_layers = (_first_int(values, _NUMS_DECODER_LAYERS) or layers) if is_pair else 0
    attention, network = 4 * size * size, 3 * size * inner
    return vocabulary * size * 2 + layers * (attention + network) + decoder_layers * (2 * attention + network)


def _first_int(values: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((values[key] for key in keys if isinstance(values.get(key), int)), None)
