"""Optimizer states that DeepSpeed keeps in files on an SSD: ``offload_optimizer: {device: nvme}``.

Written against DeepSpeed 0.19.8 and ZeRO-3. Between two updates a sub-group of at least 1 MiB
(`aio.block_size` where that is more) lies in three files of plain fp32 numbers, master and moments;
a smaller one stays in memory. An update brings one sub-group after the other into memory and writes
it back, and has waited for every write when it returns. So a checkpoint reads and fills the files,
mapped into memory: nothing is swapped in, and what is mapped costs page cache only.

Two things must be put right. DeepSpeed reads and writes around the page cache (O_DIRECT) and never
looks at the result: what the disk refuses has silently not happened. So the files get their room on
the disk before they are written. And gradients of over 1 MiB are swapped too and read back to
addresses that are not aligned as such reads must be, so an update takes whatever the buffer held
before. They are in host memory all along, so here they stay there, which also saves the traffic.
"""

import contextlib
import hashlib
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import CannotWriteError, MissingInputError, StorageError
from engine.tensor_files.slices import KINDS, Kind
from engine.zero.direct_io import check_direct_io

_GIB = 2.0**30
_PREFIX = "fulltune-"


def swaps(optimizer: Any) -> bool:
    """True if DeepSpeed's ZeRO optimizer keeps states on NVMe."""
    return bool(getattr(optimizer, "swap_optimizer", False))


def is_swapped(optimizer: Any, sub_group: int) -> bool:
    """True if a sub-group of DeepSpeed's ZeRO-3 optimizer lies in files between two updates."""
    return swaps(optimizer) and bool(optimizer._swappable_optimizer_subgroup(sub_group))


def keep_gradients_in_memory(optimizer: Any) -> None:
    """Let a fresh ZeRO-3 optimizer leave gradients where they are until a sub-group's update takes them."""
    swapper = optimizer.optimizer_swapper

    def keep(parameter: Any, gradient_offsets: list[int], gradient_tensors: list[Tensor]) -> None:
        kept = swapper.swap_params_info[parameter.ds_id].unswapped_gradients
        kept.update(zip(gradient_offsets, gradient_tensors, strict=True))

    swapper.swap_out_gradients = keep


def create_moments(optimizer: Any) -> None:
    """Give the swapped sub-groups moments of zeros, in files that DeepSpeed finds at its next update. StorageError."""
    moments = [kind for kind in KINDS if kind != "master"]
    for sub_group in _swapped(optimizer):
        buffer = optimizer.fp32_partitioned_groups_flat[sub_group]
        state, info = optimizer.optimizer.state[buffer], optimizer.optimizer_swapper.swap_params_info[buffer.ds_id]
        for kind in moments:
            if kind not in state:  # what DeepSpeed makes in its first update and has emptied after it
                state[kind] = torch.empty(0)
                state[kind].ds_id = f"{kind}-{buffer.ds_id}"
            _create_zeros(_path(optimizer, sub_group, kind), _file_bytes(optimizer, sub_group))
        if not info.has_state_tensors:
            info.add_state_tensors([state[kind] for kind in moments])


def clear_masters(optimizer: Any) -> None:
    """Make the masters of the swapped sub-groups zeros, padding and all. Raises StorageError."""
    for sub_group in _swapped(optimizer):
        _create_zeros(_path(optimizer, sub_group, "master"), _file_bytes(optimizer, sub_group))


def mapped_state(optimizer: Any, sub_group: int, kind: Kind) -> Tensor:
    """The values of a swapped sub-group, 1-D fp32, backed by their file: to be read or filled between two updates.

    After filling masters or moments `flush` must come before the next update.
    """
    _check_settled(optimizer)
    path, size = _path(optimizer, sub_group, kind), _file_bytes(optimizer, sub_group)
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), size)
    mapped.madvise(mmap.MADV_SEQUENTIAL)
    return torch.frombuffer(mapped, dtype=torch.float32, count=_num_elements(optimizer, sub_group))


@contextlib.contextmanager
def master_at_hand(optimizer: Any, sub_group: int) -> Iterator[None]:
    """Within it, a swapped sub-group's master is where DeepSpeed's own code looks for it. To be read only."""
    if not is_swapped(optimizer, sub_group):
        yield
        return
    buffer = optimizer.fp32_partitioned_groups_flat[sub_group]
    buffer.data = mapped_state(optimizer, sub_group, "master")
    try:
        yield
    finally:
        buffer.data = torch.empty(0)


def flush(optimizer: Any) -> None:
    """Write to the disk what was filled, so that an error shows here. No communication; raises StorageError."""
    paths = [_path(optimizer, sub_group, kind) for sub_group in _swapped(optimizer) for kind in KINDS]
    for path in paths:
        try:
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"nvme_path: {path} cannot be written: {error.strerror}") from error


def remove_swap_files(optimizer: Any) -> None:
    """Remove this rank's files, and the run's folder with the last rank's. For the end of a run; raises nothing."""
    if not swaps(optimizer):
        return
    folder = Path(optimizer.optimizer_swapper.swap_folder)
    shutil.rmtree(folder, ignore_errors=True)
    for parent in folder.parents:
        with contextlib.suppress(OSError):  # another rank's files are in it still
            parent.rmdir()
        if parent.name.startswith(_PREFIX):
            break


def swap_folder(nvme_path: Path, run_dir: Path, generation: int) -> Path:
    """The folder for one start of a run: jobs that share `nvme_path` never meet, nor does a start its forerunner."""
    return nvme_path / f"{_family(run_dir)}{generation}"


def prepare_swap_folder(folder: Path, run_dir: Path, needed_bytes: int) -> None:
    """Make `folder`, a `swap_folder` of this node, after removing what earlier starts of the run left there.

    One process a node calls it, before DeepSpeed is initialized. Raises an error when the disk is
    not there, is full, or cannot do what DeepSpeed wants of it.
    """
    nvme_path, family = folder.parent, _family(run_dir)
    if not nvme_path.is_dir():
        raise MissingInputError(f"nvme_path: there is no folder {nvme_path} here: mount the disk, or name another path")
    generation = int(folder.name.removeprefix(family))
    for stale in nvme_path.glob(f"{family}*"):
        number = stale.name.removeprefix(family)
        if number.isdecimal() and int(number) < generation:
            shutil.rmtree(stale, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise CannotWriteError(f"nvme_path: cannot make {folder}: {error.strerror}") from error
    check_direct_io(folder)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise StorageError(
            f"nvme_path: optimizer states need {needed_bytes / _GIB:.2f} GiB in {nvme_path} and {free / _GIB:.2f} GiB "
            f"are free: make room, choose another nvme_path, or use more nodes"
        )


def _family(run_dir: Path) -> str:
    return f"{_PREFIX}{hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()[:12]}-"


def _create_zeros(path: Path, size_bytes: int) -> None:
    """A new file of zeros whose room on the disk is certain."""
    try:
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
    except OSError as error:
        raise StorageError(
            f"nvme_path: no room for {path} ({size_bytes / _GIB:.2f} GiB): {error.strerror}; make room or choose "
            "another nvme_path"
        ) from error


def _check_settled(optimizer: Any) -> None:
    """Between two updates nothing is under way; anything else is another DeepSpeed than this was written for."""
    operations = getattr(optimizer.optimizer_swapper, "swap_ops", {})
    if any(operation is not None for operation in operations.values()):
        raise RuntimeError("DeepSpeed is still swapping optimizer states between two updates")


def _swapped(optimizer: Any) -> list[int]:
    return (
        [group for group in range(len(optimizer.fp16_groups)) if is_swapped(optimizer, group)]
        if swaps(optimizer)
        else []
    )


def _num_elements(optimizer: Any, sub_group: int) -> int:
    return int(optimizer.fp16_partitioned_groups_flat_numel[sub_group])


def _file_bytes(optimizer: Any, sub_group: int) -> int:
    """The length of each file: whole blocks, so that the last of them is longer than the numbers in it."""
    aligned = int(optimizer.optimizer_swapper._io_aligned_numel(_num_elements(optimizer, sub_group)))
    return aligned * torch.float32.itemsize


def _path(optimizer: Any, sub_group: int, kind: Kind) -> Path:
    name = optimizer.fp32_partitioned_groups_flat[sub_group].ds_id
    name = name if kind == "master" else f"{kind}-{name}"
    return Path(optimizer.optimizer_swapper.swap_folder) / f"{name}.tensor.swp"
