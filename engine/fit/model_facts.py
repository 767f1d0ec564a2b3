"""The facts of a model that decide whether it fits the data; plain values, so that a child process can send them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Positions:
    """How many tokens of a document a model has positions for.

    table: it has a row for each position, and none beyond. trained: positions are computed (rotary), and its
    configuration names the length that it was made for.
    """

    count: int
    kind: Literal["table", "trained"]


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model without its weights. `name` says in messages where it comes from.

    `label_names` are those of its configuration, by number; `has_head`: its files have the weights for them.
    """

    name: str
    embedding_rows: int
    positions: Positions | None
    label_names: tuple[str, ...] = ()
    has_head: bool = False
