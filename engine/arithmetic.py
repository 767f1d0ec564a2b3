"""The arithmetic that launcher and engine share: batches, steps, bytes, and the names of checkpoints and Hub models.

Each rule stands here once, so that a dry run promises what the run does. Imports no torch.
"""

import contextlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

#: What a trained parameter takes in a checkpoint and in files on NVMe: its master and two moments, in fp32.
STATE_BYTES_PER_PARAMETER = 12
#: The largest file of an export, unless the user says otherwise.
DEFAULT_SHARD_BYTES = 5 * 1000**3
_CHECKPOINT_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class StepBatch:
    """How the rows of one step fall on ranks.

    A rank takes `micro_rows` through the model at once; with `micro_tokens` it takes as many rows of
    similar length as fit, so that the number of micro-batches depends on the rows.
    """

    rows: int
    num_ranks: int
    micro_rows: int = 1
    micro_tokens: int | None = None

    @property
    def num_micro_batches(self) -> int:
        """Forward passes of every rank with `micro_rows`; equal on all ranks, as ZeRO-3 needs."""
        return -(-self.rows // (self.num_ranks * self.micro_rows))

    @property
    def text(self) -> str:
        """The formula, for people."""
        if self.micro_tokens is not None:
            return (
                f"{self.rows} rows over {self.num_ranks} ranks, in micro-batches of similar lengths of up to "
                f"{self.micro_tokens:,} tokens a rank"
            )
        return (
            f"{self.rows} rows = {self.num_ranks} ranks x {self.micro_rows} rows x {self.num_micro_batches} "
            "micro-batches"
        )

    @property
    def uneven_text(self) -> str:
        """The places that the last micro-batch lacks, for people; "" when it is full."""
        places = self.num_ranks * self.micro_rows
        last = self.rows - (self.num_micro_batches - 1) * places
        if self.micro_tokens is not None or last == places:
            return ""
        empty = max(0, self.num_ranks - last)
        idle = "" if not empty else f"; {empty} rank{'s run' if empty > 1 else ' runs'} it empty"
        return f"the last micro-batch has {last} rows for {places} places{idle}"


def total_steps(steps: int | None, epochs: float | None, epoch_rows: int, global_rows: int) -> int:
    """Optimizer updates of a run of `steps`, or else of `epochs` of `epoch_rows` rows, rounded up to whole steps."""
    if steps is not None:
        return steps
    assert epochs is not None
    return math.ceil(epochs * epoch_rows / global_rows)


def byte_count(text: str) -> int:
    """`5GB`, `200MB`, `1_000_000` as bytes, in decimal units as Hugging Face counts. Raises ValueError."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    if not number.strip().replace("_", "").isdecimal() or int(number) < 1:
        raise ValueError(f"write a size such as 5GB or 200MB, not {text}")
    return int(number) * unit


def is_hub_name(path: str) -> bool:
    """True if `path`, which is no folder here, can be a model's name on the Hub: owner/name."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def checkpoint_name(step: int) -> str:
    """The name of the folder that holds the checkpoint of `step`."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The step in a checkpoint folder's name; -1 for any other name."""
    match = _CHECKPOINT_NAME.fullmatch(name)
    return int(match[1]) if match else -1


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first, not verified. Any one process may call it."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if step_of(path.name) >= 0]
    return sorted(found, key=lambda path: step_of(path.name))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint of the highest step that has a manifest; None without one, and where this user may not look."""
    with contextlib.suppress(OSError):
        return next((path for path in reversed(list_checkpoints(run_dir)) if (path / "manifest.json").is_file()), None)
    return None
