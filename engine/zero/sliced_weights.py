"""Starting weights, put where ZeRO keeps them: each rank reads its own ranges of the files, and nothing else.

A slice of ZeRO is a contiguous range of a parameter's elements, and so of a file's bytes. Parameters
are therefore given to DeepSpeed without values, and the fp32 masters are filled from the files
afterwards: no rank ever holds the model, no byte is read twice, and fp32 weights lose nothing.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, free_param
from torch import nn

from engine.errors import ConfigError
from engine.model.buffers import persistent_buffers
from engine.model.starting_weights import StartingWeights, exchange_parameters
from engine.ranks.agreement import agree, all_gather_json, this_rank
from engine.tensor_files.slices import LiveSlice
from engine.zero.zero_state import clear_padding, frozen_to_fill, live_state, refresh_weights


def place_parameters(model: nn.Module, ds_config: Mapping[str, Any]) -> None:
    """Exchange every parameter of `model` for one without values, in the type and on the device it is trained on.

    Under ZeRO-3 they keep their shape but take no memory, until `partition` gives each rank its
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


def partition(model: nn.Module, ds_config: Mapping[str, Any]) -> None:
    """Make ZeRO-3 parameters of what `place_parameters` left: each rank gets its share, zeros. All ranks call it."""
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


def fill_engine(
    engine: Any, parameters: Mapping[str, nn.Parameter], weights: StartingWeights, say: Callable[[str], None]
) -> int:
    """Put the starting weights into the fp32 masters, frozen parameters and buffers of `engine`. All ranks call it.

    Returns the bytes that this rank read of `weights.num_bytes`.

    If a rank cannot read what it needs, all raise the same DataError. `say` gets one line on how
    much all ranks read in what time.
    """
    started = time.perf_counter()
    clear_padding(engine)
    buffers = {n: b for n, b in persistent_buffers(engine.module.model).items() if n in weights.stored}
    flat = {name: buffer.detach().clone().view(-1) for name, buffer in buffers.items()}

    def read() -> list[int]:
        pieces = [*live_state(engine, parameters, "master"), *frozen_to_fill(engine, parameters)]
        whole = [LiveSlice(name, 0, len(values), values) for name, values in flat.items()]
        return [weights.read_into([*pieces, *whole]) + weights.check_copies(pieces)]

    (num_bytes,) = agree(read)
    for name, buffer in buffers.items():
        buffer.copy_(flat[name].view(buffer.shape))
    refresh_weights(engine)
    total = sum(all_gather_json(num_bytes))
    if total and this_rank() == 0:
        seconds = time.perf_counter() - started
        say(
            f"weights: read {num_bytes / 1e9:.2f} GB of {weights.num_bytes / 1e9:.2f} GB on this rank, "
            f"{total / 1e9:.2f} GB on all, in {seconds:.1f} s ({total / 1e9 / seconds:.2f} GB/s)"
        )
    return num_bytes
