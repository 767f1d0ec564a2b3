"""A model is handed to DeepSpeed, and its starting weights are put where ZeRO keeps them.

Each rank reads its own ranges of the files, and nothing else.

A slice of ZeRO is a contiguous range of a parameter's elements, and so of a file's bytes. Parameters
are therefore given to DeepSpeed without values, and the fp32 masters are filled from the files
afterwards: no rank ever holds the model, no byte is read twice, and fp32 weights lose nothing.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, free_param
from torch import nn

from engine.config import RunConfig
from engine.errors import ConfigError
from engine.model.build import decay_groups
from engine.model.starting_weights import StartingWeights, exchange_parameters
from engine.model.task_model import TaskModel
from engine.ranks.agreement import agree, all_gather_json, this_rank
from engine.tasks.task import LossOptions, Task
from engine.tensor_files.slices import LiveSlice
from engine.zero.ds_config import offloads_optimizer
from engine.zero.zero_model import ZeroModel


def wrap(
    model: nn.Module,
    task: Task,
    config: RunConfig,
    ds_config: dict[str, Any],
    label_numbers: Sequence[int] | None = None,
    options: LossOptions | None = None,
) -> ZeroModel:
    """Hand `model` with the loss of `task` to DeepSpeed; all ranks call it.

    `label_numbers` and `options`: as `TaskModel` takes them.

    What comes back has no weights until `fill` has put them there or a checkpoint was installed.
    """
    _place_parameters(model, ds_config)
    parameters = dict(model.named_parameters())
    groups = decay_groups(model, config.optimizer.weight_decay, config.optimizer.layer_decay)
    task_model = TaskModel(model, task, label_numbers, options)
    if ds_config["zero_optimization"]["stage"] == 3:
        _partition(task_model, ds_config)
    section = config.optimizer
    numbers: dict[str, Any] = {"lr": section.learning_rate, "betas": section.betas, "eps": section.eps}
    optimizer: Any
    if offloads_optimizer(ds_config):
        optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **numbers)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **numbers)
    engine, *_ = deepspeed.initialize(model=task_model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    zero = ZeroModel(engine, parameters)
    zero.begin_swapping()
    return zero


def _place_parameters(model: nn.Module, ds_config: Mapping[str, Any]) -> None:
    """Exchange every parameter of `model` for one without values, in the type and on the device it is trained on.

    Under ZeRO-3 they keep their shape but take no memory, until `_partition` gives each rank its
    share; otherwise they are whole. Buffers move to the device with their values. Tied parameters
    stay tied. The model may be on the meta device, its buffers not.
    """
    device = get_accelerator().current_device_name()
    dtype = torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float32
    whole = ds_config["zero_optimization"]["stage"] != 3

    def exchange(parameter: nn.Parameter) -> nn.Parameter:
        values = torch.zeros(parameter.shape if whole else 1, dtype=dtype, device=device)
        new = nn.Parameter(values if whole else values.expand(parameter.shape), parameter.requires_grad)
        new.__dict__.update(parameter.__dict__)
        return new

    exchange_parameters(model, exchange)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            # Without bf16 everything is fp32, as `model.float()` makes it.
            wide = buffer.is_floating_point() and dtype == torch.float32
            module._buffers[name] = buffer.to(device, torch.float32 if wide else buffer.dtype)


def _partition(model: nn.Module, ds_config: Mapping[str, Any]) -> None:
    """Make ZeRO-3 parameters of what `_place_parameters` left: each rank gets its share, zeros. All ranks call it."""
    _EmptyInit(module=model, config_dict_or_path=ds_config)


class _EmptyInit(deepspeed.zero.Init):  # type: ignore[misc]
    """ZeRO-3's partitioning without the whole tensor and the broadcast: the values come later.

    Written against DeepSpeed 0.19.8; tests gather what was filled and compare it with the files.
    """

    def _zero_init_param(self, param: Any) -> None:
        if self.param_swapper is not None:
            raise ConfigError("zero_optimization.offload_param.device: weights can be in cpu or none, not nvme")
        if self.quantized_nontrainable_weights and not param.requires_grad:
            raise ConfigError("zero_optimization.zero_quantized_nontrainable_weights: not supported")
        self._convert_to_deepspeed_param(param)
        param.ds_numel_aligned = self._aligned_size(param)
        share = param.ds_numel_aligned // self._partition_world_size(param)
        on_host = self.remote_device == OffloadDeviceEnum.cpu and not param.ds_persist
        values = torch.zeros(share, dtype=param.dtype, device="cpu" if on_host else self.local_device)
        if on_host and self.pin_memory:
            values = get_accelerator().pin_memory(values)
        param.ds_tensor = values
        param.ds_tensor.ds_numel = share
        param.ds_tensor.status = PartitionedParamStatus.AVAILABLE
        param.ds_tensor.final_location = None
        free_param(param)


def fill(zero: ZeroModel, weights: StartingWeights, say: Callable[[str], None] = print) -> int:
    """Put the starting weights into the fp32 masters, frozen parameters and buffers. All ranks call it.

    Returns the bytes that this rank read. If a rank cannot read what it needs, all raise the same
    DataError. `say` gets one line on how much all ranks read in what time.
    """
    started = time.perf_counter()
    zero.clear_padding()
    zero.keep_wide({name: weights.type_of(name) for name in zero.frozen})
    buffers = {name: buffer for name, buffer in zero.buffers.items() if name in weights.stored}
    flat = {name: buffer.detach().clone().view(-1) for name, buffer in buffers.items()}

    def read() -> int:
        slices = [*zero.live_state("master"), *zero.frozen_to_fill()]
        whole = [LiveSlice(name, 0, len(values), values) for name, values in flat.items()]
        return weights.read_into([*slices, *whole]) + weights.check_copies(slices)

    num_bytes = agree(read)
    for name, buffer in buffers.items():
        buffer.copy_(flat[name].view(buffer.shape))
    zero.refresh_weights()
    total = sum(all_gather_json(num_bytes))
    if total and this_rank() == 0:
        seconds = time.perf_counter() - started
        say(
            f"weights: read {num_bytes / 1e9:.2f} GB of {weights.num_bytes / 1e9:.2f} GB on this rank, "
            f"{total / 1e9:.2f} GB on all, in {seconds:.1f} s ({total / 1e9 / seconds:.2f} GB/s)"
        )
    return num_bytes
