"""What a run tells: metrics.jsonl, TensorBoard, and one progress line a step on rank 0."""

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from engine.goodput import CAUSES, Goodput, useful_seconds
from engine.sections import LogSection
from engine.tasks.auxiliary import AUXILIARY

PHASES = ("data", "forward", "backward", "optimizer")
GIB = 2.0**30
#: What TensorBoard's page of custom scalars shows, in the order in which a person looks.
LAYOUT = {
    "fulltune": {
        "loss": ["Multiline", ["train/loss", "evaluation/loss"]],
        "throughput, tokens a second": ["Multiline", ["train/tokens_per_second"]],
        "step, seconds by phase": ["Multiline", [f"train/{phase}_seconds" for phase in PHASES]],
        "memory, GiB": ["Multiline", [r"train/(host|device)(_peak)?_gib"]],
        "offload: update on the CPU, seconds": ["Multiline", ["train/optimizer_seconds", "train/save_stall_seconds"]],
        "goodput, useful part of the wall time": ["Multiline", ["time/useful_fraction"]],
        "lost time, seconds by cause": ["Multiline", [f"time/{cause}_seconds" for cause in CAUSES]],
    }
}
#: Figures that identify something: a curve of them says nothing.
NOT_DRAWN = {"rows_hash"}
#: The file in the run folder with the tables of the newest evaluation.
EVALUATION_NAME = "evaluation.txt"
_LOG = logging.getLogger(__name__)


def memory_gib() -> dict[str, float]:
    """Host memory of this process, now and at its peak, and the device's peak if it has memory of its own."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * page_bytes / GIB
    figures = {
        "host_gib": resident,
        "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }
    if torch.cuda.is_available():
        figures["device_gib"] = torch.cuda.memory_allocated() / GIB
        figures["device_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return figures


class RunLog:
    """Writes a run's figures (rank 0), or nothing (the other ranks).

    Resuming at `step` removes what a later, lost part of the run had written beyond it. Filling
    the weights took `load_seconds`.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        step: int,
        total_steps: int,
        section: LogSection,
        load_seconds: float = 0.0,
    ):
        self._writing = rank == 0
        self._total_steps = total_steps
        self._every = section.log_every_steps
        self._first_step, self._started = step, time.monotonic()
        self._board: Any = None
        if not self._writing:
            return
        self._tables, self._has_named_tables = run_dir / EVALUATION_NAME, False
        path = run_dir / "metrics.jsonl"
        lost_seconds = _keep_lines_until(path, step)
        self._goodput = Goodput(run_dir / "time.json")
        self._goodput.started(load_seconds, lost_seconds)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""
        if section.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
            self._board.add_custom_scalars(LAYOUT)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True) if terminal else None

    def say(self, line: str) -> None:
        """A line for people, once in the job, without tearing the progress bar."""
        if not self._writing:
            return
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def train(self, step: int, figures: dict[str, float]) -> None:
        """Figures of update number `step` (1-based)."""
        if not self._writing:
            return
        time_spent = self._goodput.step(figures)
        self._draw({f"time/{name}": value for name, value in time_spent.items()}, step)
        self._record("train", step, figures | {"useful_fraction": time_spent["useful_fraction"]})
        auxiliary = "".join(f"{name} {figures[name]:.4f}  " for name in AUXILIARY if name in figures)
        line = (
            f"loss {figures['loss']:.4f}  {auxiliary}lr {figures['learning_rate']:.2e}  "
            f"grad {figures['gradient_norm']:.3f}  {figures['tokens_per_second']:,.0f} tok/s"
        )
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix_str(line, refresh=False)
        elif step % self._every == 0 or step == self._total_steps:
            pace = (time.monotonic() - self._started) / max(1, step - self._first_step)
            left = int(pace * (self._total_steps - step))
            clock = f"{left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"
            print(f"step {step}/{self._total_steps}  {line}  left {clock}", flush=True)

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Figures of an evaluation after `step` updates."""
        if not self._writing:
            return
        self._goodput.evaluation(figures.get("seconds", 0.0))
        self._record("evaluation", step, figures)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if name != "seconds")
        self.say(f"evaluation after step {step}: {shown}")

    def report(self, step: int, report: Mapping[str, str | NDArray[np.uint8]]) -> None:
        """The task's texts and pictures (H, W, 3) of an evaluation after `step` updates: for TensorBoard, and the
        texts for a file that holds those of the newest evaluation."""
        if not self._writing:
            return
        texts = {name: value for name, value in report.items() if isinstance(value, str)}
        if texts:
            tables = "".join(f"\n{name}\n\n{text}\n" for name, text in texts.items())
            try:
                self._tables.write_text(f"evaluation after step {step}\n{tables}", encoding="utf-8")
            except OSError as error:
                _LOG.warning("%s cannot be written (%s)", self._tables, error.strerror)
            if not self._has_named_tables:
                self._has_named_tables = True
                self.say(f"figures by label of the newest evaluation: {self._tables}")
        if self._board is None:
            return
        try:
            for name, value in report.items():
                tag = f"evaluation/{name}"
                if isinstance(value, str):  # four blanks before each line: Markdown leaves the columns as they are
                    self._board.add_text(tag, "".join(f"    {line}\n" for line in value.splitlines()), step)
                else:
                    self._board.add_image(tag, value, step, dataformats="HWC")
            self._board.flush()
        except OSError as error:  # its writer does not recover
            self._close_board(error)

    def ended(self) -> None:
        """The run is complete, or stops because it was asked to."""
        if self._writing:
            self._goodput.ended()

    def close(self) -> None:
        """Flush everything to storage."""
        if not self._writing:
            return
        self._write()
        self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()

    def _record(self, kind: str, step: int, figures: dict[str, float]) -> None:
        self._unwritten += (json.dumps({"kind": kind, "step": step, **figures}) + "\n").encode()
        self._write()
        self._draw({f"{kind}/{name}": value for name, value in figures.items() if name not in NOT_DRAWN}, step)

    def _draw(self, values: dict[str, float], step: int) -> None:
        """Scalars for TensorBoard."""
        if self._board is None:
            return
        try:
            for tag, value in values.items():
                self._board.add_scalar(tag, value, step)
            self._board.flush()
        except OSError as error:  # its writer does not recover
            self._close_board(error)

    def _close_board(self, error: OSError) -> None:
        _LOG.warning("TensorBoard files cannot be written (%s): none until the next start", error)
        self._board = None

    def _write(self) -> None:
        """Append what waits. A full disk does not end the training: lines wait until they fit."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            _LOG.warning("metrics.jsonl cannot be written (%s): %d bytes wait", error.strerror, len(self._unwritten))


def _keep_lines_until(path: Path, step: int) -> float:
    """Drop the lines of steps after `step` (all of them at 0), and a last line that a crash cut short.

    Returns the useful seconds of the steps that are gone.
    """
    if not path.exists():
        return 0.0
    kept, lost_seconds = [], 0.0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            figures = json.loads(line)
            if figures["step"] <= step and step > 0:
                kept.append(line + "\n")
            elif figures["kind"] == "train":
                lost_seconds += useful_seconds(figures)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
    return lost_seconds
