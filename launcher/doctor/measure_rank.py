"""A rank of `fulltune doctor --measure`: short measurements, on all ranks at once, as in training.

The ranks start as in training (`deepspeed --module launcher.doctor.measure_rank`, or a task of `srun`). Rank 0
prints the figures of all. Every figure is the median of a few repetitions.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from engine.errors import FulltuneError
from engine.ranks.distributed import Ranks, leave, start_ranks
from engine.zero.prebuild import load_ops_once
from launcher.batch.rank_parent import rank_environment
from launcher.doctor.measure import FIGURES
from launcher.doctor.node_facts import send

_REPEATS = 5
_NOTHING = float("nan")
_CPU_SIDE, _GPU_SIDE = 1536, 8192
_HOST_BYTES, _DEVICE_BYTES, _MESSAGE_BYTES, _FILE_BYTES = 2**28, 2**30, 2**26, 2**28
_ADAM_PARAMETERS = 2**24
_FREE_BYTES = 8 * _FILE_BYTES


class _Bench:
    """Times a piece of work on this rank while all the others do the same."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.on_gpu = ranks.device.type == "cuda"

    def seconds(self, work: Callable[[], object]) -> float:
        """The median time of `work`, after one repetition that does not count."""
        times = []
        for repeat in range(_REPEATS + 1):
            self._settle()
            dist.barrier()
            began = time.perf_counter()
            work()
            self._settle()
            if repeat:
                times.append(time.perf_counter() - began)
        return statistics.median(times)

    def _settle(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def measure(bench: _Bench, ranks_per_node: int, folder: Path | None, nvme: Path | None) -> dict[str, float]:
    """All figures of this rank."""
    found = dict.fromkeys(FIGURES, _NOTHING)
    found["matrix product"] = _product(bench)
    found["host memory"] = _memory_gb_s(bench, _HOST_BYTES, torch.device("cpu"))
    found["CPU Adam"] = _adam(bench)
    if bench.on_gpu:
        found["device memory"] = _memory_gb_s(bench, _DEVICE_BYTES, bench.ranks.device)
        found["to device"], found["from device"] = _transfers(bench)
    rank, size = bench.ranks.rank, bench.ranks.world_size
    within = _own_group([range(first, first + ranks_per_node) for first in range(0, size, ranks_per_node)], rank)
    between = _own_group([range(local, size, ranks_per_node) for local in range(ranks_per_node)], rank)
    for group, where in ((within, "in a node"), (between, "between nodes")):
        if group is not None:
            gather, scatter = _collectives(bench, group)
            found[f"all-gather {where}"], found[f"reduce-scatter {where}"] = gather, scatter
    is_first = rank % ranks_per_node == 0
    for place, name in ((folder, "storage write"), (nvme, "NVMe write")):
        if place is not None:
            found[name] = _write(bench, place if is_first else None)
    return found


def _product(bench: _Bench) -> float:
    """TFLOP/s: bf16 on a GPU; fp32 on a CPU, where training multiplies bf16 numbers so."""
    side, kind = (_GPU_SIDE, torch.bfloat16) if bench.on_gpu else (_CPU_SIDE, torch.float32)
    left, right = (torch.randn(side, side, dtype=kind, device=bench.ranks.device) for _ in range(2))
    return 2 * side**3 / bench.seconds(lambda: left @ right) / 1e12


def _memory_gb_s(bench: _Bench, num_bytes: int, device: torch.device) -> float:
    """Bytes read and bytes written, together, of an addition in place: what is written was read, as by Adam."""
    one, other = (torch.ones(num_bytes // 4, device=device) for _ in range(2))
    return 3 * num_bytes / bench.seconds(lambda: one.add_(other)) / 1e9


def _adam(bench: _Bench) -> float:
    """Million parameters a second, of all the cores this rank has."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    parameter = torch.nn.Parameter(torch.zeros(_ADAM_PARAMETERS))
    parameter.grad = torch.ones_like(parameter)
    optimizer = DeepSpeedCPUAdam([parameter], lr=1e-3)
    return _ADAM_PARAMETERS / bench.seconds(optimizer.step) / 1e6


def _transfers(bench: _Bench) -> tuple[float, float]:
    """Between pinned host memory and the device."""
    host = torch.ones(_HOST_BYTES // 4, pin_memory=True)
    device = torch.ones(_HOST_BYTES // 4, device=bench.ranks.device)
    there = bench.seconds(lambda: device.copy_(host, non_blocking=True))
    back = bench.seconds(lambda: host.copy_(device, non_blocking=True))
    return _HOST_BYTES / there / 1e9, _HOST_BYTES / back / 1e9


def _own_group(members: Sequence[range], rank: int) -> dist.ProcessGroup | None:
    """Of groups of ranks, made by all together, the one that `rank` is in; None if it would be alone."""
    if len(members[0]) < 2:
        return None
    groups = [dist.new_group(list(some)) for some in members]
    own: dist.ProcessGroup = next(group for some, group in zip(members, groups, strict=True) if rank in some)
    return own


def _collectives(bench: _Bench, group: dist.ProcessGroup) -> tuple[float, float]:
    """GB/s that each rank sends, and receives, in an all-gather and in a reduce-scatter of one message."""
    count = dist.get_world_size(group)
    part = torch.ones(_MESSAGE_BYTES // 2 // count, dtype=torch.bfloat16, device=bench.ranks.device)
    whole = torch.ones(part.numel() * count, dtype=torch.bfloat16, device=bench.ranks.device)
    moved = part.nbytes * (count - 1)
    # torch 2.13 has new names for them.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    gather_seconds = bench.seconds(lambda: gather(whole, part, group=group))
    scatter_seconds = bench.seconds(lambda: scatter(part, whole, group=group))
    return moved / gather_seconds / 1e9, moved / scatter_seconds / 1e9


def _write(bench: _Bench, folder: Path | None) -> float:
    """A file written and flushed to the disk by one rank of each node; NaN for others, and where there is no room."""
    path = None if folder is None else folder / f".fulltune-measure-{os.getpid()}"
    block = bytes(range(256)) * 2**14

    def write() -> None:
        if path is None:
            return
        with path.open("wb") as file:
            for _ in range(_FILE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    try:
        if folder is not None:
            system = os.statvfs(folder)
            if system.f_bavail * system.f_frsize < _FREE_BYTES:
                path = None
        seconds = bench.seconds(write)
    finally:
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()
    return _NOTHING if path is None else _FILE_BYTES / seconds / 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Measure together with the other ranks; does not return, for ranks leave at once."""
    parser = argparse.ArgumentParser(prog="python -m launcher.doctor.measure_rank", description=__doc__)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--nvme", type=Path)
    parser.add_argument("--master", metavar="ADDRESS:PORT", help="as a task of srun: where ranks meet")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # `deepspeed` adds it
    arguments = parser.parse_args(argv)
    per_node: int = arguments.ranks_per_node
    try:
        if arguments.master:
            address, _, port = arguments.master.rpartition(":")
            world_size = int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) * per_node
            os.environ.update(rank_environment(os.environ, world_size, per_node, address, int(port)))
        load_ops_once(os.environ.get("DS_ACCELERATOR") != "cpu")
        ranks = start_ranks()
        found = measure(_Bench(ranks), per_node, arguments.folder, arguments.nvme)
        mine = torch.tensor([found[name] for name in FIGURES], dtype=torch.float64, device=ranks.device)
        everyone = [torch.empty_like(mine) for _ in range(ranks.world_size)]
        dist.all_gather(everyone, mine)
        if ranks.rank == 0:
            rows = [[round(value, 6) for value in row.tolist()] for row in everyone]
            figures = [[None if value != value else value for value in row] for row in rows]
            send({"node": "measured", "figures": figures})
        dist.barrier()
    except FulltuneError as error:
        print(f"fulltune: error: {error}", file=sys.stderr, flush=True)
        leave(error.exit_code)
    leave(0)


if __name__ == "__main__":
    main()
