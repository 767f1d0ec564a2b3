"""Where DeepSpeed keeps the training state: the only module that touches its private attributes.

Written against DeepSpeed 0.19.8. A rank's state is a few flat fp32 buffers of masters (one for each
sub-group of ZeRO-3, one for each parameter group of ZeRO-1 and 2) with the optimizer's moments
beside them. ZeRO-3 gives every rank an equal share of every parameter; ZeRO-1 and 2 cut the whole
group's concatenation, so a rank owns many parameters whole and its first and last in part. Either
way it is a list of slices: elements [start, stop) of a flattened parameter at an offset of a buffer.
Buffers that are on NVMe between two updates are the matter of `engine.zero.nvme_state`.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from engine.errors import ConfigError
from engine.ranks.agreement import agree
from engine.tensor_files.slices import Kind, LiveSlice, Slice
from engine.zero import nvme_state


def owned_slices(engine: Any, parameters: Mapping[str, Parameter]) -> list[Slice]:
    """The slices of the trainable parameters whose state this rank owns, without padding.

    Needs no communication. Over all ranks they cover each trainable element exactly once.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    locate = _zero3_slices if _is_zero3(engine) else _zero2_slices
    slices = list(locate(_zero_optimizer(engine), names))
    return [piece for piece in slices if piece.start < piece.stop]


def live_state(engine: Any, parameters: Mapping[str, Parameter], kind: Kind) -> list[LiveSlice]:
    """This rank's masters or one kind of moments, fp32, on the device where DeepSpeed keeps them. No communication.

    The moments exist after the first step or `create_optimizer_state`. Between two updates nothing
    here changes, also during forward and backward.
    """
    pieces = owned_slices(engine, parameters)
    buffers = {index: _buffer_values(engine, index, kind) for index in {piece.buffer for piece in pieces}}
    return [LiveSlice(piece.name, piece.start, piece.stop, _within(buffers[piece.buffer], piece)) for piece in pieces]


def state_view(engine: Any, piece: Slice, kind: Kind) -> Tensor:
    """The live fp32 values behind `piece`, 1-D, on the device where DeepSpeed keeps them."""
    return _within(_buffer_values(engine, piece.buffer, kind), piece)


def _within(values: Tensor, piece: Slice) -> Tensor:
    return values.narrow(0, piece.offset, piece.stop - piece.start)


def _buffer_values(engine: Any, index: int, kind: Kind) -> Tensor:
    optimizer = _zero_optimizer(engine)
    if nvme_state.is_swapped(optimizer, index):
        return nvme_state.mapped_state(optimizer, index, kind)
    buffer = _master_buffers(engine)[index]
    values: Tensor = buffer.data if kind == "master" else optimizer.optimizer.state[buffer][kind]
    return values


def live_frozen(engine: Any, parameters: Mapping[str, Parameter]) -> list[LiveSlice]:
    """This rank's share of the frozen parameters in the type they are computed with. No communication.

    Under ZeRO-3 what it holds; otherwise every rank holds all, and the shares are equal parts to
    save; `frozen_to_fill` gives all of them.
    """
    return list(_frozen_slices(engine, parameters, _is_zero3(engine)))


def frozen_to_fill(engine: Any, parameters: Mapping[str, Parameter]) -> list[LiveSlice]:
    """All values of frozen parameters that this rank holds, to be filled; `refresh_weights` must follow."""
    return list(_frozen_slices(engine, parameters, True))


def _frozen_slices(engine: Any, parameters: Mapping[str, Parameter], everything_here: bool) -> Iterator[LiveSlice]:
    frozen: dict[str, Any] = dict(frozen_parameters(parameters))
    for name, parameter in frozen.items():
        if _is_zero3(engine):
            start, stop = _zero3_range(parameter)
            values = parameter.ds_tensor.data.view(-1)[: stop - start]
        else:
            values = parameter.data.view(-1)
            start, stop = (0, len(values)) if everything_here else _equal_share(len(values))
            values = values[start:stop]
        if start < stop:
            yield LiveSlice(name, start, stop, values)


def _equal_share(count: int) -> tuple[int, int]:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return count * rank // world_size, count * (rank + 1) // world_size


def clear_padding(engine: Any) -> None:
    """Zero the masters, whose padding is otherwise whatever the memory held: all ranks, before they fill them."""
    for buffer in _master_buffers(engine):
        buffer.data.zero_()
    if nvme_state.swaps(engine.optimizer):
        agree(partial(nvme_state.clear_masters, engine.optimizer))


def refresh_weights(engine: Any) -> None:
    """Round the masters into the weights that the model computes with. All ranks call it together."""
    optimizer = _zero_optimizer(engine)
    if not _is_zero3(engine):
        optimizer.update_lp_params()
        return
    if nvme_state.swaps(optimizer):
        agree(partial(nvme_state.flush, optimizer))
    optimizer.checkpoint_event_prologue()
    for sub_group in range(len(optimizer.fp16_groups)):
        with nvme_state.master_at_hand(optimizer, sub_group):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
    # Small parameters stay gathered between steps: gather them again from the new partitions.
    optimizer.checkpoint_event_epilogue()


def begin_swapping(engine: Any) -> None:
    """Prepare a fresh engine for training if its optimizer states are on NVMe. All ranks call it together."""
    if nvme_state.swaps(engine.optimizer):
        nvme_state.keep_gradients_in_memory(engine.optimizer)
        create_optimizer_state(engine, 0)


def optimizer_steps(engine: Any) -> int:
    """Updates that the optimizer has applied; steps that DeepSpeed skipped do not count."""
    optimizer = _zero_optimizer(engine).optimizer
    steps = {int(optimizer.state.get(buffer, {}).get("step", 0)) for buffer in _master_buffers(engine)}
    if len(steps) != 1:
        raise RuntimeError(f"the optimizer's buffers disagree about their steps: {sorted(steps)}")
    return steps.pop()


def create_optimizer_state(engine: Any, steps: int) -> None:
    """Give every buffer zero moments and a count of `steps`, as if the optimizer had run that often. On all ranks."""
    zero_optimizer = _zero_optimizer(engine)
    optimizer = zero_optimizer.optimizer
    on_cpu = _is_cpu_adam(optimizer)
    for index, buffer in enumerate(_master_buffers(engine)):
        state = optimizer.state[buffer]
        state["step"] = steps if on_cpu else torch.tensor(float(steps), device=_step_device(optimizer, buffer))
        if nvme_state.is_swapped(zero_optimizer, index):
            continue
        state["exp_avg"] = torch.zeros_like(buffer.data)
        state["exp_avg_sq"] = torch.zeros_like(buffer.data)
    if nvme_state.swaps(zero_optimizer):
        agree(partial(nvme_state.create_moments, zero_optimizer))
    if on_cpu:
        _replay_beta_powers(optimizer, steps)


def _step_device(optimizer: Any, buffer: Tensor) -> torch.device:
    group = optimizer.param_groups[0]
    return buffer.device if group.get("fused") or group.get("capturable") else torch.device("cpu")


def _replay_beta_powers(optimizer: Any, steps: int) -> None:
    """Bring DeepSpeedCPUAdam's running products beta^t to where `steps` updates leave them.

    The C++ object multiplies once a step, but takes pow() when it first sees a later step, and the
    two differ in the last bit. Groups with different betas make it take pow() at every step anyway.
    """
    betas = {tuple(group["betas"]) for group in optimizer.param_groups}
    if len(betas) != 1:
        return
    beta1, beta2 = betas.pop()
    one = [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, beta1, beta2, 1e-8, 0.0, True, *one)


def frozen_parameters(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Those that are not trained."""
    return {name: parameter for name, parameter in parameters.items() if not parameter.requires_grad}


def full_shape(parameter: Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also while ZeRO-3 has it partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _zero_optimizer(engine: Any) -> Any:
    """DeepSpeed's ZeRO optimizer, refused where its state is not plain fp32 buffers in memory."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_partitioned_groups_flat") and not hasattr(optimizer, "round_robin_bit16_offsets"):
        raise ConfigError("zero_optimization.stage: checkpoints need stage 2 or 3")
    if getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise ConfigError("zero_optimization.offload_param.device: checkpoints need cpu or none, not nvme")
    if optimizer.master_weights_and_grads_dtype != torch.float32:
        raise ConfigError("bf16.bf16_master_weights_and_grads: checkpoints need masters in fp32; turn it off")
    if not _is_cpu_adam(optimizer.optimizer) and not isinstance(optimizer.optimizer, torch.optim.AdamW):
        kind = type(optimizer.optimizer).__name__
        raise ConfigError(f"checkpoints need DeepSpeedCPUAdam or torch.optim.AdamW, not {kind}")
    return optimizer


def _is_cpu_adam(optimizer: Any) -> bool:
    return hasattr(optimizer, "ds_opt_adam")


def _is_zero3(engine: Any) -> bool:
    return hasattr(_zero_optimizer(engine), "fp32_partitioned_groups_flat")


def _master_buffers(engine: Any) -> list[Tensor]:
    optimizer = _zero_optimizer(engine)
    buffers: list[Tensor] = (
        optimizer.fp32_partitioned_groups_flat if _is_zero3(engine) else optimizer.single_partition_of_fp32_groups
    )
    return buffers


def _zero3_range(parameter: Any) -> tuple[int, int]:
    """The elements of a partitioned parameter that this rank holds: an equal share, cut at the end."""
    share = parameter.partition_numel()
    start = min(parameter.ds_numel, share * torch.distributed.get_rank(parameter.ds_process_group))
    return start, min(parameter.ds_numel, start + share)


def _zero3_slices(optimizer: Any, names: dict[int, str]) -> Iterator[Slice]:
    for parameters in optimizer.fp16_groups:
        for parameter in parameters:
            buffer, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, stop = _zero3_range(parameter)
            yield Slice(_name_of(parameter, names), start, stop, buffer, offset)


def _zero2_slices(optimizer: Any, names: dict[int, str]) -> Iterator[Slice]:
    """Cut by where parameters lie in the flat group, not by `_hp_mapping`, which ignores round-robin order."""
    for buffer, parameters in enumerate(optimizer.round_robin_bit16_groups):
        size = optimizer.single_partition_of_fp32_groups[buffer].numel()
        begin = size * torch.distributed.get_rank(optimizer.real_dp_process_group[buffer])
        for parameter, position in zip(parameters, optimizer.round_robin_bit16_offsets[buffer], strict=True):
            start = min(max(begin - position, 0), parameter.numel())
            stop = max(start, min(begin + size - position, parameter.numel()))
            yield Slice(_name_of(parameter, names), start, stop, buffer, position + start - begin)


def _name_of(parameter: Parameter, names: dict[int, str]) -> str:
    name = names.get(id(parameter))
    if name is None:
        raise RuntimeError(f"the optimizer trains a parameter of shape {full_shape(parameter)} that has no name")
    return name
