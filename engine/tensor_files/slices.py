"""Parts of flattened parameters: what a rank owns, in memory and in a file."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["master", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of the flattened parameter `name`, at `offset` of this rank's buffer `buffer`."""

    name: str
    start: int
    stop: int
    buffer: int
    offset: int


@dataclass(frozen=True)
class LiveSlice:
    """Elements [start, stop) of the flattened parameter `name` and the live 1-D tensor that holds them.

    Reading `values` saves them, filling them in place loads them.
    """

    name: str
    start: int
    stop: int
    values: Tensor
