"""A request to stop: remembered here, agreed upon by all ranks at the next micro-batch. Imports without torch.

It comes as a signal, or as a file in the run folder: STOP, which is removed when the run has
stopped, or HOLD, which stays and keeps the run from being started until a person removes it.
"""

import signal
from pathlib import Path
from types import FrameType

from engine.errors import ConfigError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """Remembers that a stop was asked for. Signals come several times and in any order, so they only set a flag."""

    def __init__(self) -> None:
        #: What asked first, for people; "" while nothing has.
        self.reason = ""
        for number in _SIGNALS:
            signal.signal(number, self._remember)

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return bool(self.reason)

    def ask(self, reason: str) -> None:
        """Stop at the next micro-batch, because of `reason`; from any thread."""
        self.reason = self.reason or reason

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)


def check_not_held(run_dir: Path) -> None:
    """ConfigError while a file HOLD lies in the run folder: a run that was put on hold does not start by itself."""
    if (run_dir / "HOLD").exists():
        raise ConfigError(f"run_dir: {run_dir} is on hold: remove {run_dir / 'HOLD'} to go on")
