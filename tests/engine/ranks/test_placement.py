"""Each rank gets its own cores where there are enough, near its GPU, and what was narrowed before stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT

from engine.ranks import placement
from engine.ranks.placement import describe, place_rank, plan_cores

LOCAL = {"LOCAL_RANK": "1", "LOCAL_SIZE": "2", "RANK": "1", "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
EIGHT = set(range(8))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """8 logical cores, 4 physical ones (n and n + 4), 2 NUMA nodes, and 2 GPUs, the first on the second node."""
    for node, cores in enumerate(("0-1,4-5", "2-3,6-7")):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cores + "\n")
    for core in range(8):
        folder = tmp_path / f"devices/system/cpu/cpu{core}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{core % 4},{core % 4 + 4}\n")
    for address, node in (("0000:17:00.0", "1"), ("0000:65:00.0", "0")):
        (tmp_path / "bus/pci/devices" / address).mkdir(parents=True)
        (tmp_path / "bus/pci/devices" / address / "numa_node").write_text(node + "\n")
        (tmp_path / "gpus" / address).mkdir(parents=True)
    monkeypatch.setattr(placement, "SYSTEM", tmp_path)
    monkeypatch.setattr(placement, "NVIDIA", tmp_path / "gpus")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return tmp_path


def test_cpu_ranks_share_by_numa_node_and_physical_core(machine: Path) -> None:
    plan = plan_cores(LOCAL, EIGHT, EIGHT)
    assert plan.cores == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert plan.own == (2, 3, 6, 7)
    assert plan_cores(LOCAL | {"LOCAL_SIZE": "4"}, EIGHT, EIGHT).cores == ((0, 4), (1, 5), (2, 6), (3, 7))
    three = plan_cores(LOCAL | {"LOCAL_SIZE": "3"}, EIGHT, EIGHT).cores
    assert [len(cores) for cores in three] == [2, 2, 2]
    assert len({core for cores in three for core in cores}) == 6


def test_gpu_ranks_are_near_their_gpu(machine: Path) -> None:
    gpus = {**LOCAL, "DS_ACCELERATOR": "cuda"}
    assert plan_cores(gpus, EIGHT, EIGHT).cores == ((2, 3, 6, 7), (0, 1, 4, 5))
    assert plan_cores(gpus | {"CUDA_VISIBLE_DEVICES": "1,0"}, EIGHT, EIGHT).cores == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert plan_cores(gpus | {"CUDA_VISIBLE_DEVICES": "GPU-abc"}, EIGHT, EIGHT).cores == ((0, 1, 4, 5), (2, 3, 6, 7))
    for address in ("0000:17:00.0", "0000:65:00.0"):
        (machine / "bus/pci/devices" / address / "numa_node").write_text("-1\n")
    assert plan_cores(gpus, EIGHT, EIGHT).cores == ((0, 1, 4, 5), (2, 3, 6, 7)), "unknown: in order"


def test_both_gpus_of_one_node_share_its_cores(machine: Path) -> None:
    (machine / "bus/pci/devices/0000:17:00.0/numa_node").write_text("0\n")
    plan = plan_cores({**LOCAL, "DS_ACCELERATOR": "cuda"}, EIGHT, EIGHT)
    assert plan.cores == ((0, 4), (1, 5))


@pytest.mark.parametrize(
    ("environment", "mask", "parent_mask", "reason"),
    [
        ({"FULLTUNE_BIND_CORES": "0"}, EIGHT, EIGHT, "FULLTUNE_BIND_CORES=0"),
        ({"LOCAL_SIZE": "1", "LOCAL_RANK": "0"}, EIGHT, EIGHT, "a single rank"),
        ({}, {0, 1, 2, 3}, EIGHT, "each rank has been given its own"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, {0, 1, 2, 3}, {0, 1, 2, 3}, "each rank has been given its own"),
        ({"LOCAL_SIZE": "8"}, EIGHT, EIGHT, "fewer than 2 a rank"),
        ({}, {0, 1}, {0, 1}, "fewer than 2 a rank"),
    ],
)  # fmt: skip
def test_cores_are_left_alone(
    environment: dict[str, str], mask: set[int], parent_mask: set[int], reason: str, machine: Path
) -> None:
    plan = plan_cores(LOCAL | environment, mask, parent_mask)
    assert (plan.cores, plan.own, plan.reason) == ((), (), reason)


def test_a_mask_that_all_ranks_share_is_divided(machine: Path) -> None:
    """`taskset` in front of the launcher: within what it left."""
    assert plan_cores(LOCAL, {0, 1, 4, 5}, {0, 1, 4, 5}).cores == ((0, 4), (1, 5))
    # Slurm without binding: its tasks see all cores; the device number says nothing where each sees its own.
    task = LOCAL | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1", "LOCAL_RANK": "0"}
    assert plan_cores(task, EIGHT, EIGHT).own == (2, 3, 6, 7)


def test_what_was_set_is_said(machine: Path) -> None:
    plan = plan_cores(LOCAL, EIGHT, EIGHT)
    said = describe(plan, {"OMP_NUM_THREADS": "4", "PYTORCH_ALLOC_CONF": "x:1"}, Path("/ops"))
    assert said == (
        "2 ranks here, each on its own cores of 8 (0-1,4-5; 2-3,6-7), 2 NUMA nodes, OMP_NUM_THREADS=4, "
        "pinned memory x:1, ops in /ops"
    )
    few = describe(plan_cores(LOCAL, {0, 1}, {0, 1}), {"OMP_NUM_THREADS": "1"}, Path("/ops"))
    assert few.startswith(
        "2 ranks here, cores not bound (fewer than 2 a rank), 2 to use, 1 NUMA node, OMP_NUM_THREADS=1"
    )


@pytest.mark.parametrize(
    ("asked", "threads", "said"),
    [
        (None, None, ""),
        ("", None, ""),
        (" ", None, ""),
        ("1", "1", ""),
        ("1,2", "1,2", ""),
        ("auto", None, "(not auto: no number of threads here)"),
        ("0", None, "(not 0:"),
        ("-1", None, "(not -1:"),
        ("1.5", None, "(not 1.5:"),
        ("all cores", None, "(not all cores:"),
        ("1000000", None, "(not 1000000:"),
        ("99999999999999999999", None, "(not 99999999999999999999:"),
    ],
)
def test_threads_that_no_rank_can_have_are_replaced_and_said(asked: str | None, threads: str | None, said: str) -> None:
    environment = {} if asked is None else {"OMP_NUM_THREADS": asked}
    placement = place_rank(environment)
    assert environment["OMP_NUM_THREADS"] == threads or (threads is None and int(environment["OMP_NUM_THREADS"]) >= 1)
    line = describe(placement, environment, Path("/ops"))
    assert said in line and ("no number of threads" in line) == bool(said)


def test_the_kernel_binds_and_threads_follow(tmp_path: Path) -> None:
    """A real process, whose siblings would be the other ranks: its mask, and the threads torch takes from it."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core cannot be divided")
    program = (
        "import os; from engine.ranks import placement\n"
        "os.environ.pop('OMP_NUM_THREADS', None)\n"
        "found = placement.place_rank(os.environ)\n"
        "assert found.own == tuple(sorted(os.sched_getaffinity(0))), found\n"
        "import torch\n"
        "print(*found.own, '|', torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])\n"
    )
    told = []
    for rank in range(2):
        place = {"LOCAL_RANK": str(rank), "LOCAL_SIZE": "2", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        place["FULLTUNE_BIND_CORES"] = "1"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")} | place
        told.append(subprocess.check_output([sys.executable, "-c", program], env=environment, text=True).strip())
    masks = [{int(core) for core in line.partition("|")[0].split()} for line in told]
    assert not masks[0] & masks[1]
    assert masks[0] | masks[1] <= set(cores)
    assert [line.partition("|")[2].split() for line in told] == [[str(len(mask))] * 2 for mask in masks]
