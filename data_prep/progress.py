"""Progress of long work: a bar on a terminal, a plain line now and then in a log, nothing where it is not wanted."""

import sys
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from tqdm import tqdm

_PLAIN_LINE_SECONDS = 10.0
_RATE_LINES = 6  # the rate is that of so many intervals, so work that was done before does not flatter it for long
_BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class Progress:
    """Counts work done of `total` (None where it is not known) in `unit`: ``B`` for bytes, else a plural noun.

    A context manager; `advance` may be called as often as there is something to count. Bars go to
    standard error, lines to standard output. Closed by an error, it claims no end.
    """

    def __init__(
        self, label: str, total: int | None, shown: bool, unit: str = "B", plain_seconds: float = _PLAIN_LINE_SECONDS
    ):
        self._label = label
        self._total = total
        self._unit = unit
        self._done = 0
        self._started = time.monotonic()
        self._plain_seconds = plain_seconds
        self._marks = deque([(self._started, 0)], _RATE_LINES)
        self._lines = 0
        terminal = shown and sys.stderr.isatty()
        self._plain = shown and not terminal
        self._bar: tqdm[Any] | None = self._open_bar() if terminal else None

    def _open_bar(self) -> "tqdm[Any]":
        from tqdm import tqdm

        spaced = self._unit if self._unit == "B" else f" {self._unit}"
        return tqdm(total=self._total, desc=self._label, unit=spaced, unit_scale=True, dynamic_ncols=True, leave=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._lines and kind is None:
            elapsed = time.monotonic() - self._started
            print(f"{self._label}: {self._amount(self._done)} in {clock(elapsed)}", flush=True)

    def advance(self, amount: int) -> None:
        """Count `amount` more as done."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif self._plain and (now := time.monotonic()) - self._marks[-1][0] >= self._plain_seconds:
            print(self._line(now), flush=True)
            self._lines += 1
            self._marks.append((now, self._done))

    def _line(self, now: float) -> str:
        then, done_then = self._marks[0]
        rate = (self._done - done_then) / max(now - then, 1e-9)
        if not self._total:
            return f"{self._label}: {self._amount(self._done)}, {self._amount(rate)}/s"
        share = f"{self._done / self._total:.0%} of {self._amount(self._total)}"
        left = clock(max(self._total - self._done, 0) / rate) if rate else "unknown"
        return f"{self._label}: {share}, {self._amount(rate)}/s, {left} left"

    def _amount(self, number: float) -> str:
        if self._unit == "B":
            scaled = (f"{number / size:.1f} {name}" for size, name in _BYTE_UNITS if number >= size)
            return next(scaled, f"{number:.0f} B")
        return f"{number:,.0f} {self._unit}" if number >= 10 or number == int(number) else f"{number:.1f} {self._unit}"


def clock(seconds: float) -> str:
    """A time span as people read it: 0:07, 12:30, 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
