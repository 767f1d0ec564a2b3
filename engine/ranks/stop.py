"""A request to stop: remembered here, agreed upon by all ranks at the next micro-batch. Imports without torch.

It comes as a signal; as a file in the run folder: STOP, which is removed when the run has stopped, or
HOLD, which stays and keeps the run from being started until a person removes it; or from the clock,
when what is left of a batch job's time is what a checkpoint takes.
"""

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from engine.errors import ConfigError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
#: When the job will be killed, in seconds since 1970; newer versions of Slurm set the second.
END_TIME_VARIABLES = ("FULLTUNE_END_TIME", "SLURM_JOB_END_TIME")
#: Kept free besides what a save and the steps around it take: all ranks agree, publish and leave in it.
_SPARE_SECONDS = 30.0


class StopSignal:
    """Remembers that a stop was asked for. Signals come several times and in any order, so they only set a flag."""

    def __init__(self) -> None:
        #: What asked first, for people; "" while nothing has.
        self.reason = ""
        self._end_time: float | None = None
        self._seconds_needed = 0.0
        self._most_seconds: float | None = None
        for number in _SIGNALS:
            signal.signal(number, self._remember)

    @property
    def asked(self) -> bool:
        """True if this rank was asked to stop."""
        return bool(self.reason)

    def ask(self, reason: str) -> None:
        """Stop at the next micro-batch, because of `reason`; from any thread."""
        self.reason = self.reason or reason

    def limit_time(self, environment: Mapping[str, str]) -> None:
        """Know when the job will be killed, if the environment says so. ConfigError for what is no time."""
        for name in END_TIME_VARIABLES:
            if value := environment.get(name):
                if not value.isascii() or not value.isdecimal():
                    raise ConfigError(f"{name}={value}: write seconds since 1970, as `date +%s` prints them")
                self._end_time = float(value)
                return

    def plan_save(self, save_seconds: float, step_seconds: float) -> None:
        """Say how long a save takes, and a step, as measured last: so long before the end it has to begin.

        But no more than half of the time there was at the first call is kept free for it: every start shall get on.
        """
        if self._end_time is not None and self._most_seconds is None:
            self._most_seconds = max(0.0, self._end_time - time.time()) / 2
        needed = save_seconds + 2 * step_seconds + _SPARE_SECONDS
        self._seconds_needed = needed if self._most_seconds is None else min(needed, self._most_seconds)

    def look_at_clock(self) -> None:
        """Stop when the time left is what a save needs; from any thread, often."""
        if self._end_time is not None and time.time() + self._seconds_needed >= self._end_time:
            self.ask(f"the time limit, {self._seconds_needed:.0f} s before it")

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)


def is_held(run_dir: Path) -> bool:
    """True if a file HOLD lies in the run folder."""
    return (run_dir / "HOLD").exists()


def check_not_held(run_dir: Path) -> None:
    """ConfigError while a run is on hold: it does not start by itself."""
    if is_held(run_dir):
        raise ConfigError(f"run_dir: {run_dir} is on hold: remove {run_dir / 'HOLD'} to go on")
