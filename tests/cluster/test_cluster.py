"""The cluster that other tests run on: two nodes, and nothing left of it."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, running_cluster


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_two_nodes_run_what_srun_starts(cluster: SlurmCluster) -> None:
    output = cluster.run("srun", "-N2", "--ntasks-per-node=1", "sh", "-c", "echo $SLURM_NODEID $SLURMD_NODENAME")
    assert sorted(output.splitlines()) == ["0 n1", "1 n2"]


def test_a_killed_node_takes_its_tasks_along_and_comes_back(cluster: SlurmCluster) -> None:
    number = cluster.submit("-N2", "--ntasks-per-node=1", "--output=/dev/null", "--wrap", "srun sleep 600")
    cluster.wait_for(number, "RUNNING")
    deadline = time.monotonic() + 20
    while len(sleeping()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    before = sleeping()
    cluster.tell("kill n2")
    time.sleep(1)
    assert len(before) == 2
    assert len(sleeping()) == 1
    cluster.tell("start")


def sleeping() -> list[int]:
    done = subprocess.run(["pgrep", "-fx", "[^ ]*sleep 600"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in done.stdout.split()]


@pytest.mark.parametrize("way", ["ends", "is killed"])
def test_nothing_is_left_of_a_cluster(way: str, session_cluster: SlurmCluster, tmp_path: Path) -> None:
    with running_cluster(tmp_path) as other:
        number = other.submit("-N2", "--output=/dev/null", "--wrap", "srun sh -c 'setsid sleep 600 & sleep 600'")
        other.wait_for(number, "RUNNING")
        time.sleep(1)
        pids = other.processes()
        assert len(pids) > 6
        if way == "is killed":
            os.kill(other.keeper.pid, signal.SIGTERM)
            other.keeper.wait(timeout=60)
    assert not any(map(is_running, pids))
    assert not list(tmp_path.iterdir())
