"""The faults of a DeepSpeed JSON, all of them: keys that 0.19.8 rejects or gets wrong, and values that contradict.

Every fault is a text that begins with the dotted key and ends with what to write. Imports no torch.
"""

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from engine.arithmetic import StepBatch
from engine.config import RunConfig
from engine.zero.ds_auto import optimizer_values

#: Top-level keys that pass through, besides the ones the run file owns.
PASS_THROUGH = frozenset(
    "bf16 fp16 data_types communication_data_type zero_optimization zero_allow_untested_optimizer "
    "zero_force_ds_cpu_optimizer torch_autocast bf16_master_weights_and_grads prescale_gradients "
    "gradient_predivide_factor comms_logger flops_profiler wall_clock_breakdown memory_breakdown dump_state "
    "disable_python_gc log_level steps_per_print timers seq_parallel_communication_data_type aio".split()
)
_OWNED = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
_REFUSED = {
    "activation_checkpointing": "Hugging Face models ignore this block: set model.activation_checkpointing",
    "tensorboard": "fulltune writes TensorBoard itself: set log.tensorboard",
    "csv_monitor": "the run folder's metrics.jsonl holds these figures",
    "wandb": "not supported; the run folder's metrics.jsonl holds these figures",
    "comet": "not supported; the run folder's metrics.jsonl holds these figures",
    "checkpoint": "checkpoints are fulltune's own: set the run file's checkpoint section",
    "compile": "DeepCompile does not work with unmanaged accumulation: remove it",
    "tensor_parallel": "tensor parallel training is not supported: remove it",
    "zenflow": "ZenFlow changes the optimization trajectory: remove it",
    "autotuning": "not supported: set batch.micro_rows in the run file, and remove it",
    "elasticity": "removed in DeepSpeed 0.19.8; any number of ranks resumes any fulltune checkpoint",
    "data_efficiency": "the order of data is fulltune's, a function of (seed, step)",
    **dict.fromkeys(
        "nebula amp compression_training quantize_training sparse_gradients eigenvalue sparse_attention "
        "graph_harvesting curriculum_learning progressive_layer_drop".split(),
        "removed in DeepSpeed 0.19.8: remove it",
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
    "mics_shard_size": "removed in DeepSpeed 0.19.8: remove it",
    "mics_hierarchical_params_gather": "removed in DeepSpeed 0.19.8: remove it",
    "zeropp_loco_param": "removed in DeepSpeed 0.19.8: remove it",
    "zenflow": "ZenFlow changes the optimization trajectory: remove it",
    "elastic_checkpoint": "any number of ranks resumes any fulltune checkpoint: remove it",
    "cpu_offload": "deprecated: write offload_optimizer: {device: cpu}",
    "cpu_offload_params": "deprecated: write offload_param: {device: cpu}",
    "cpu_offload_use_pin_memory": "deprecated: write offload_optimizer: {device: cpu, pin_memory: true}",
    "stage3_gather_fp16_weights_on_model_save": "deprecated: write stage3_gather_16bit_weights_on_model_save",
}
_OFFLOAD_KEYS = {
    "offload_optimizer": "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio "
    "super_offload cpuadam_cores_perc".split(),
    "offload_param": "device nvme_path buffer_count buffer_size max_in_cpu pin_memory".split(),
}
#: Parameters of an optimizer block that are true of fulltune's AdamW as it is.
_HARMLESS = {"torch_adam": (True, False), "adam_w_mode": (True,), "bias_correction": (True,), "amsgrad": (False,)}


def find_faults(given: Mapping[str, Any], config: RunConfig, world_size: int) -> list[str]:
    """Every fault of a JSON whose ``"auto"`` values are filled in."""
    zero = given.get("zero_optimization", {})
    return [
        *_top_level(given),
        *_shapes(given),
        *_owned(given, config, world_size),
        *(_zero(zero) if isinstance(zero, dict) else ()),
        *_aio(section_of(given, "aio")),
        *_precision(section_of(given, "bf16"), section_of(given, "fp16")),
        *_optimizer(given.get("optimizer"), config),
    ]


def section_of(given: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A section; empty where there is none, or something else."""
    value = given.get(key)
    return value if isinstance(value, dict) else {}


def _near(key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


def _top_level(given: Mapping[str, Any]) -> Iterator[str]:
    known = PASS_THROUGH | {*_OWNED, "optimizer", "managed_gradient_accumulation", "scheduler"}
    for key in given:
        if key in _REFUSED:
            yield f"`{key}`: {_REFUSED[key]}"
        elif key not in known:
            near = _near(key, known)
            where = "" if near or key not in _ZERO_KEYS else "; it belongs to `zero_optimization`"
            yield f"unknown key `{key}`{near or where or ': remove it'}"
    if given.get("managed_gradient_accumulation"):
        yield "`managed_gradient_accumulation` loses gradients under offload in 0.19.8: remove it"


def _shapes(given: Mapping[str, Any]) -> Iterator[str]:
    """Sections are objects."""
    for key in ("bf16", "fp16", "zero_optimization", "data_types", "optimizer", "aio"):
        if key in given and not isinstance(given[key], dict):
            yield f"`{key}` is a section such as {{...}}, not {given[key]!r}"
    for key in _OFFLOAD_KEYS:
        value = section_of(given, "zero_optimization").get(key)
        if value is not None and not isinstance(value, dict):
            yield f"`zero_optimization.{key}` is a section such as {{...}}, not {value!r}"


def _precision(bf16: dict[str, Any], fp16: dict[str, Any]) -> Iterator[str]:
    for name, section in (("bf16", bf16), ("fp16", fp16)):
        if not isinstance(section.get("enabled", False), bool):
            yield f'`{name}.enabled` is true, false or "auto", not {section["enabled"]!r}'
    if bf16.get("check_grad_overflow") is False:
        yield "`bf16.check_grad_overflow` false would let a bad gradient into the weights: remove it"
    if fp16.get("enabled") is True:
        yield "`fp16.enabled`: loss scaling is not supported; use bf16, as in bf16: {enabled: true}"


def _owned(given: Mapping[str, Any], config: RunConfig, world_size: int) -> Iterator[str]:
    """Values that contradict the run file's. A JSON speaks of the whole job, as its user sees it."""
    batch = StepBatch(config.global_rows, world_size, config.batch.known_micro_rows, config.batch.micro_tokens)
    accepted: Mapping[str, tuple[float, ...]] = {
        "train_batch_size": (config.global_rows,),
        "train_micro_batch_size_per_gpu": (config.batch.known_micro_rows,),
        "gradient_accumulation_steps": (batch.num_micro_batches, 1),  # 1 is what DeepSpeed gets
        "gradient_clipping": (config.optimizer.gradient_clipping,),
    }
    for key, values in accepted.items():
        if given.get(key, values[0]) not in values:
            belongs = "optimizer.gradient_clipping" if key == "gradient_clipping" else "the run file's batch section"
            yield (
                f"`{key}` is {given[key]!r}, but it belongs to {belongs}, which makes it {values[0]} here: "
                'write "auto" or remove it'
            )


def _zero(zero: dict[str, Any]) -> Iterator[str]:
    where = "`zero_optimization"
    if zero.get("stage") not in (2, 3):
        yield f"{where}.stage` must be 2 or 3, not {zero.get('stage')!r}"
    for key in zero:
        if key in _REFUSED_ZERO:
            yield f"{where}.{key}`: {_REFUSED_ZERO[key]}"
        elif key not in _ZERO_KEYS:
            yield f"{where}.{key}` is unknown{_near(key, _ZERO_KEYS) or ': remove it'}"
    if zero.get("compute_grad_norm") is False:
        yield f"{where}.compute_grad_norm` false would let a bad gradient into the weights: remove it"
    for name, keys in _OFFLOAD_KEYS.items():
        for key in section_of(zero, name):
            if key not in keys:
                yield f"{where}.{name}.{key}` is unknown{_near(key, keys) or ': remove it'}"
    optimizer, parameters = section_of(zero, "offload_optimizer"), section_of(zero, "offload_param")
    yield from (f"{where}.{text}" for text in _offload(zero.get("stage"), optimizer, parameters))


def _offload(stage: Any, optimizer: dict[str, Any], parameters: dict[str, Any]) -> Iterator[str]:
    if optimizer.get("device", "none") not in ("none", "cpu", "nvme"):
        yield f"offload_optimizer.device` must be none, cpu or nvme, not {optimizer['device']!r}"
    if parameters.get("device", "none") not in ("none", "cpu"):
        yield (
            f"offload_param.device` must be none or cpu, not {parameters['device']!r}: only optimizer states can be "
            "on NVMe"
        )
    if optimizer.get("super_offload"):
        yield "offload_optimizer.super_offload` is not supported: remove it"
    if optimizer.get("ratio", 1.0) != 1.0:
        yield "offload_optimizer.ratio` must be 1: below it DeepSpeed 0.19.8 loses the other half's state"
    if parameters.get("device", "none") != "none" and stage != 3:
        yield "offload_param` needs stage 3"
    if optimizer.get("device") != "nvme":
        return
    if stage != 3:
        yield "offload_optimizer.device` nvme needs stage 3"
    # Master, gradient and two moments of the sub-group at work, of the one being read, of the one being written.
    needed = 4 * (1 + bool(optimizer.get("pipeline_read")) + bool(optimizer.get("pipeline_write")))
    count = optimizer.get("buffer_count", 4)
    if not isinstance(count, int) or count < needed:
        yield f"offload_optimizer.buffer_count` must be at least {needed} here, not {count!r}"


def _aio(aio: dict[str, Any]) -> Iterator[str]:
    """DeepSpeed does not notice when the disk refuses a read or write, so nothing it would refuse may be asked."""
    for key, value in aio.items():
        where = f"`aio.{key}`"
        if key not in _AIO_KEYS:
            yield f"{where} is unknown{_near(key, _AIO_KEYS)}"
        elif key in ("single_submit", "overlap_events", "use_gds"):
            if not isinstance(value, bool):
                yield f"{where} is true or false, not {value!r}"
        elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"{where} must be a positive integer, not {value!r}"
        elif key == "block_size" and value % 4096:
            yield f"{where} must be a multiple of 4096, not {value}"
    if aio.get("use_gds") is True:
        yield "`aio.use_gds` is not supported: optimizer states go through host memory"


def _optimizer(section: Any, config: RunConfig) -> Iterator[str]:
    """An ``optimizer`` block is allowed where it repeats the run file; it configures nothing."""
    if not isinstance(section, dict):
        return
    if section.get("type", "AdamW") not in ("Adam", "AdamW"):
        yield f"`optimizer.type` must be AdamW, not {section['type']!r}; or remove the block"
    ours, names = optimizer_values(config), {"lr": "learning_rate"}
    for key, value in section_of(section, "params").items():
        where = f"`optimizer.params.{key}`"
        if key in ours and value != ours[key]:
            theirs = f"where optimizer.{names.get(key, key)} is {ours[key]}, not {value!r}"
            yield f'{where} belongs to the run file, {theirs}: write "auto" or remove it'
        elif key not in ours and value not in _HARMLESS.get(key, ()):
            yield f"{where} {value!r} is not what is trained with, torch's or DeepSpeed's AdamW: remove it"
