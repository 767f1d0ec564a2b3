"""Processes: who am I, agreeing with the others, owning the run folder, and leaving cleanly."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
import torch.distributed as dist

from engine.checkpoint_files import known_run_id
from engine.cpu_bf16 import multiply_bf16_in_fp32
from engine.errors import INTERNAL, OTHER_RANK_FAILED, CannotWriteError, FulltuneError
from engine.file_modes import refuse_foreign
from engine.liveness import remove_shared_memory
from engine.rank_record import write_json
from engine.rendezvous import Place, join_world
from engine.stop import check_not_held


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
        """Whether `flag` is set on any rank; does not wait for a device. All ranks call it."""
        on_cpu = self.cpu_group is not None or self.device.type == "cpu"
        tensor = torch.tensor([int(flag)], device="cpu" if on_cpu else self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(tensor.item())

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over all ranks in double precision. All ranks call it."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

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


class RunFolder:
    """The run folder and the right to write into it: one owner at a time.

    A lock held by rank 0 keeps a second job on this file system out while this one lives; the
    generation in owner.json, raised at every start, keeps a stale writer from publishing after a
    newer one has begun.
    """

    def __init__(self, path: Path, rank: int, share_with_group: bool = False):
        self.path = path
        self._rank = rank
        self._share_with_group = share_with_group
        self._lock: IO[str] | None = None
        #: Of rank 0, which alone writes them down: how often the run was started, and which run it is.
        self.generation = 0
        self.run_id = ""

    def own(self) -> None:
        """Take ownership (rank 0 does; others have nothing to do). CannotWriteError when it is taken.

        RefusedForSecurityError as `refuse_foreign` does.
        """
        if self._rank != 0:
            return
        refuse_foreign(self.path, self._share_with_group)
        check_not_held(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "owner.lock").open("a+")
        except OSError as error:
            raise CannotWriteError(f"run_dir: cannot write into {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = self._owner()
            raise CannotWriteError(
                f"run_dir: {self.path} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}: "
                "wait for it, stop it, or choose another run_dir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise CannotWriteError(f"run_dir: cannot lock {self.path}: {error.strerror}") from error
            # No locks on this file system: the generation below still keeps a stale writer out.
            print(f"warning: {self.path} lies on a file system without locks: start one job at a time", flush=True)
        self._lock = lock
        self.generation = int(self._owner().get("generation", 0)) + 1
        self.run_id = self.recorded_run_id() or known_run_id(self.path) or secrets.token_hex(8)
        try:
            self._write_owner()
        except OSError as error:
            raise CannotWriteError(f"run_dir: cannot write into {self.path}: {error.strerror}") from error

    def recorded_run_id(self) -> str:
        """Which run this folder is of, by what it says itself; "" for a new one."""
        return str(self._owner().get("run_id", ""))

    def begin_new_run(self) -> None:
        """From now on checkpoints are those of another run. Rank 0 decides."""
        if self._rank == 0:
            self.run_id = secrets.token_hex(8)
            self._write_owner()

    def _write_owner(self) -> None:
        write_json(
            self.path / "owner.json",
            {"run_id": self.run_id, "generation": self.generation, "pid": os.getpid(), "host": socket.gethostname()},
        )

    def check_owner(self) -> None:
        """CannotWriteError when a newer job has taken the folder over. Rank 0 decides."""
        if self._rank == 0 and int(self._owner().get("generation", 0)) != self.generation:
            raise CannotWriteError(f"run_dir: {self.path} was taken over by a newer job; this one may not publish")

    def _owner(self) -> dict[str, int | str]:
        try:
            values = json.loads((self.path / "owner.json").read_text())
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}


def leave(code: int, last_words: Callable[[], None] | None = None) -> NoReturn:
    """End this process at once with `code`: gloo now and then aborts when Python finalises normally."""
    if last_words is not None:
        last_words()
    remove_shared_memory()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
