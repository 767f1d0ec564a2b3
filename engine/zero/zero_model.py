"""A model that DeepSpeed trains: where its training state lies, and how it is read and filled.

Written against DeepSpeed 0.19.8; with its neighbours of this room the only code that touches its
private attributes. A rank's state is a few flat fp32 buffers of masters (one for each sub-group of
ZeRO-3, one for each parameter group of ZeRO-1 and 2) with the optimizer's moments beside them. ZeRO-3
gives every rank an equal share of every parameter; ZeRO-1 and 2 cut the whole group's concatenation,
so a rank owns many parameters whole and its first and last in part. Either way it is a list of
slices: elements [start, stop) of a flattened parameter at an offset of a buffer. Buffers that are on
NVMe between two updates are the matter of `engine.zero.nvme_state`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter

import engine.zero.nvme_state as nvme_state
from engine.batches import Batch
from engine.errors import ConfigError
from engine.model.task_model import TaskModel
from engine.ranks.agreement import agree
from engine.tasks.task import Output, Task
from engine.tensor_files.slices import Kind, LiveSlice, Slice


class DeepSpeedEngine(Protocol):
    """The members of DeepSpeed's engine that are used; `module` holds the Hugging Face model as its `model`."""

    module: Module
    optimizer: Any
    global_steps: int

    def __call__(self, batch: Batch) -> Output: ...
    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> Any: ...
    def step(self) -> None: ...
    def was_step_applied(self) -> bool: ...
    def get_global_grad_norm(self) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...


@dataclass(frozen=True)
class ZeroModel:
    """DeepSpeed's engine, and the model's parameters by their Hugging Face names.

    Slices never hold padding. Methods need no communication, unless they say that all ranks call
    them. Between two updates masters and moments do not change, also during forward and backward.
    """

    engine: DeepSpeedEngine
    parameters: Mapping[str, Parameter]
    #: This rank's shares of frozen parameters that are stored wider than they are computed with; see `keep_wide`.
    wide_frozen: dict[str, LiveSlice] = field(default_factory=dict)
    frozen_types: dict[str, torch.dtype] = field(default_factory=dict)

    @property
    def model(self) -> Module:
        """The Hugging Face model."""
        return self.engine.module.get_submodule("model")

    @property
    def task(self) -> Task:
        """The task whose loss is trained, as it fits the model: on packed or on padded rows."""
        module = self.engine.module
        assert isinstance(module, TaskModel)
        return module.task

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The model's persistent buffers."""
        return persistent_buffers(self.model)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of each parameter, also while ZeRO-3 has it partitioned."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.parameters.items()}

    @property
    def frozen(self) -> dict[str, Parameter]:
        """The parameters that are not trained."""
        return {name: parameter for name, parameter in self.parameters.items() if not parameter.requires_grad}

    def set_learning_rate(self, rate: float) -> None:
        """Let the next update use `rate`, or each group's share of it; see `engine.model.layer_scales`."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]

    def owned_slices(self) -> list[Slice]:
        """The slices of the trained parameters whose state this rank owns: over all ranks each element once."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        locate = _zero3_slices if self._is_zero3 else _zero2_slices
        return [part for part in locate(self._optimizer, names) if part.start < part.stop]

    def live_state(self, kind: Kind) -> list[LiveSlice]:
        """This rank's masters or one kind of moments, fp32, on the device where DeepSpeed keeps them.

        The moments exist after the first step or `create_optimizer_state`.
        """
        owned = self.owned_slices()
        buffers = {index: self._buffer_values(index, kind) for index in {part.buffer for part in owned}}

        def values(part: Slice) -> Tensor:
            return buffers[part.buffer].narrow(0, part.offset, part.stop - part.start)

        return [LiveSlice(part.name, part.start, part.stop, values(part)) for part in owned]

    def keep_wide(self, types: Mapping[str, torch.dtype]) -> None:
        """Keep frozen parameters in fp32 beside what is computed with, where their type in `types` is wider than that.

        So checkpoints and exports hold the values of the file. Call it before `frozen_to_fill`.
        """
        for name, parameter in self.frozen.items():
            is_wide = types[name].itemsize > parameter.dtype.itemsize
            self.frozen_types[name] = torch.float32 if is_wide else parameter.dtype
        for part in self._frozen_slices(self._is_zero3):
            if self.frozen_types[part.name] != part.values.dtype:
                values = torch.zeros(part.stop - part.start)
                self.wide_frozen[part.name] = LiveSlice(part.name, part.start, part.stop, values)

    def live_frozen(self) -> list[LiveSlice]:
        """This rank's share of the frozen parameters, in `frozen_types`.

        Under ZeRO-3 it is what this rank holds; otherwise every rank holds all, and a share is an
        equal part to save; `frozen_to_fill` gives all of them.
        """
        return [self.wide_frozen.get(part.name, part) for part in self._frozen_slices(self._is_zero3)]

    def frozen_to_fill(self) -> list[LiveSlice]:
        """All values of frozen parameters that this rank holds, to be filled; `refresh_weights` must follow."""
        if self._is_zero3:
            return self.live_frozen()
        return [*self._frozen_slices(True), *self.wide_frozen.values()]

    def clear_padding(self) -> None:
        """Zero the masters, whose padding is otherwise whatever the memory held. All ranks, before they fill them."""
        for buffer in self._master_buffers:
            buffer.data.zero_()
        if nvme_state.swaps(self._optimizer):
            agree(partial(nvme_state.clear_masters, self._optimizer))

    def refresh_weights(self) -> None:
        """Round the masters into the weights that the model computes with. All ranks call it together."""
        optimizer = self._optimizer
        if self._is_zero3:
            for part in self._frozen_slices(True):
                part.values.copy_(self.wide_frozen.get(part.name, part).values)
        if not self._is_zero3:
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

    def begin_swapping(self) -> None:
        """Prepare a fresh engine for training if its optimizer states are on NVMe. All ranks call it together."""
        if nvme_state.swaps(self.engine.optimizer):
            nvme_state.keep_gradients_in_memory(self.engine.optimizer)
            self.create_optimizer_state(0)

    def remove_swap_files(self) -> None:
        """Remove this rank's files on NVMe, if there are any. For the end of a run; raises nothing."""
        nvme_state.remove_swap_files(self.engine.optimizer)

    def optimizer_steps(self) -> int:
        """Updates that the optimizer has applied; steps that DeepSpeed skipped do not count."""
        optimizer = self._optimizer.optimizer
        steps = {int(optimizer.state.get(buffer, {}).get("step", 0)) for buffer in self._master_buffers}
        if len(steps) != 1:
            raise RuntimeError(f"the optimizer's buffers disagree about their steps: {sorted(steps)}")
        return steps.pop()

    def optimizer_facts(self) -> dict[str, Any]:
        """The optimizer's class and the plain numbers of its groups, as JSON values."""
        optimizer = self._optimizer.optimizer
        groups = [
            {key: value for key, value in group.items() if isinstance(value, bool | int | float | tuple)}
            for group in optimizer.param_groups
        ]
        return {"optimizer": type(optimizer).__name__, "groups": groups}

    @property
    def moment_bytes_to_come(self) -> int:
        """Bytes on the device that the first update adds on this rank: none where the CPU updates, or after it."""
        optimizer = self._optimizer.optimizer
        if _is_cpu_adam(optimizer):
            return 0
        return sum(8 * buffer.numel() for buffer in self._master_buffers if buffer not in optimizer.state)

    def create_optimizer_state(self, steps: int) -> None:
        """Give every buffer zero moments and a count of `steps`, as after so many updates. All ranks call it."""
        optimizer = self._optimizer.optimizer
        on_cpu = _is_cpu_adam(optimizer)
        for index, buffer in enumerate(self._master_buffers):
            state = optimizer.state[buffer]
            state["step"] = steps if on_cpu else torch.tensor(float(steps), device=_step_device(optimizer, buffer))
            if nvme_state.is_swapped(self._optimizer, index):
                continue
            state["exp_avg"] = torch.zeros_like(buffer.data)
            state["exp_avg_sq"] = torch.zeros_like(buffer.data)
        if nvme_state.swaps(self._optimizer):
            agree(partial(nvme_state.create_moments, self._optimizer))
        if on_cpu:
            _replay_beta_powers(optimizer, steps)

    @property
    def _optimizer(self) -> Any:
        """DeepSpeed's ZeRO optimizer, refused where its state is not plain fp32 buffers in memory."""
        optimizer = self.engine.optimizer
        if not hasattr(optimizer, "fp32_partitioned_groups_flat") and not hasattr(
            optimizer, "round_robin_bit16_offsets"
        ):
            raise ConfigError("zero_optimization.stage: checkpoints need stage 2 or 3")
        if getattr(optimizer, "params_in_nvme_and_cpu", False):
            raise ConfigError("zero_optimization.offload_param.device: checkpoints need cpu or none, not nvme")
        if optimizer.master_weights_and_grads_dtype != torch.float32:
            raise ConfigError("bf16.bf16_master_weights_and_grads: checkpoints need masters in fp32; turn it off")
        if not _is_cpu_adam(optimizer.optimizer) and not isinstance(optimizer.optimizer, torch.optim.AdamW):
            kind = type(optimizer.optimizer).__name__
            raise ConfigError(f"checkpoints need DeepSpeedCPUAdam or torch.optim.AdamW, not {kind}")
        return optimizer

    @property
    def _is_zero3(self) -> bool:
        return hasattr(self._optimizer, "fp32_partitioned_groups_flat")

    @property
    def _master_buffers(self) -> list[Tensor]:
        optimizer = self._optimizer
        buffers: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat if self._is_zero3 else optimizer.single_partition_of_fp32_groups
        )
        return buffers

    def _buffer_values(self, index: int, kind: Kind) -> Tensor:
        optimizer = self._optimizer
        if nvme_state.is_swapped(optimizer, index):
            return nvme_state.mapped_state(optimizer, index, kind)
        buffer = self._master_buffers[index]
        values: Tensor = buffer.data if kind == "master" else optimizer.optimizer.state[buffer][kind]
        return values

    def _frozen_slices(self, everything_here: bool) -> Iterator[LiveSlice]:
        frozen: dict[str, Any] = dict(self.frozen)
        for name, parameter in frozen.items():
            if self._is_zero3:
                start, stop = _zero3_range(parameter)
                values = parameter.ds_tensor.data.view(-1)[: stop - start]
            else:
                values = parameter.data.view(-1)
                start, stop = (0, len(values)) if everything_here else _equal_share(len(values))
                values = values[start:stop]
            if start < stop:
                yield LiveSlice(name, start, stop, values)


def persistent_buffers(model: Module) -> dict[str, Tensor]:
    """The buffers that belong to a model's weights: those that its `state_dict` holds."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def _equal_share(count: int) -> tuple[int, int]:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return count * rank // world_size, count * (rank + 1) // world_size


def _is_cpu_adam(optimizer: Any) -> bool:
    return hasattr(optimizer, "ds_opt_adam")


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
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        raise RuntimeError(f"the optimizer trains a parameter of shape {shape} that has no name")
    return name
