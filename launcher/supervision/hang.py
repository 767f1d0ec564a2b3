"""Hangs: seen from outside, in the pages of all ranks (see `engine.ranks.heartbeat`), and written down with all stacks.

All ranks beat at the same places, so the one with the lowest count is the one the others wait for;
its phase decides how long that may be.
"""

import contextlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.ranks.heartbeat import Beat, page_path, read_page
from engine.ranks.rank_record import STACKS_SIGNAL
from launcher.job.job import LEAST_SECONDS
from launcher.job.processes import signal_processes, state_of
from launcher.job.records import RankStart

#: How long these phases may go without any sign of life; what is not named here may take as long as `set-up`.
PHASE_SECONDS = {"run file": 600.0, "import": 900.0, "end": 600.0, "save": 7200.0, "evaluation": 900.0}
SET_UP_SECONDS = 7200.0
#: Of the first steps nothing is known yet: kernels are compiled, memory is taken for the first time.
FIRST_STEPS_SECONDS = 600.0
_FIRST_STEPS = 2
#: While few steps are known: at least this long, and 100 times the shortest, for steps that vary tenfold both ways.
_FEW_STEPS, _FEW_STEPS_SECONDS, _FEW_STEPS_MULTIPLE = 20, 60.0, 100.0
_SOME_STEPS, _SOME_STEPS_MULTIPLE = 100, 5.0
_MULTIPLE = 3.0
#: A look counts for no more than this: nobody hangs because the supervisor itself, or the whole machine, stood still.
_LONGEST_LOOK_SECONDS = 1.0
_STACKS_SECONDS = 3.0
#: A stopped process is no slow one: this share of the shortest limit is enough, and the report is out within the limit.
_STOPPED_SHARE = 2 / 3


def limit_seconds(phase: str, step_seconds: Sequence[float], least_seconds: float = LEAST_SECONDS) -> float:
    """How long a rank may go without a sign of life in this phase, given what steps took so far."""
    if phase != "step":
        return max(least_seconds, PHASE_SECONDS.get(phase, SET_UP_SECONDS))
    if len(step_seconds) < _FIRST_STEPS:
        return max(least_seconds, FIRST_STEPS_SECONDS)
    ordered = sorted(step_seconds)
    usual = ordered[int(0.99 * (len(ordered) - 1) + 0.999)]
    if len(ordered) < _FEW_STEPS:
        return max(least_seconds, _FEW_STEPS_SECONDS, ordered[0] * _FEW_STEPS_MULTIPLE)
    return max(least_seconds, usual * (_SOME_STEPS_MULTIPLE if len(ordered) < _SOME_STEPS else _MULTIPLE))


@dataclass(frozen=True)
class Hang:
    """A rank that the others wait for, and that gave no sign of life for too long."""

    rank: int
    beat: Beat
    silent_seconds: float
    limit_seconds: float
    is_stopped: bool


class HangWatch:
    """Looks at all ranks' pages from time to time and finds a rank that hangs."""

    def __init__(self, run_dir: Path, least_seconds: float = LEAST_SECONDS):
        self._run_dir = run_dir
        self._least_seconds = least_seconds
        self._beats: dict[int, Beat] = {}
        self._silent: dict[int, float] = {}
        self._stopped: dict[int, float] = {}
        self._step_seconds: deque[float] = deque(maxlen=1000)
        self._looked: float | None = None

    @property
    def beats(self) -> Mapping[int, Beat]:
        """The last sign of life of every rank."""
        return self._beats

    def look(self, starts: Sequence[RankStart], pids: Mapping[int, int], now: float) -> None:
        """Read the pages of the ranks that have started; `pids` are those of this machine. `now` is monotonic."""
        passed = 0.0 if self._looked is None else min(now - self._looked, _LONGEST_LOOK_SECONDS)
        self._looked = now
        for start in starts:
            beat = read_page(page_path(self._run_dir, start.rank))
            if beat is not None and beat.pid == start.pid:
                self.take(start.rank, beat, passed)
        for rank, pid in pids.items():
            self._stopped[rank] = self._stopped.get(rank, 0.0) + passed if state_of(pid) == "T" else 0.0

    def take(self, rank: int, beat: Beat, passed_seconds: float) -> None:
        """A rank's page as it is now, so many seconds after the last look."""
        before = self._beats.get(rank)
        changed = before is None or beat.count != before.count
        self._silent[rank] = 0.0 if changed else self._silent[rank] + passed_seconds
        is_timed = rank == min((rank, *self._beats))  # steps of one rank count, or many ranks would fill the window
        if is_timed and before is not None and beat.step_seconds != before.step_seconds and beat.step_seconds > 0:
            self._step_seconds.append(beat.step_seconds)
        self._beats[rank] = beat

    def find_hang(self, ended: set[int]) -> Hang | None:
        """The rank that hangs, or None. Ranks that have `ended` do not count."""
        living = {rank: beat for rank, beat in self._beats.items() if rank not in ended}
        for rank, seconds in self._stopped.items():
            if rank in living and seconds >= self._least_seconds * _STOPPED_SHARE:
                return Hang(rank, living[rank], seconds, self._least_seconds * _STOPPED_SHARE, is_stopped=True)
        if not living:
            return None
        last = min(living, key=lambda rank: (living[rank].count, rank))
        limit = limit_seconds(living[last].phase, self._step_seconds, self._least_seconds)
        if self._silent[last] < limit:
            return None
        return Hang(last, living[last], self._silent[last], limit, is_stopped=False)


def write_stacks(run_dir: Path, pids: Mapping[int, int], hang: Hang, beats: Mapping[int, Beat]) -> tuple[Path, int]:
    """Write down the stacks of all ranks with the kernel's view of every rank.

    Returns the file and the culprit: `hang.rank`, or, when all are at the same place, the one that
    waits for nobody.
    """
    signal_processes(list(pids.values()), STACKS_SIGNAL)
    deadline = time.monotonic() + _STACKS_SECONDS
    stacks: dict[int, str] = {}
    while time.monotonic() < deadline:
        stacks = {rank: _read(run_dir / "ranks" / f"stacks-{rank:05d}.txt") for rank in sorted(beats)}
        if all(stacks.values()):
            time.sleep(0.2)  # the rest of a long one
            break
        time.sleep(0.1)
    stacks = {rank: _read(run_dir / "ranks" / f"stacks-{rank:05d}.txt") for rank in sorted(beats)}
    parts = []
    for rank, beat in sorted(beats.items()):
        parts.append(f"=== rank {rank}: {beat.phase}, step {beat.step}, {beat.activity or 'at its beginning'}\n")
        if rank in pids:
            parts.append(_kernel_view(pids[rank]))
        parts.append(stacks.get(rank) or "no Python stacks: it ran no signal handler\n")
    path = run_dir / "ranks" / "hang.txt"
    with contextlib.suppress(OSError):  # a full disk: the verdict stands
        path.write_text("\n".join(parts), encoding="utf-8")
    return path, _culprit(hang, beats, stacks)


def _culprit(hang: Hang, beats: Mapping[int, Beat], stacks: Mapping[int, str]) -> int:
    """Of ranks at the same place, the one that is in no collective, as all that wait for another one are."""
    if hang.is_stopped:
        return hang.rank
    level = [rank for rank, beat in beats.items() if beat.count == hang.beat.count]
    alone = [rank for rank in level if not stacks.get(rank)]
    alone = alone or [rank for rank in level if not is_in_collective(stacks.get(rank, ""))]
    return alone[0] if alone and len(alone) < len(level) else hang.rank


def is_in_collective(stacks: str) -> bool:
    """True if any thread of these stacks is inside a collective: at the innermost frames, not further out."""
    for thread in stacks.split("\n\n"):
        innermost = thread.splitlines()[1:6]
        if any("distributed_c10d" in line or "deepspeed/comm" in line for line in innermost):
            return True
    return False


def _kernel_view(pid: int) -> str:
    """The kernel's view of a process, which needs nothing from the process itself."""
    status = _read(Path(f"/proc/{pid}/status")).splitlines()
    lines = [line for line in status if line.startswith(("State:", "Threads:", "VmRSS:"))]
    lines.append(f"waits in the kernel at: {_read(Path(f'/proc/{pid}/wchan')) or '?'}")
    stack = _read(Path(f"/proc/{pid}/stack"))
    return "\n".join(lines) + ("\n" + stack if stack else "\n")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
