"""Which rows a step uses.

Everything here is a pure function of (seed, position in the endless stream of rows, sizes): no
iterator, no state, so resuming is arithmetic. The stream is one permutation of all rows an epoch,
one epoch after the other; a step takes the next ``global_rows`` of it, also across an epoch's end.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.token_store import RowSource
from engine.batches import Rows64

_ROUNDS = 4


def permuted(indices: Rows64, num_rows: int, seed: int, epoch: int | str) -> Rows64:
    """The places to which the epoch's permutation of ``range(num_rows)`` sends each of `indices`.

    A keyed Feistel network on the next even number of bits, walked until it falls inside the
    range: any index in constant time and memory, and the same on every numpy version.
    (Black & Rogaway 2002, "Ciphers with arbitrary finite domains".)
    """
    half_bits = max(1, math.ceil(math.log2(max(2, num_rows)) / 2))
    mask = np.uint64((1 << half_bits) - 1)
    digest = hashlib.sha256(f"fulltune rows {seed} {epoch}".encode()).digest()
    keys = np.frombuffer(digest, dtype="<u8", count=_ROUNDS)
    result = indices.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        value = result[outside]
        left, right = value >> np.uint64(half_bits), value & mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        result[outside] = (left << np.uint64(half_bits)) | right
        outside = result >= num_rows
    return result.astype(np.int64)


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A 64-bit finaliser (the constants are splitmix64's) keyed by `key`; wraps on purpose."""
    with np.errstate(over="ignore"):
        mixed = values + key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def rows_of_epoch(sources: Sequence[RowSource]) -> int:
    """Rows of one epoch."""
    return sum(source.rows_per_epoch for source in sources)


def stream_rows(position: int, count: int, sources: Sequence[RowSource], seed: int) -> Rows64:
    """Rows at [position, position + count) of the endless stream, shape (count,).

    An epoch is a permutation of its places; a source has as many of them as it has rows, unless the
    mixture says otherwise.
    """
    num_places = rows_of_epoch(sources)
    positions = np.arange(position, position + count, dtype=np.int64)
    rows = np.empty(count, dtype=np.int64)
    epochs = positions // num_places
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        places = permuted(positions[chosen] % num_places, num_places, seed, epoch)
        rows[chosen] = _rows_at(places, sources, seed, epoch)
    return rows


def _rows_at(places: Rows64, sources: Sequence[RowSource], seed: int, epoch: int) -> Rows64:
    """The rows at places of an epoch, which hold the sources one after the other.

    A source fills its places with all its rows, as often as they fit, and the rest with the next part
    of an order of its own that goes on from epoch to epoch: with half the rows an epoch, two epochs
    use each once. No row comes twice as often as another.
    """
    rows = np.empty(len(places), dtype=np.int64)
    ends = np.cumsum([source.rows_per_epoch for source in sources])
    which = np.searchsorted(ends, places, side="right")
    for number in np.unique(which).tolist():
        source = sources[number]
        here = which == number
        inner = places[here] - (int(ends[number]) - source.rows_per_epoch)
        repeats, rest = divmod(source.rows_per_epoch, source.num_rows)
        beyond = inner >= repeats * source.num_rows
        inner[~beyond] %= source.num_rows
        turn = (inner[beyond] - repeats * source.num_rows + epoch * rest) % source.num_rows
        inner[beyond] = permuted(turn, source.num_rows, seed, f"part of {number}")
        rows[here] = source.first_row + inner
    return rows
