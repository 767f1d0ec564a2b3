"""This process among the ranks of the job: its number and device, sums over all ranks, and a clean end."""

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from engine.errors import INTERNAL, OTHER_RANK_FAILED, FulltuneError
from engine.model.cpu_bf16 import multiply_bf16_in_fp32
from engine.ranks.liveness import remove_shared_memory
from engine.ranks.rendezvous import Place, join_world


class OtherRankFailedError(FulltuneError):
    """Raised on ranks that are fine because another one is not; that one tells the story."""

    def __init__(self, exit_code: int):
        super().__init__(OTHER_RANK_FAILED)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Ranks:
    """This process among all of the job, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device
    #: A group for small messages between hosts' memories, where the default one is for devices only.
    cpu_group: Any = None

    def any(self, flag: bool) -> bool:
        """True if `flag` is set on any rank; does not wait for a device. All ranks call it."""
        on_cpu = self.cpu_group is not None or self.device.type == "cpu"
        tensor = torch.tensor([int(flag)], device="cpu" if on_cpu else self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(tensor.item())

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over all ranks in double precision. All ranks call it."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def sum_named(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sum over all ranks of each value, under its name. All ranks call it with the same names in one order."""
        return dict(zip(values, self.sum(list(values.values())), strict=True))

    def gather(self, values: list[int]) -> list[list[int]]:
        """The integers of every rank, in rank order; equally many on each. All ranks call it."""
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return [part.tolist() for part in gathered]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """If the body raises on any rank, every rank leaves it with an error. All ranks call it.

        The body must contain no collective: a rank that failed would be missing from it.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        code = 0 if error is None else getattr(error, "exit_code", INTERNAL)
        worst = max(part[0] for part in self.gather([code]))
        if error is not None:
            raise error
        if worst:
            raise OtherRankFailedError(worst)


def start_ranks(job: str = "") -> Ranks:
    """Join the process group the launcher described in the environment (RANK, WORLD_SIZE, ...).

    `job` is a text that all its ranks know and other jobs do not. Raises what `join_world` does.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    multiply_bf16_in_fp32()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    # Ranks wait for one another while one of them downloads a model or reads it from a slow disk.
    timeout = datetime.timedelta(hours=2)
    place = Place.read(os.environ)
    # torchrun has made a store of its own before its ranks start.
    if place is not None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        options = {}
        if accelerator.device_name() == "cuda" and place.world_size > 1:
            options["device_id"] = accelerator.device(local_rank)  # as DeepSpeed would
        join_world(place, job, accelerator.communication_backend_name(), timeout, **options)
    deepspeed.init_distributed(dist_init_required=True, verbose=False, timeout=timeout)
    device = torch.device(accelerator.current_device_name())
    cpu_group = None if device.type == "cpu" else dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, cpu_group)


def leave(code: int, last_words: Callable[[], None] | None = None) -> NoReturn:
    """End this process at once with `code`: gloo now and then aborts when Python finalises normally."""
    if last_words is not None:
        last_words()
    remove_shared_memory()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
