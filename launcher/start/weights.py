"""How many weights a model folder holds, trained and frozen ones, from the headers of its files. Imports no torch."""

import json
import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from engine.arithmetic import STATE_BYTES_PER_PARAMETER
from engine.model.frozen import matches
from engine.sections import ModelSection

_MAX_HEADER_BYTES = 100_000_000
_WIDE_TYPES = ("F32", "F64")
_COMPUTED_BYTES = 2


@dataclass(frozen=True)
class Weights:
    """Numbers of weights: `trained`, and `frozen`, of which `wide` are stored in fp32."""

    trained: int
    frozen: int = 0
    wide: int = 0

    @property
    def count(self) -> int:
        """All of them."""
        return self.trained + self.frozen

    @property
    def checkpoint_bytes(self) -> int:
        """A checkpoint has the optimizer's state of what is trained, and frozen weights in the type of their file."""
        return self.trained * STATE_BYTES_PER_PARAMETER + self.frozen * 2 + self.wide * 2

    @property
    def frozen_bytes(self) -> int:
        """Frozen weights in memory: what is computed with, and the values of an fp32 file beside it."""
        return self.frozen * _COMPUTED_BYTES + self.wide * 4


def count_weights(section: ModelSection) -> Weights | None:
    """The elements of all tensors in a local model folder's safetensors files; None if unknown.

    Patterns of `freeze` are compared with the names in the files, which for most families are the model's.
    """
    files = sorted(Path(section.path).glob("*.safetensors")) if section.path else []
    tensors: dict[str, tuple[int, str]] = {}
    try:
        for path in files:
            with path.open("rb") as file:
                (header_bytes,) = struct.unpack("<Q", file.read(8))
                if header_bytes > _MAX_HEADER_BYTES:
                    return None
                header = json.loads(file.read(header_bytes))
            header.pop("__metadata__", None)
            tensors |= {name: (math.prod(entry["shape"]), entry["dtype"]) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None  # the model's own loader names the fault
    if not tensors:
        return None
    first = Counter(name.partition(".")[0] for name in tensors).most_common(1)[0][0]
    frozen = {name for name in tensors if any(matches(name, pattern, f"{first}.") for pattern in section.freeze)}
    return Weights(
        sum(count for name, (count, _) in tensors.items() if name not in frozen),
        sum(tensors[name][0] for name in frozen),
        sum(tensors[name][0] for name in frozen if tensors[name][1] in _WIDE_TYPES),
    )
