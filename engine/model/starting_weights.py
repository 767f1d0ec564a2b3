"""Where the starting values of a model's weights come from: ranges of files, tensors in memory, or made of others."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.errors import DataError
from engine.model.model_files import FileTensor
from engine.tensor_files.range_reader import ReadRequest, read_ranges
from engine.tensor_files.slices import LiveSlice

_COMPARE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class DerivedWeights:
    """Weights `names` that are made whole, on every rank alike; `make` gives them by name, and the bytes it read."""

    names: tuple[str, ...]
    make: Callable[[], tuple[dict[str, Tensor], int]]


@dataclass
class StartingWeights:
    """Where the starting values of every parameter come from, by name, and those of buffers that a file holds.

    `stored`: tensors of files, one after the other. `whole`: tensors in memory, the same on every rank. `made`: made
    when asked for, one entry's tensors in memory at a time. `copies`: further stored tensors that
    must be equal to a tied weight.
    """

    stored: dict[str, list[FileTensor]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    made: list[DerivedWeights] = field(default_factory=list)
    copies: dict[str, list[FileTensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> "StartingWeights":
        """The values that a whole model in memory has; they live until these are let go of."""
        return cls(whole={name: parameter.detach() for name, parameter in model.named_parameters()})

    @property
    def num_bytes(self) -> int:
        """Of the tensors that are read by ranges."""
        return sum(tensor.num_bytes for tensors in self.stored.values() for tensor in tensors)

    def type_of(self, name: str) -> torch.dtype:
        """The type in which the values of a weight come: that of its file, fp32 for what is converted or made."""
        if name in self.stored:
            return self.stored[name][0].dtype
        return self.whole[name].dtype if name in self.whole else torch.float32

    def read_into(self, pieces: Iterable[LiveSlice]) -> int:
        """Fill `pieces`, converting types; returns the bytes read. No communication.

        Memory: what the range reader stages, and the tensors of one entry of `made`. Raises DataError.
        """
        requests: list[ReadRequest] = []
        made = []
        for piece in pieces:
            if piece.name in self.stored:
                requests += _requests(self.stored[piece.name], piece.start, piece.values)
            elif piece.name in self.whole:
                piece.values.copy_(self.whole[piece.name].reshape(-1)[piece.start : piece.stop])
            else:
                made.append(piece)
        num_bytes = read_ranges(requests)
        for entry in self.made:
            mine = [piece for piece in made if piece.name in entry.names]
            if mine:
                num_bytes += _make_into(entry, mine)
        if lost := {piece.name for piece in made} - {name for entry in self.made for name in entry.names}:
            raise RuntimeError(f"no starting values for {sorted(lost)}")
        return num_bytes

    def check_copies(self, pieces: Iterable[LiveSlice]) -> int:
        """DataError unless the copies of tied weights are equal to what `pieces` hold; returns the bytes read."""
        num_bytes = 0
        for piece in pieces:
            for copy in self.copies.get(piece.name, ()):
                step = _COMPARE_BYTES // piece.values.element_size()
                for start in range(0, len(piece.values), step):
                    here = piece.values[start : start + step]
                    there = torch.empty_like(here)
                    num_bytes += read_ranges(_requests([copy], piece.start + start, there))
                    if not torch.equal(here, there):
                        raise DataError(
                            f"{copy} and {self.stored[piece.name][0].name} differ, but config.json ties them to one "
                            "weight: set tie_word_embeddings to false there if they are two"
                        )
        return num_bytes


def _requests(tensors: list[FileTensor], start: int, values: Tensor) -> Iterator[ReadRequest]:
    """Elements of `tensors`, seen as one long tensor, from `start` on into the 1-D `values`."""
    position = 0
    for tensor in tensors:
        first, last = max(start, position), min(start + len(values), position + tensor.count)
        if first < last:
            offset_bytes = tensor.offset_bytes + (first - position) * tensor.dtype.itemsize
            yield ReadRequest(tensor.path, offset_bytes, tensor.dtype, values[first - start : last - start])
        position += tensor.count


def _make_into(entry: DerivedWeights, pieces: list[LiveSlice]) -> int:
    tensors, num_bytes = entry.make()
    for piece in pieces:
        piece.values.copy_(tensors[piece.name].reshape(-1)[piece.start : piece.stop])
    return num_bytes


def read_whole(tensor: FileTensor, dtype: torch.dtype | None = None) -> Tensor:
    """All of a stored tensor on the CPU, in its own type or `dtype`."""
    values = torch.empty(tensor.shape, dtype=dtype or tensor.dtype)
    read_ranges(_requests([tensor], 0, values.view(-1)))
    return values


def exchange_parameters(model: nn.Module, exchange: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Put `exchange(parameter)` in the place of every parameter, once for all modules that share it."""
    # The old ones are kept until the end: an id may not be given away twice.
    exchanged: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in exchanged:
                exchanged[id(parameter)] = (parameter, exchange(parameter))
            module._parameters[name] = exchanged[id(parameter)][1]
