"""The DeepSpeed JSON: what it may say, what the run file says for it, and what 0.19.8 gets wrong.

Batch sizes, clipping and the optimizer's numbers belong to the run file; in the JSON they are
absent, ``"auto"`` or equal. Everything in ``zero_optimization``, ``bf16``, ``data_types`` and
``communication_data_type`` belongs to the JSON and passes through unchanged. Imports no torch.
"""

import difflib
import importlib.resources
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.config import RunConfig
from engine.errors import ConfigError, MissingInputError

# Top-level keys that pass through, besides the ones the run file owns.
_PASS_THROUGH = frozenset(
    "bf16 fp16 data_types communication_data_type zero_optimization zero_allow_untested_optimizer "
    "zero_force_ds_cpu_optimizer torch_autocast bf16_master_weights_and_grads prescale_gradients "
    "gradient_predivide_factor comms_logger flops_profiler wall_clock_breakdown memory_breakdown dump_state "
    "disable_python_gc log_level steps_per_print timers seq_parallel_communication_data_type aio".split()
)
_REFUSED = {
    "scheduler": "the learning rate is a function of the step: set optimizer.schedule in the run file",
    "activation_checkpointing": "Hugging Face models ignore this block: set model.activation_checkpointing",
    "tensorboard": "fulltune writes TensorBoard itself: set log.tensorboard",
    "csv_monitor": "the run folder's metrics.jsonl holds these figures",
    "wandb": "not supported; the run folder's metrics.jsonl holds these figures",
    "checkpoint": "checkpoints are fulltune's own: set the run file's checkpoint section",
    "compile": "DeepCompile does not work with unmanaged accumulation",
    "tensor_parallel": "tensor parallel training is not supported",
    "zenflow": "ZenFlow changes the optimization trajectory",
    "elasticity": "removed in DeepSpeed 0.19.8; any number of ranks resumes any fulltune checkpoint",
    "data_efficiency": "the order of data is fulltune's, a function of (seed, step)",
    **dict.fromkeys(
        "nebula amp compression_training quantize_training sparse_gradients eigenvalue sparse_attention "
        "graph_harvesting curriculum_learning progressive_layer_drop".split(),
        "removed in DeepSpeed 0.19.8",
    ),
}
_AIO_KEYS = frozenset("block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds".split())
# Keys of zero_optimization that 0.19.8 knows (those of the refused features left out).
_ZERO_KEYS = frozenset(
    "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions "
    "allgather_bucket_size overlap_comm load_from_fp32_weights offload_param offload_optimizer sub_group_size "
    "stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size "
    "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_gather_16bit_weights_on_model_save "
    "stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential "
    "leaf_module ignore_unused_parameters round_robin_gradients zero_hpz_partition_size zero_quantized_weights "
    "zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear override_module_apply "
    "enable_sanity_checks log_trace_cache_warnings parameter_alignment compute_grad_norm".split()
)
_REFUSED_ZERO = {
    "mics_shard_size": "removed in DeepSpeed 0.19.8",
    "mics_hierarchical_params_gather": "removed in DeepSpeed 0.19.8",
    "zeropp_loco_param": "removed in DeepSpeed 0.19.8",
    "zenflow": "ZenFlow changes the optimization trajectory",
    "elastic_checkpoint": "any number of ranks resumes any fulltune checkpoint",
    "cpu_offload": "deprecated: write offload_optimizer: {device: cpu}",
}


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

    Raises ConfigError for a key that contradicts the run file or that this system refuses.
    """
    given = read_ds_config(config.deepspeed)
    name = config.deepspeed
    _check_top_level(given, name)
    _check_shapes(given, name)
    _check_zero(given.get("zero_optimization", {}), name)
    _check_aio(given.get("aio") or {}, name)
    if given.get("fp16", {}).get("enabled"):
        raise ConfigError(f"{name}: `fp16.enabled`: loss scaling is not supported; use bf16")
    owned: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro_rows,
        "gradient_accumulation_steps": 1,  # the loop accumulates: managed accumulation loses gradients under offload
        "train_batch_size": config.batch.micro_rows * world_size,
        "gradient_clipping": config.optimizer.gradient_clipping,
    }
    # What the JSON says of the batch is the user's view (whole job), not the one handed to DeepSpeed.
    user_view = {"train_batch_size": config.global_rows, "gradient_accumulation_steps": None}
    for key, value in owned.items():
        expected = user_view.get(key, value)
        if given.get(key, "auto") not in ("auto", expected):
            belongs = "optimizer.gradient_clipping" if key == "gradient_clipping" else "the run file's batch section"
            raise ConfigError(
                f'{name}: `{key}` is {given[key]}, but it belongs to {belongs}: write "auto" or remove it'
            )
    _check_optimizer(given.get("optimizer"), config, name)
    passed = {key: value for key, value in given.items() if key in _PASS_THROUGH}
    fixed = {
        "managed_gradient_accumulation": False,
        "bf16": {"enabled": False} | given.get("bf16", {}),
        "steps_per_print": given.get("steps_per_print") or 2**31 - 1,
        "wall_clock_breakdown": given.get("wall_clock_breakdown", False),
    }
    return _resolve_nvme_path(passed, config, name) | owned | fixed


def _resolve_nvme_path(given: dict[str, Any], config: RunConfig, name: str) -> dict[str, Any]:
    """The same with the NVMe path written out, which the run file or the JSON gives."""
    zero = given.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device") != "nvme":
        return given
    theirs, ours = offload.get("nvme_path", "auto"), config.nvme_path
    where = f"{name}: `zero_optimization.offload_optimizer.nvme_path`"
    if theirs == "auto" and ours is None:
        raise ConfigError(f"{where} is missing: give `nvme_path` in the run file, a folder on a local SSD of each node")
    if theirs not in ("auto", str(ours)) and ours is not None:
        raise ConfigError(f"{where} is {theirs} and `nvme_path` in the run file {ours}: remove one of them")
    path = str(ours) if theirs == "auto" else theirs
    if not isinstance(path, str) or not Path(path).is_absolute():
        raise ConfigError(f"{where} must be an absolute path, not {path!r}")
    return given | {"zero_optimization": zero | {"offload_optimizer": offload | {"nvme_path": path}}}


def _check_top_level(given: dict[str, Any], name: str) -> None:
    owned = {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping"}
    known = _PASS_THROUGH | owned | {"optimizer", "managed_gradient_accumulation"}
    for key in given:
        if key in _REFUSED:
            raise ConfigError(f"{name}: `{key}`: {_REFUSED[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f"{name}: unknown key `{key}`{f'; did you mean `{near[0]}`?' if near else ''}")
    if given.get("managed_gradient_accumulation"):
        raise ConfigError(f"{name}: `managed_gradient_accumulation` loses gradients under offload in 0.19.8: remove it")


def _check_shapes(given: dict[str, Any], name: str) -> None:
    """Sections are objects, and "auto" stands only where the run file has a value for it."""
    for key in ("bf16", "fp16", "zero_optimization", "data_types", "optimizer", "aio"):
        if key in given and not isinstance(given[key], dict):
            raise ConfigError(f"{name}: `{key}` is a section such as {{...}}, not {given[key]!r}")
    zero = given.get("zero_optimization", {})
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key) is not None and not isinstance(zero[key], dict):
            raise ConfigError(f"{name}: `zero_optimization.{key}` is a section, not {zero[key]!r}")
    if not isinstance(given.get("bf16", {}).get("enabled", False), bool):
        raise ConfigError(f"{name}: `bf16.enabled` is true or false, not {given['bf16']['enabled']!r}")
    if given.get("bf16", {}).get("check_grad_overflow") is False:
        raise ConfigError(f"{name}: `bf16.check_grad_overflow` false would let a bad gradient into the weights")
    owned = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    for dotted, value in _leaves({key: value for key, value in given.items() if key not in (*owned, "optimizer")}):
        if value == "auto" and dotted != "zero_optimization.offload_optimizer.nvme_path":
            raise ConfigError(f'{name}: `{dotted}` is "auto", which only other trainers fill in: write a number')


def _leaves(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_zero(zero: dict[str, Any], name: str) -> None:
    where = f"{name}: `zero_optimization"
    if zero.get("stage") not in (2, 3):
        raise ConfigError(f"{where}.stage` must be 2 or 3, not {zero.get('stage')!r}")
    for key in zero:
        if key in _REFUSED_ZERO:
            raise ConfigError(f"{where}.{key}`: {_REFUSED_ZERO[key]}")
        if key not in _ZERO_KEYS:
            near = difflib.get_close_matches(key, _ZERO_KEYS, n=1)
            raise ConfigError(f"{where}.{key}` is unknown{f'; did you mean `{near[0]}`?' if near else ''}")
    if zero.get("compute_grad_norm") is False:
        raise ConfigError(f"{where}.compute_grad_norm` false would let a bad gradient into the weights: remove it")
    _check_offload(zero["stage"], zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}, where)


def _check_offload(stage: int, optimizer: dict[str, Any], parameters: dict[str, Any], where: str) -> None:
    if optimizer.get("device", "none") not in ("none", "cpu", "nvme"):
        raise ConfigError(f"{where}.offload_optimizer.device` must be none, cpu or nvme, not {optimizer['device']!r}")
    if parameters.get("device", "none") not in ("none", "cpu"):
        raise ConfigError(
            f"{where}.offload_param.device` must be none or cpu, not {parameters['device']!r}: only optimizer states "
            "can be on NVMe"
        )
    if optimizer.get("super_offload"):
        raise ConfigError(f"{where}.offload_optimizer.super_offload` is not supported")
    if optimizer.get("ratio", 1.0) != 1.0:
        raise ConfigError(
            f"{where}.offload_optimizer.ratio` must be 1: below it DeepSpeed 0.19.8 loses the other half's state"
        )
    if parameters.get("device", "none") != "none" and stage != 3:
        raise ConfigError(f"{where}.offload_param` needs stage 3")
    if optimizer.get("device") != "nvme":
        return
    if stage != 3:
        raise ConfigError(f"{where}.offload_optimizer.device` nvme needs stage 3")
    # Master, gradient and two moments of the sub-group at work, of the one being read, of the one being written.
    needed = 4 * (1 + bool(optimizer.get("pipeline_read")) + bool(optimizer.get("pipeline_write")))
    count = optimizer.get("buffer_count", 4)
    if not isinstance(count, int) or count < needed:
        raise ConfigError(f"{where}.offload_optimizer.buffer_count` must be at least {needed} here, not {count!r}")


def _check_aio(aio: dict[str, Any], name: str) -> None:
    """DeepSpeed does not notice when the disk refuses a read or write, so nothing it would refuse may be asked."""
    for key, value in aio.items():
        where = f"{name}: `aio.{key}`"
        if key not in _AIO_KEYS:
            near = difflib.get_close_matches(key, _AIO_KEYS, n=1)
            raise ConfigError(f"{where} is unknown{f'; did you mean `{near[0]}`?' if near else ''}")
        if key in ("single_submit", "overlap_events", "use_gds"):
            if not isinstance(value, bool):
                raise ConfigError(f"{where} is true or false, not {value!r}")
        elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{where} must be a positive integer, not {value!r}")
    if aio.get("block_size", 4096) % 4096:
        raise ConfigError(f"{name}: `aio.block_size` must be a multiple of 4096, not {aio['block_size']}")
    if aio.get("use_gds"):
        raise ConfigError(f"{name}: `aio.use_gds` is not supported: optimizer states go through host memory")


def _check_optimizer(section: Any, config: RunConfig, name: str) -> None:
    """An ``optimizer`` block is allowed where it repeats the run file; it configures nothing."""
    if section is None:
        return
    if section.get("type") not in ("Adam", "AdamW"):
        raise ConfigError(f"{name}: `optimizer.type` must be AdamW, not {section.get('type')!r}; or remove the block")
    ours = {
        "lr": config.optimizer.learning_rate,
        "betas": list(config.optimizer.betas),
        "eps": config.optimizer.eps,
        "weight_decay": config.optimizer.weight_decay,
    }
    for key, value in section.get("params", {}).items():
        if key not in ours or value not in ("auto", ours[key]):
            raise ConfigError(f'{name}: `optimizer.params.{key}` belongs to the run file: write "auto" or remove it')


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
