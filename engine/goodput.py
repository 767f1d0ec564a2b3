"""Accounts for time: within a step by its phases, and over all starts of a run by cause.

The sums of a run are kept in ``run_dir/time.json``, rewritten after every step, so that a crash loses nothing that a
resumed run cannot tell: the gap until the next start, and the steps that were done for nothing.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.ranks import heartbeat

#: Besides `useful`, what a second can have gone to. `other` is what is left of the wall time.
CAUSES = (
    "start", "load", "data_wait", "save_stall", "evaluation", "lost_work", "restart", "requeue", "other",
)  # fmt: skip


class Stopwatch:
    """Seconds spent in named phases of a step, on the device's own clock where it has one.

    On CUDA an event is recorded at each border and read once at the end, so that measuring does
    not make the host wait in between.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self.mark("")

    def mark(self, phase: str) -> None:
        """Say that `phase` ends here and began at the mark before."""
        moment: Any
        if self._cuda:
            moment = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            moment.record()
        else:
            moment = time.perf_counter()
        heartbeat.beat(f"after {phase}" if phase else "begin")
        self._marks.append((phase, moment))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count everything since the end of the phase before, and the block, as `name`."""
        yield
        self.mark(name)

    def seconds(self) -> dict[str, float]:
        """Total seconds of every phase since the start; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for (_, start), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            elapsed = start.elapsed_time(end) / 1000.0 if self._cuda else end - start
            totals[phase] = totals.get(phase, 0.0) + elapsed
        return totals


class Goodput:
    """Adds up seconds by cause; one process keeps it.

    A second is `useful` when it went into forward, backward or update of a step that counts.
    `start` is from the process's begin to its first step without `load`, which is filling the
    weights; `lost_work` are steps beyond the checkpoint that a crash made worthless; `restart` and
    `requeue` lie between two starts. Time after a requested stop, until somebody starts again
    by hand, does not count.
    """

    def __init__(self, path: Path, now: float | None = None, process_began: float | None = None):
        self._path = path
        now = time.time() if now is None else now
        began = _process_began(now) if process_began is None else process_began
        values = _read(path)
        self._seconds = {cause: float(values.get("seconds", {}).get(cause, 0.0)) for cause in ("useful", *CAUSES)}
        self._wall = float(values.get("wall_seconds", 0.0))
        self._last = began
        if "last_seen" in values:
            gap = max(0.0, began - float(values["last_seen"]))
            requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
            if requeued or not values.get("ended"):
                self._count("requeue" if requeued else "restart", gap)
                self._wall += gap

    def started(self, load_seconds: float, lost_seconds: float, now: float | None = None) -> None:
        """Training begins; everything until now was the start, `load_seconds` of it loading.

        `lost_seconds` had been counted as useful in steps beyond the one that is resumed after.
        """
        self._count("load", load_seconds)
        self._count("start", max(0.0, self._tick(now) - load_seconds))
        self._count("useful", -lost_seconds)
        self._count("lost_work", lost_seconds)
        self._write(ended=False)

    def step(self, figures: Mapping[str, float], now: float | None = None) -> dict[str, float]:
        """Count an update with the figures of a training step; returns the totals so far, `useful_fraction` first."""
        self._count("data_wait", figures.get("data_seconds", 0.0))
        self._count("save_stall", figures.get("save_stall_seconds", 0.0))
        self._count("useful", useful_seconds(figures))
        self._tick(now)
        self._write(ended=False)
        return self.totals()

    def evaluation(self, seconds: float, now: float | None = None) -> None:
        """Count an evaluation."""
        self._count("evaluation", seconds)
        self._tick(now)

    def ended(self, now: float | None = None) -> None:
        """The run ends as it should, complete or stopped on request."""
        self._tick(now)
        self._write(ended=True)

    def totals(self) -> dict[str, float]:
        """`useful_fraction` of the wall time, and the seconds of every cause; they add up to the wall time."""
        known = sum(self._seconds[cause] for cause in ("useful", *CAUSES) if cause != "other")
        other = max(0.0, self._wall - known)
        fraction = self._seconds["useful"] / self._wall if self._wall else 0.0
        named = {f"{cause}_seconds": seconds for cause, seconds in (self._seconds | {"other": other}).items()}
        return {"useful_fraction": fraction, **named}

    def _count(self, cause: str, seconds: float) -> None:
        self._seconds[cause] += seconds

    def _tick(self, now: float | None) -> float:
        now = time.time() if now is None else now
        passed, self._last = max(0.0, now - self._last), now
        self._wall += passed
        return passed

    def _write(self, ended: bool) -> None:
        values = {
            "seconds": self._seconds,
            "wall_seconds": self._wall,
            "last_seen": self._last,
            "ended": ended,
        }
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(values))
            temporary.replace(self._path)
        except OSError:  # a full disk: the sums are kept, and the next step writes them
            with contextlib.suppress(OSError):
                temporary.unlink()


def useful_seconds(figures: Mapping[str, float]) -> float:
    """What a training step did, without its wait for data."""
    return figures.get("step_seconds", 0.0) - figures.get("data_seconds", 0.0)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _process_began(now: float) -> float:
    """When this process was started, by the kernel's clock."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return now - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
