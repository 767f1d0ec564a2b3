"""A node of a Slurm job that is gone: found at once, and Slurm given the time to find it too.

When a node dies the ranks of the others lose their peers within seconds, but Slurm takes a node for
dead only after its `SlurmdTimeout` (five minutes unless changed), and requeues then. A job that had
ended by itself before that would be a failed one, and would not come back.
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

_PROBE_SECONDS = 30.0
_POLL_SECONDS = 0.5
_USUAL_TIMEOUT_SECONDS = 300


def lost_nodes(nodes: Sequence[str]) -> list[str]:
    """Those of the job's nodes on which Slurm cannot start the simplest task now."""
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
