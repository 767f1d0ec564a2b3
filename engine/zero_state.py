"""Where DeepSpeed keeps the training state: the only module that touches its private attributes.

Written against DeepSpeed 0.19.8. A rank's state is a few flat fp32 buffers of masters (one for each
sub-group of ZeRO-3, one for each parameter group of ZeRO-1 and 2) with the optimizer's moments
beside them. ZeRO-3 gives every rank an equal share of every parameter; ZeRO-1 and 2 cut the whole
group's concatenation, so a rank owns many parameters whole and its first and last in part. Either
way it is a list of slices: elements [start, stop) of a flattened parameter at an offset of a buffer.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from engine.checkpoint_files import Kind
from engine.errors import ConfigError

ReadRange = Callable[[str, int, int], Tensor]


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of the flattened parameter `name`, at `offset` of this rank's buffer `buffer`."""

    name: str
    start: int
    stop: int
    buffer: int
    offset: int


def owned_slices(engine: Any, parameters: Mapping[str, Parameter]) -> list[Slice]:
    """The slices of the trainable parameters whose state this rank owns, without padding.

    Needs no communication. Over all ranks they cover each trainable element exactly once.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    locate = _zero3_slices if _is_zero3(engine) else _zero2_slices
    slices = list(locate(_zero_optimizer(engine), names))
    return [piece for piece in slices if piece.start < piece.stop]


def state_view(engine: Any, piece: Slice, kind: Kind) -> Tensor:
    """The live fp32 values behind `piece`, 1-D, on the device where DeepSpeed keeps them.

    The moments exist after the first step or `create_optimizer_state`.
    """
    buffer = _master_buffers(engine)[piece.buffer]
    values: Tensor = buffer.data if kind == "master" else _zero_optimizer(engine).optimizer.state[buffer][kind]
    return values.narrow(0, piece.offset, piece.stop - piece.start)


def copy_state(engine: Any, parameters: Mapping[str, Parameter], kind: Kind, source: ReadRange) -> None:
    """Overwrite one kind of state with `source(name, start, stop)` and zero its padding. No communication.

    After masters follow with `refresh_weights`, on all ranks.
    """
    for buffer in _master_buffers(engine):
        values = buffer.data if kind == "master" else _zero_optimizer(engine).optimizer.state[buffer][kind]
        values.zero_()
    for piece in owned_slices(engine, parameters):
        state_view(engine, piece, kind).copy_(source(piece.name, piece.start, piece.stop))


def refresh_weights(engine: Any) -> None:
    """Round the masters into the weights that the model computes with. All ranks call it together."""
    optimizer = _zero_optimizer(engine)
    if not _is_zero3(engine):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()
    for sub_group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
    # Small parameters stay gathered between steps: gather them again from the new partitions.
    optimizer.checkpoint_event_epilogue()


def fill_masters(engine: Any, parameters: Mapping[str, Parameter], source: ReadRange) -> None:
    """Set the masters to `source(name, start, stop)`, 1-D fp32, and the model's weights to their rounding.

    All ranks call it together; each asks `source` for its own ranges only.
    """
    copy_state(engine, parameters, "master", source)
    refresh_weights(engine)


def optimizer_steps(engine: Any) -> int:
    """Updates that the optimizer has applied; steps that DeepSpeed skipped do not count."""
    optimizer = _zero_optimizer(engine).optimizer
    steps = {int(optimizer.state.get(buffer, {}).get("step", 0)) for buffer in _master_buffers(engine)}
    if len(steps) != 1:
        raise RuntimeError(f"the optimizer's buffers disagree about their steps: {sorted(steps)}")
    return steps.pop()


def create_optimizer_state(engine: Any, steps: int) -> None:
    """Give every buffer zero moments and a count of `steps`, as if the optimizer had run that often."""
    optimizer = _zero_optimizer(engine).optimizer
    on_cpu = _is_cpu_adam(optimizer)
    for buffer in _master_buffers(engine):
        state = optimizer.state[buffer]
        state["step"] = steps if on_cpu else torch.tensor(float(steps), device=_step_device(optimizer, buffer))
        state["exp_avg"] = torch.zeros_like(buffer.data)
        state["exp_avg_sq"] = torch.zeros_like(buffer.data)
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


def frozen_values(engine: Any, parameters: Mapping[str, Parameter]) -> Iterator[Tensor]:
    """The frozen parameters, whole, one after the other. All ranks iterate to the end: each one is gathered."""
    import deepspeed

    zero3 = _is_zero3(engine)
    if zero3:
        _zero_optimizer(engine).checkpoint_event_prologue()
    for parameter in frozen_parameters(parameters).values():
        with deepspeed.zero.GatheredParameters([parameter], enabled=zero3):
            value = parameter.detach()
            value = value.clone() if zero3 else value
        yield value
    if zero3:
        _zero_optimizer(engine).checkpoint_event_epilogue()


def fill_frozen(engine: Any, parameters: Mapping[str, Parameter], source: ReadRange) -> None:
    """Overwrite this rank's share of the frozen parameters with `source(name, start, stop)`.

    No communication; follow with `refresh_weights`, on all ranks.
    """
    for name, parameter in frozen_parameters(parameters).items():
        start, stop = _zero3_range(parameter) if _is_zero3(engine) else (0, parameter.numel())
        here = getattr(parameter, "ds_tensor", parameter).data.view(-1)
        here[: stop - start].copy_(source(name, start, stop))


def frozen_parameters(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Those that are not trained, larger element sizes first, which is the order they are written in."""
    frozen = [(name, parameter) for name, parameter in parameters.items() if not parameter.requires_grad]
    return dict(sorted(frozen, key=lambda item: -item[1].dtype.itemsize))


def full_shape(parameter: Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also while ZeRO-3 has it partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _zero_optimizer(engine: Any) -> Any:
    """DeepSpeed's ZeRO optimizer, refused where its state is not plain fp32 buffers in memory."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_partitioned_groups_flat") and not hasattr(optimizer, "round_robin_bit16_offsets"):
        raise ConfigError("zero_optimization.stage: checkpoints need stage 2 or 3")
    if getattr(optimizer, "swap_optimizer", False):
        raise ConfigError("zero_optimization.offload_optimizer.device: checkpoints need cpu or none, not nvme")
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
