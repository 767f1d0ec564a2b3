"""Inside a Slurm allocation: one task a rank through `srun`, no ssh, no hostfile; and staying with it.

`srun` starts `launcher.batch.rank_parent` in every task, which becomes the parent of one rank. Signals:
Slurm sends TERM to every task by itself when it wants the job to end; what reaches us is handed on.

When a node dies, the ranks of the others lose their peers within seconds, but Slurm notices a dead node only after its
`SlurmdTimeout` (five minutes unless changed), and requeues the job then. A job that ended by itself before that would
count as failed and would not come back. So a lost node is looked for at once, and Slurm gets the time to notice it too.
"""

import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import INTERNAL, LOST_PEER, STOPPED_WITH_CHECKPOINT, ConfigError
from engine.ranks.stop import END_TIME_VARIABLES
from launcher.job.environment import job_environment, remove_shared_memory
from launcher.job.hosts import Node, is_host_name
from launcher.job.job import Job, free_port
from launcher.job.records import RankExit, clear_records, read_exits, read_starts
from launcher.ssh.mailbox import killed_path
from launcher.supervision.run import explain_end
from launcher.supervision.supervisor import Stop, Supervision, liveness

_ADDRESS = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:_-]*")
# A rank that ended well waits this long for the others before `srun` ends the step.
_WAIT_SECONDS = 300
_PROBE_SECONDS = 30.0
_POLL_SECONDS = 0.5
_USUAL_TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Allocation:
    """The nodes of this Slurm job. `cpus` and `gpus` are those of one node, the fewest where nodes differ.

    `end_time` is the end of the job's time limit in seconds since 1970, None without a limit.
    """

    job_id: int
    nodes: tuple[str, ...]
    address: str
    cpus: int
    gpus: int
    tasks_per_node: int | None
    is_first_node: bool
    end_time: int | None = None


def is_inside(environment: Mapping[str, str]) -> bool:
    """True inside a Slurm job."""
    return bool(environment.get("SLURM_JOB_ID"))


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """The allocation this process runs in. ConfigError when Slurm does not describe it, or in one of many tasks."""
    if int(_number(environment, "SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise ConfigError("`fulltune train` was started once in every task: start it once a job, without srun")
    job_id = int(_number(environment, "SLURM_JOB_ID"))
    names = _output_of("scontrol", "show", "hostnames", "--", environment.get("SLURM_JOB_NODELIST", "")).split()
    if not names or not all(map(is_host_name, names)):
        raise ConfigError(f"SLURM_JOB_NODELIST: `{environment.get('SLURM_JOB_NODELIST')}` names no hosts")
    per_task = environment.get("SLURM_NTASKS_PER_NODE")
    return Allocation(
        job_id,
        tuple(names),
        _address(names[0]),
        _fewest(environment, "SLURM_JOB_CPUS_PER_NODE"),
        _gpus(environment),
        int(_number(environment, "SLURM_NTASKS_PER_NODE")) if per_task else None,
        environment.get("SLURMD_NODENAME") == names[0],
        _end_time(job_id),
    )


def plan_slurm_job(
    allocation: Allocation,
    run_dir: Path,
    run_file: Path,
    engine_flags: list[str],
    ranks_per_node: int | None = None,
    master_port: int | None = None,
) -> Job:
    """The `srun` that starts every rank of the allocation. ConfigError for more ranks than it has devices or cores."""
    ranks = ranks_per_node or allocation.gpus or allocation.tasks_per_node or 1
    uses_gpus = allocation.gpus > 0 and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    if ranks < 1 or (uses_gpus and ranks > allocation.gpus):
        raise ConfigError(f"--ranks-per-node {ranks}: the job has {allocation.gpus} GPU(s) a node")
    cpus = allocation.cpus // ranks
    if cpus < 1:
        raise ConfigError(
            f"--ranks-per-node {ranks}: the job has {allocation.cpus} CPU(s) a node, and a rank needs one: "
            "ask for more with --cpus-per-task"
        )
    # Where rank 0 runs here, a free port is found here; elsewhere the port follows from the job's number.
    port = master_port or (free_port() if allocation.is_first_node else 15000 + allocation.job_id % 15000)
    count = len(allocation.nodes)
    command = (
        "srun", "--kill-on-bad-exit=1", f"--wait={_WAIT_SECONDS}", f"--nodes={count}", f"--ntasks={count * ranks}",
        f"--ntasks-per-node={ranks}", f"--cpus-per-task={cpus}", "--distribution=block", "--input=none",
        "--overlap", "--export=ALL", sys.executable, "-m", "launcher.batch.rank_parent", f"--ranks={count * ranks}",
        f"--ranks-per-node={ranks}", f"--master-addr={allocation.address}", f"--master-port={port}",
        f"--run-dir={run_dir}", str(run_file), *engine_flags,
    )  # fmt: skip
    environment = job_environment(ranks, uses_gpus)
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(cpus))
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        del environment["TORCH_EXTENSIONS_DIR"]  # nodes may have other CPUs: every rank finds its own
    if allocation.end_time is not None:
        environment[END_TIME_VARIABLES[0]] = str(allocation.end_time)
    nodes = tuple(Node(name, tuple(range(ranks))) for name in allocation.nodes)
    return Job(run_dir, run_file, nodes, command, environment, port)


def run_slurm_job(job: Job, stop: Stop) -> tuple[int, str]:
    """Run `job` under `srun` to its end; (exit code, one line that explains it unless it is 0).

    What `stop` remembers is handed to `srun`, which hands it to every task; a second INT kills the ranks.
    A dead or hanging rank ends the job.
    """
    clear_records(job.run_dir)
    with liveness() as alive:
        # A session of its own: a terminal's Ctrl-C reaches us alone, and `srun` cannot take it for a second one.
        process = subprocess.Popen(
            job.command, env=os.environ | job.environment | alive.environment, start_new_session=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        supervision = Supervision(
            process, job.run_dir, job.run_file, stop, alive.token, job.hang_seconds, job.num_ranks, is_srun=True
        )
        try:
            supervision.stay()
        finally:
            supervision.end()
            remove_shared_memory("*", job.master_port)
    silent_nodes = _silent_nodes(job)
    code, message = _explain_end_of_step(job, process.returncode, supervision)
    if code in (INTERNAL, LOST_PEER) and not stop.requests and (lost := lost_nodes(silent_nodes)):
        wait_for_slurm(lost, lambda: bool(stop.requests))
        return LOST_PEER, f"lost {'node' if len(lost) == 1 else 'nodes'} {', '.join(lost)}: {message}"
    return (130, "interrupted twice: killed, no checkpoint saved") if stop.at_once and code else (code, message)


def _explain_end_of_step(job: Job, srun_code: int, supervision: Supervision) -> tuple[int, str]:
    """The exit code and its explanation, from the ranks' records and, where a rank left none, its parent's note.

    `srun` kills the other ranks when one fails. Its own code is often theirs and explains nothing, and neither does
    the list of dead ranks. A rank that a signal ended while it was starting has lost nothing: the job stopped.
    """
    asked: list[tuple[float, int, int]] = []
    crashed: list[tuple[float, int, int]] = []
    for path in (job.run_dir / "ranks").glob("killed-*.json"):
        with contextlib.suppress(OSError, ValueError):
            note = json.loads(path.read_text(encoding="utf-8"))
            found = (float(note["time"]), int(note["rank"]), int(note["signal"]))
            (asked if note["asked"] else crashed).append(found)
    findings, exits = supervision.findings, read_exits(job.run_dir)
    failed = [
        record.time
        for record in exits.values()
        if record.code not in (0, STOPPED_WITH_CHECKPOINT) and not _lost_its_peer(record)
    ]
    is_asked = bool(supervision.stop.requests) or srun_code == 128 + signal.SIGTERM
    too_early = (asked and not failed) or (is_asked and not read_starts(job.run_dir))
    if asked:  # `srun` kills the others after the first that ended while it was starting
        crashed = [found for found in crashed if found[2] != signal.SIGKILL or found[0] < min(asked)[0]]
    if too_early and not crashed and findings.hang is None:
        return STOPPED_WITH_CHECKPOINT, "stopped on request while the ranks were starting: start again"
    # Whoever died after another rank had failed was ended because of it.
    findings.died_first = [rank for moment, rank, _ in sorted(crashed)[:1] if not failed or moment <= min(failed)]
    findings.signals = {rank: number for _, rank, number in crashed}
    return explain_end(job.run_dir, job.num_ranks, 1 if exits else srun_code, supervision, job.memory_rule)


def _lost_its_peer(record: RankExit) -> bool:
    """True for a failure in a collective, which follows from a peer's death before anything can note that death."""
    return record.code == INTERNAL and "torch/distributed/" in record.traceback


def _silent_nodes(job: Job) -> list[str]:
    """Nodes with a rank that left no record and no note of its parent: `srun` killed both, or the node is gone."""
    exits = read_exits(job.run_dir)
    first, silent = 0, []
    for node in job.nodes:
        ranks = range(first, first + len(node.slots))
        first += len(node.slots)
        if any(rank not in exits and not killed_path(job.run_dir, rank).exists() for rank in ranks):
            silent.append(node.name)
    return silent


def _output_of(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise ConfigError(f"inside a Slurm job, but there is no `{words[0]}` here: load Slurm's module") from None
    except subprocess.SubprocessError as error:
        reason = getattr(error, "stderr", None) or str(error)
        raise ConfigError(f"`{' '.join(words)}` failed: {' '.join(reason.split())}") from None
    return done.stdout


def _address(node: str) -> str:
    """The address at which Slurm itself reaches a node: the name may mean nothing outside of Slurm."""
    match = re.search(r"(?:^|\s)NodeAddr=(\S+)", _output_of("scontrol", "show", "node", "-o", node))
    if match is None or not _ADDRESS.fullmatch(match[1]):
        raise ConfigError(f"Slurm gives no usable address for node {node}")
    return match[1]


def _end_time(job_id: int) -> int | None:
    match = re.search(
        r"\sEndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", _output_of("scontrol", "show", "job", "-o", str(job_id))
    )
    return int(datetime.datetime.fromisoformat(match[1]).timestamp()) if match else None  # local time, as Slurm writes


def _number(environment: Mapping[str, str], name: str, default: str = "") -> str:
    value = environment.get(name) or default
    if not value.isascii() or not value.isdecimal():
        raise ConfigError(f"{name}=`{value}` is not a number: this is no Slurm job's environment")
    return value


def _fewest(environment: Mapping[str, str], name: str) -> int:
    """The smallest of a list such as `8(x2),4`."""
    parts = environment.get(name, "").split(",")
    matches = [re.fullmatch(r"(\d+)(\(x\d+\))?", part) for part in parts]
    numbers = [int(match[1]) for match in matches if match is not None]
    if len(numbers) < len(parts):
        raise ConfigError(f"{name}=`{environment.get(name)}` is not a list of CPUs: this is no Slurm job's environment")
    return min(numbers)


def _gpus(environment: Mapping[str, str]) -> int:
    """GPUs a node; on a login node (salloc) from the job's request, `8` or `a100:8`."""
    if environment.get("SLURM_GPUS_ON_NODE"):
        return int(_number(environment, "SLURM_GPUS_ON_NODE"))
    match = re.fullmatch(r"(?:[\w.-]+:)?(\d+)", environment.get("SLURM_GPUS_PER_NODE", ""))
    return int(match[1]) if match else 0


def lost_nodes(nodes: Sequence[str]) -> list[str]:
    """The job's nodes on which Slurm cannot start the simplest task now."""
    probes = {
        node: subprocess.Popen(_probe(node), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for node in nodes
    }
    deadline = time.monotonic() + _PROBE_SECONDS
    lost = []
    for node, probe in probes.items():
        try:
            answered = probe.wait(max(0.1, deadline - time.monotonic())) == 0
        except subprocess.TimeoutExpired:
            probe.kill()
            probe.wait()
            answered = False
        if not answered:
            lost.append(node)
    return lost


def wait_for_slurm(nodes: Sequence[str], is_stopped: Callable[[], bool]) -> None:
    """Wait for Slurm to take back a job whose `nodes` are lost, which ends this process; returns if it does not."""
    limit_seconds = 2 * _slurmd_timeout_seconds() + 60
    print(
        f"fulltune: no answer from {', '.join(nodes)}: waiting up to {limit_seconds} s for Slurm to notice and to "
        "requeue the job",
        file=sys.stderr,
        flush=True,
    )
    deadline = time.monotonic() + limit_seconds
    while time.monotonic() < deadline and not is_stopped():
        time.sleep(_POLL_SECONDS)


def _probe(node: str) -> list[str]:
    return ["srun", "--overlap", "--input=none", "--nodes=1", "--ntasks=1", "--cpus-per-task=1", f"--nodelist={node}",
            "--export=ALL", "true"]  # fmt: skip


def _slurmd_timeout_seconds() -> int:
    try:
        done = subprocess.run(
            ["scontrol", "show", "config"], capture_output=True, text=True, timeout=30, check=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return _USUAL_TIMEOUT_SECONDS
    match = re.search(r"^SlurmdTimeout\s*=\s*(\d+)", done.stdout, re.MULTILINE)
    return int(match[1]) if match else _USUAL_TIMEOUT_SECONDS
