"""Ranks that come to one answer: all go on, or all raise the same error. All ranks call every function here."""

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from engine import errors
from engine.errors import FulltuneError, StorageError

Result = TypeVar("Result")


def this_rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """The world size; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_json(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, as JSON carries it: no pickle between ranks."""
    return [json.loads(text) for text in _all_gather_text(json.dumps(value).encode(), None)]


def gather_json(value: Any, cpu_group: Any = None) -> list[Any] | None:
    """Every rank's `value`, in rank order, on rank 0; None on the others, which parse nothing.

    Goes through the memory of hosts where `cpu_group`, a process group for that, is given.
    """
    texts = _all_gather_text(json.dumps(value).encode(), cpu_group)
    return [json.loads(text) for text in texts] if this_rank() == 0 else None


def _all_gather_text(text: bytes, cpu_group: Any) -> Iterator[bytes]:
    """The text of each rank, padded with spaces to the longest."""
    if num_ranks() == 1:
        return iter([text])
    on_cpu = cpu_group is not None or "cpu:" in str(dist.get_backend_config())
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(num_ranks())]
    dist.all_gather(sizes, torch.tensor([len(text)], device=device), group=cpu_group)
    longest = max(int(size) for size in sizes)
    padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8).to(device)
    texts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(texts, padded, group=cpu_group)
    return (bytes(gathered.cpu().numpy()) for gathered in texts)


def agree(action: Callable[[], Result]) -> Result:
    """Run `action` on this rank; if it failed on any rank, all raise what the first of those raised.

    `action` must not communicate. An OSError becomes a StorageError.
    """
    failure: FulltuneError | None = None
    try:
        result = action()
    except FulltuneError as error:
        failure = error
    except OSError as error:
        failure = StorageError(
            f"rank {this_rank()}: {error.filename}: {error.strerror}; earlier checkpoints are untouched"
        )
    for report in all_gather_json([type(failure).__name__, str(failure)] if failure else None):
        if report:
            raise getattr(errors, report[0], FulltuneError)(report[1]) from failure
    return result


def from_rank_0(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 and hand its result (JSON) to all ranks; what it raises, all raise."""
    result: Result = all_gather_json(agree(lambda: action() if this_rank() == 0 else None))[0]
    return result
