"""The parent of one rank in a Slurm task: checks that Slurm started the wanted number of ranks, then runs the rank.

`srun` starts ``python -m launcher.batch.rank_parent`` once a rank (see launcher.batch.slurm_job). A rank needs a parent
because `srun` kills all tasks as soon as one ends badly. A rank that stopped with a checkpoint ends with 75, and the
others must live until they have stopped too; the task's code is 0 then. The honest codes are in the ranks' exit
records. The parent also notes which signal ended a rank that could not write a record itself.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from engine.errors import COMPLETE, STOPPED_WITH_CHECKPOINT, ConfigError
from launcher.job.environment import remove_shared_memory
from launcher.job.hosts import local_gpus
from launcher.ssh.mailbox import killed_path

_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run this task's rank to its end; the task's exit code."""
    task = _Task()  # first of all: until here a signal kills
    arguments, engine_flags = _arguments(argv)
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    try:
        placed = rank_environment(
            os.environ, arguments.ranks, arguments.ranks_per_node, arguments.master_addr, arguments.master_port
        )
    except ConfigError as error:
        _write_exit_record(arguments.run_dir, rank, error)
        return error.exit_code
    command = [sys.executable, "-m", "engine", arguments.run_file, *engine_flags]
    code = task.run(command, os.environ | placed)
    remove_shared_memory("*", arguments.master_port, str(rank))
    if code < 0:
        asked = -code in task.handed_on
        note = {"rank": rank, "signal": -code, "asked": asked, "host": socket.gethostname(), "time": time.time()}
        _write(killed_path(arguments.run_dir, rank), note)
        return 128 - code
    return 0 if code in (COMPLETE, STOPPED_WITH_CHECKPOINT) else code


def rank_environment(
    environment: Mapping[str, str], ranks: int, ranks_per_node: int, master_addr: str, master_port: int
) -> dict[str, str]:
    """The variables that a rank needs, made from Slurm's. ConfigError when Slurm started another number than `ranks`.

    LOCAL_RANK is the number of the rank's device among those it can see: a cluster may show every
    task all devices of the node, or (per-task binding) its own alone, which then is number 0.
    """
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")
    try:
        rank, local_rank, node, tasks, nodes = (int(environment[name]) for name in names)
    except (KeyError, ValueError):
        raise ConfigError(f"not a task of srun: {', '.join(names)} are not all numbers") from None
    where = f"rank {rank} on {environment.get('SLURMD_NODENAME', socket.gethostname())}"
    if (tasks, nodes * ranks_per_node) != (ranks, ranks) or rank != node * ranks_per_node + local_rank:
        raise ConfigError(
            f"{ranks} ranks, {ranks_per_node} a node, were asked for, and Slurm started {tasks} tasks on {nodes} "
            f"nodes, this one as task {local_rank} of node {node}: SLURM_ and SBATCH_ variables may be in the way"
        )
    device = local_rank
    if environment.get("DS_ACCELERATOR") != "cpu":
        visible = _num_visible(environment)
        if visible == 1:
            device = 0
        elif visible < ranks_per_node:
            raise ConfigError(f"{where} sees {visible} GPUs, and {ranks_per_node} ranks a node were asked for")
        if int(environment.get("SLURM_GPUS_ON_NODE") or visible) < ranks_per_node:
            raise ConfigError(f"{where}: the node has {environment['SLURM_GPUS_ON_NODE']} of {ranks_per_node} GPUs")
    return {
        "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(device), "LOCAL_SIZE": str(ranks_per_node),
        "MASTER_ADDR": master_addr, "MASTER_PORT": str(master_port),
    }  # fmt: skip


def _num_visible(environment: Mapping[str, str]) -> int:
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:  # numbers or names such as MIG-...
        return len([name for name in named.split(",") if name.strip()])
    return len(local_gpus())


class _Task:
    """Hands every signal on to the rank, also a signal that comes before the rank has started.

    Some clusters signal every process of a task, others only the first: a rank may get a signal twice.
    """

    def __init__(self) -> None:
        self.handed_on: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None
        for number in _HANDED_ON:
            signal.signal(number, self._hand_on)

    def run(self, command: list[str], environment: Mapping[str, str]) -> int:
        """Run the rank to its end; its code as Popen gives it."""
        child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        self._child = child
        for number in list(self.handed_on):
            child.send_signal(number)
        return child.wait()

    def _hand_on(self, number: int, _frame: FrameType | None) -> None:
        self.handed_on.append(number)
        if self._child is not None:
            self._child.send_signal(number)


def _write_exit_record(run_dir: Path, rank: int, error: ConfigError) -> None:
    record = {"rank": rank, "code": error.exit_code, "phase": "start", "message": str(error)}
    _write(run_dir / "ranks" / f"exit-{rank:05d}.json", record)


def _write(path: Path, record: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
    temporary.replace(path)


def _arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m launcher.batch.rank_parent", description=__doc__)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--master-addr", required=True)
    parser.add_argument("--master-port", type=int, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("run_file")
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    sys.exit(main())
