"""The values that ``"auto"`` stands for in a DeepSpeed JSON, and the blocks of it that are left out. Imports no torch.

Batch sizes, clipping and the optimizer's numbers are the run file's. Bucket sizes follow from the model's hidden size,
by the rule of transformers' Trainer. Half precision is bf16. Everything else has DeepSpeed's own default.
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
_FROM_HIDDEN_SIZE: Mapping[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda size: size * size,
    "stage3_prefetch_bucket_size": lambda size: int(0.9 * size * size),
    "stage3_param_persistence_threshold": lambda size: 10 * size,
}
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
        size = hidden_size(config)
        is_stage_3 = zero.get("stage") in (3, "auto")
        known |= {
            f"zero_optimization.{key}": rule(size)
            for key, rule in _FROM_HIDDEN_SIZE.items()
            if size is not None and (is_stage_3 or not key.startswith("stage3"))
        }
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


def hidden_size(config: RunConfig) -> int | None:
    """The model's hidden size by its configuration, the largest of several; None where none is known here yet."""
    section = config.model
    if section.config is not None:
        return _hidden_size_in(section.config)
    folder = Path(section.path or "")
    file: Any = folder / "config.json"
    if not folder.is_dir() and is_hub_name(str(section.path)):
        from huggingface_hub import try_to_load_from_cache  # no torch

        file = try_to_load_from_cache(str(section.path), "config.json", revision=section.revision)
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None  # the model's own loader names the fault
    return _hidden_size_in(values) if isinstance(values, dict) else None


def _hidden_size_in(values: Mapping[str, Any]) -> int | None:
    for key in _HIDDEN_SIZES:
        found = values.get(key)
        if isinstance(found, list) and found and all(isinstance(size, int) for size in found):
            return max(map(int, found))
        if isinstance(found, int):
            return found
    inner = values.get("text_config")
    return _hidden_size_in(inner) if isinstance(inner, dict) else None
