"""``fulltune train --dry-run``: everything the run would do, printed; nothing is written or started."""

import json
import shlex
from dataclasses import dataclass
from typing import Any

from data_prep.token_store import StoreError, TokenStore, open_rows, resolve_store
from engine.arithmetic import STATE_BYTES_PER_PARAMETER, StepBatch, total_steps
from engine.config import RunConfig
from engine.zero.ds_config import ds_config_notes, nvme_path, resolve_ds_config
from launcher.job.job import Job
from launcher.job.run_config import Run
from launcher.start.weights import Weights, count_weights

_GIB = 2.0**30
_PROCESS_GIB = 0.4


def describe_plan(run: Run, job: Job) -> str:
    """The plan of `job` in a few paragraphs. Raises what the run itself would raise on its configuration."""
    ds_config = resolve_ds_config(run.config, job.num_ranks)
    parts = [
        *_batch_lines(run.config, job.num_ranks),
        *_duration_lines(run),
        *(rule for find in (memory_rule, swap_rule) if (rule := find(run.config, job, ds_config))),
        *ds_config_notes(run.config, job.num_ranks),
        "",
        f"DeepSpeed configuration ({run.config.deepspeed}, resolved):",
        json.dumps(ds_config, indent=2),
        "",
        *_node_lines(job),
        "",
        "command:",
        "  " + " ".join(f"{key}={shlex.quote(value)}" for key, value in sorted(job.environment.items())) + " \\",
        f"  {shlex.join(job.command)}",
        f"  ({job.run_file} is {run.source} resolved; written when the run starts)",
    ]
    return "\n".join(parts)


def _batch_lines(config: RunConfig, num_ranks: int) -> list[str]:
    batch = StepBatch(config.global_rows, num_ranks, config.batch.known_micro_rows, config.batch.micro_tokens)
    lines = [f"batch: a step takes {batch.text}, up to {config.global_rows * config.data.row_tokens:,} tokens"]
    if config.batch.micro_rows == "auto":
        share = -(-config.global_rows // num_ranks)
        lines[0] = (
            f"batch: a step takes {config.global_rows} rows over {num_ranks} ranks, in micro-batches of as many rows "
            f"as fit, up to {share} (batch.micro_rows: auto)"
        )
    elif batch.uneven_text:
        lines.append(f"  uneven: {batch.uneven_text}. Correct, but a multiple wastes nothing.")
    return lines


def _duration_lines(run: Run) -> list[str]:
    config = run.config
    try:
        folder = resolve_store(config.data.store_dir, "train", run.values["data"], config.task)
        rows = None if folder is None else open_rows(TokenStore.open(folder), config.data.row_tokens).epoch_rows
    except StoreError as error:
        length = f"{config.duration.steps} steps" if config.duration.steps else f"{config.duration.epochs:g} epochs"
        return [f"duration: {length}; the token store is prepared first ({str(error).partition(';')[0]})"]
    if rows is None:
        return [f"data: {config.data.store_dir} has no train split"]
    steps = total_steps(config.duration.steps, config.duration.epochs, rows, config.global_rows)
    epochs = config.duration.epochs or steps * config.global_rows / rows
    return [f"duration: {steps} steps = {epochs:.3g} epochs of {rows:,} rows of {config.data.row_tokens} tokens"]


def swap_rule(config: RunConfig, job: Job, ds_config: dict[str, Any]) -> str:
    """Room that optimizer states need on NVMe of the fullest node; "" where they are elsewhere."""
    swap_dir, weights = nvme_path(ds_config), count_weights(config.model)
    if swap_dir is None or weights is None:
        return ""
    ranks = max(len(node.slots) for node in job.nodes)
    share = weights.trained * STATE_BYTES_PER_PARAMETER * ranks / job.num_ranks / _GIB
    return f"optimizer states: about {share:.1f} GiB a node in {swap_dir}, removed at the end"


@dataclass(frozen=True)
class HostMemory:
    """Memory that the fullest node needs by the measured rule for full CPU offload."""

    weights: Weights
    bytes_each: int
    ranks: int
    num_ranks: int

    @property
    def bytes(self) -> float:
        """Of all the node's ranks."""
        of_all = self.weights.trained * self.bytes_each + self.weights.frozen_bytes
        return of_all * self.ranks / self.num_ranks + self.ranks * _PROCESS_GIB * _GIB

    @property
    def sum_text(self) -> str:
        """The formula, for messages."""
        share = f"{self.ranks}/{self.num_ranks} ranks"
        of_trained = f"{self.weights.trained:,} parameters x {self.bytes_each} bytes"
        if self.weights.frozen:
            frozen = f"{self.weights.frozen_bytes / _GIB:.1f} GiB frozen"
            return f"({of_trained} + {frozen}) x {share} + {_PROCESS_GIB} GiB a process"
        return f"{of_trained} x {share} + {_PROCESS_GIB} GiB a process"


def host_memory(config: RunConfig, job: Job, ds_config: dict[str, Any]) -> HostMemory | None:
    """The memory rule applied to a job; None where it does not apply, or the model's size is not known yet."""
    zero = ds_config["zero_optimization"]
    offloads = [(zero.get(key) or {}).get("device") for key in ("offload_optimizer", "offload_param")]
    weights = count_weights(config.model)
    if offloads != ["cpu", "cpu"] or weights is None:
        return None
    accumulates_fp32 = ds_config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    ranks = max(len(node.slots) for node in job.nodes)
    return HostMemory(weights, 22 if accumulates_fp32 else 20, ranks, job.num_ranks)


def memory_rule(config: RunConfig, job: Job, ds_config: dict[str, Any]) -> str:
    """`host_memory` as one line; "" where there is none."""
    need = host_memory(config, job, ds_config)
    return "" if need is None else f"host memory: about {need.bytes / _GIB:.1f} GiB a node ({need.sum_text})"


def _node_lines(job: Job) -> list[str]:
    kind = "CPU ranks" if job.environment.get("DS_ACCELERATOR") == "cpu" else "GPUs"
    lines = [f"nodes: {len(job.nodes)}, ranks: {job.num_ranks} ({kind})"]
    first = 0
    for node in job.nodes:
        last = first + len(node.slots) - 1
        ranks = f"rank {first}" if last == first else f"ranks {first}-{last}"
        slots = ",".join(map(str, node.slots))
        lines.append(f"  {node.name}: {ranks} on slots {slots}: python -m engine {job.run_file}")
        first = last + 1
    return lines
