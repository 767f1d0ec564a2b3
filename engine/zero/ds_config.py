"""The DeepSpeed JSON: what it may say, what the run file says for it, and what 0.19.8 gets wrong.

Batch sizes, clipping and the optimizer's numbers belong to the run file; in the JSON they are
absent, ``"auto"`` or equal. Everything in ``zero_optimization``, ``bf16``, ``data_types`` and
``communication_data_type`` belongs to the JSON and passes through unchanged. Imports no torch.
"""

import difflib
import importlib.resources
import json
from pathlib import Path
from typing import Any

from engine.config import RunConfig
from engine.errors import ConfigError, MissingInputError
from engine.zero.ds_auto import Filled, fill_autos
from engine.zero.ds_faults import PASS_THROUGH, find_faults, section_of


def shipped_ds_configs() -> list[str]:
    """Names of the configurations in ds_configs/."""
    files = importlib.resources.files("ds_configs").iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def read_ds_config(name_or_path: str) -> dict[str, Any]:
    """The JSON as written: a shipped one by name, or a file. MissingInputError, ConfigError."""
    if name_or_path in shipped_ds_configs():
        text = importlib.resources.files("ds_configs").joinpath(f"{name_or_path}.json").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (FileNotFoundError, IsADirectoryError):
            near = difflib.get_close_matches(name_or_path, shipped_ds_configs(), n=1)
            hint = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(shipped_ds_configs())}"
            raise MissingInputError(f"deepspeed: no such configuration or file: {name_or_path}; {hint}") from None
    try:
        values = json.loads(text, object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise ConfigError(f"{name_or_path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name_or_path}: a DeepSpeed configuration is a JSON object")
    return values


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key `{key}` is given twice")
        result[key] = value
    return result


def resolve_ds_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The complete configuration for `world_size` ranks, every value that matters written out.

    Raises ConfigError for keys that contradict the run file or that this system refuses, one a line.
    """
    name, owned = config.deepspeed, _owned_values(config, world_size)
    filled = _filled(config, world_size)
    given = filled.values
    as_written = {key: value for key, value in given.items() if key not in filled.autos}
    faults = [*find_faults(as_written, config, world_size), *_nvme_faults(given, config)]
    if faults:
        raise ConfigError("\n".join(f"{name}: {fault}" for fault in faults))
    passed = {key: value for key, value in given.items() if key in PASS_THROUGH}
    if "fp16" in passed:
        passed["fp16"] = {"enabled": False}  # its other values are about the scaling of a loss
    fixed = {
        "managed_gradient_accumulation": False,
        "bf16": {"enabled": False} | given.get("bf16", {}),
        "steps_per_print": given.get("steps_per_print") or 2**31 - 1,
        "wall_clock_breakdown": given.get("wall_clock_breakdown", False),
    }
    return _with_given_nvme_path(passed, config) | owned | fixed


def ds_config_notes(config: RunConfig, world_size: int) -> list[str]:
    """Lines about a JSON of the user's own: the values that "auto" stands for, and blocks that are left out."""
    if config.deepspeed in shipped_ds_configs():
        return []  # its "auto" are the run file's values, and what is small enough to be never gathered
    filled, name = _filled(config, world_size), Path(config.deepspeed).name
    lines = filled.notes(name)
    if "bf16" not in filled.values and "torch_autocast" not in filled.values:
        lines.append(f"{name}: has no bf16 block, so it trains in fp32; for bf16 write bf16: {{enabled: true}}")
    return lines


def _filled(config: RunConfig, world_size: int) -> Filled:
    return fill_autos(read_ds_config(config.deepspeed), config, _owned_values(config, world_size))


def _owned_values(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The values that DeepSpeed gets of what the run file owns."""
    return {
        "train_micro_batch_size_per_gpu": config.batch.known_micro_rows,
        "gradient_accumulation_steps": 1,  # the loop accumulates: managed accumulation loses gradients under offload
        "train_batch_size": config.batch.known_micro_rows * world_size,
        "gradient_clipping": config.optimizer.gradient_clipping,
    }


def _nvme_faults(given: dict[str, Any], config: RunConfig) -> list[str]:
    """Faults of the folder for optimizer states, which the run file or the JSON gives."""
    offload = section_of(section_of(given, "zero_optimization"), "offload_optimizer")
    if offload.get("device") != "nvme":
        return []
    theirs, ours = offload.get("nvme_path"), config.nvme_path
    where = "`zero_optimization.offload_optimizer.nvme_path`"
    if theirs is None and ours is None:
        return [f"{where} is missing: give `nvme_path` in the run file, a folder on a local SSD of each node"]
    if ours is not None and theirs not in (None, str(ours)):
        return [f"{where} is {theirs} and `nvme_path` in the run file {ours}: remove one of them"]
    path = str(ours) if theirs is None else theirs
    if not isinstance(path, str) or not Path(path).is_absolute():
        return [f"{where} must be an absolute path, not {path!r}"]
    return []


def _with_given_nvme_path(given: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """The same with the run file's NVMe path where the JSON names none."""
    offload = given["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device") != "nvme" or "nvme_path" in offload:
        return given
    return with_nvme_path(given, Path(str(config.nvme_path)))


def offloads_optimizer(ds_config: dict[str, Any]) -> bool:
    """True if the CPU updates the optimizer states, which live in host memory or on NVMe."""
    offload = ds_config["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") in ("cpu", "nvme")


def nvme_path(ds_config: dict[str, Any]) -> Path | None:
    """Where a resolved configuration keeps optimizer states on NVMe; None when it does not."""
    offload = ds_config["zero_optimization"].get("offload_optimizer") or {}
    return Path(offload["nvme_path"]) if offload.get("device") == "nvme" else None


def with_nvme_path(ds_config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A resolved configuration with another folder for optimizer states on NVMe."""
    zero = ds_config["zero_optimization"]
    return ds_config | {
        "zero_optimization": zero | {"offload_optimizer": zero["offload_optimizer"] | {"nvme_path": str(path)}}
    }


def needs_async_io(config: RunConfig) -> bool:
    """True if DeepSpeed needs its op for NVMe. MissingInputError, ConfigError as `read_ds_config`."""
    zero = read_ds_config(config.deepspeed).get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, dict) else None
    return isinstance(offload, dict) and offload.get("device") == "nvme"
