"""The draw of masks: which words of a document are masked, and what stands in their places.

Everything follows from the seed, the step and the number of the document in its store, through a keyed hash: no rank,
no micro-batch and no other document changes a mask. Shapes: D documents, N tokens of all of them, W words, U
masked tokens.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.tasks.task import Draw

if TYPE_CHECKING:
    from data_prep.token_store import TokenStore

#: Of the tokens of masked words, this share becomes the mask token and this one a random token; the others stay.
MASKED, RANDOM = 0.8, 0.1
#: The first token of a word in the store's column; its further tokens have 2, special tokens 0.
_FIRST = 1
_STEP = np.uint64(0x9E3779B97F4A7C15)  # an odd number: its multiples are all different
_WORDS, _PLACES, _IDS = (np.uint64(number) for number in (1, 2, 3))  # one kind of draw each

Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]


def chosen_tokens(pieces: NDArray[np.uint8], documents: Ids, lengths: Ids, draw: Draw) -> Flags:
    """bool [N]: the tokens of the words that are masked, whole words only.

    `pieces` [N] is the store's column of `documents` [D], one after the other, of `lengths` [D] tokens. Of each
    document the same share of its words is drawn, rounded, and one at least.
    """
    begins = pieces == _FIRST
    owners = np.repeat(np.arange(len(lengths)), lengths)[begins]  # [W]
    counts = np.bincount(owners, minlength=len(lengths))
    first = np.cumsum(counts) - counts
    numbers = np.arange(len(owners)) - first[owners]  # of each word in its document
    values = _mixed(_keys(documents, draw, _WORDS)[owners] + numbers.astype(np.uint64) * _STEP)
    # One number each to sort: the document, 24 bits of the draw, the word. No two are equal, so any sort will do.
    assert len(lengths) < 1 << 20 and int(counts.max(initial=0)) < 1 << 20, "more documents or words than fit a key"
    keys = owners.astype(np.uint64) << np.uint64(44) | values >> np.uint64(40) << np.uint64(20)
    drawn_first = np.sort(keys | numbers.astype(np.uint64)) & np.uint64((1 << 20) - 1)
    wanted = np.maximum(1, np.floor(draw.mask_fraction * counts + 0.5)).astype(np.int64)
    drawn = np.zeros(len(owners), dtype=bool)
    # The k-th of a document's words in the order of the draw stands where its k-th word does.
    drawn[first[owners] + drawn_first.astype(np.int64)] = numbers < wanted[owners]
    chosen: Flags = (pieces > 0) & drawn[np.maximum(np.cumsum(begins) - 1, 0)] if len(drawn) else pieces > 0
    return chosen


def masked_ids(store: "TokenStore", ids: Ids, chosen: Flags, documents: Ids, lengths: Ids, draw: Draw) -> Ids:
    """The mask token, a random token or the true one for each of the `chosen` [N] tokens, whose `ids` [U] these are."""
    places = np.flatnonzero(chosen)
    owners = np.repeat(np.arange(len(lengths)), lengths)[places]
    inside = (places - (np.cumsum(lengths) - lengths)[owners]).astype(np.uint64) * _STEP
    share = (_mixed(_keys(documents, draw, _PLACES)[owners] + inside) >> np.uint64(11)) * 2.0**-53
    others = _random_ids(store, _mixed(_keys(documents, draw, _IDS)[owners] + inside))
    kept = np.where(share < MASKED + RANDOM, others, ids)
    return np.where(share < MASKED, store.manifest["mask_id"], kept)


def _random_ids(store: "TokenStore", values: NDArray[np.uint64]) -> Ids:
    """An id for each value, all equally likely, among those up to the largest in use that are no control tokens.

    The model has rows for these, even where the tokenizer has more tokens than the model.
    """
    from data_prep.token_store import largest_id

    size = largest_id(store) + 1
    control = np.array([index for index in store.manifest["control_ids"] if index < size], dtype=np.int64)
    numbers = (values % np.uint64(size - len(control))).astype(np.int64)
    # The n-th ordinary id comes behind as many control ids as have at most n ordinary ids before them.
    return numbers + np.searchsorted(control - np.arange(len(control)), numbers, side="right")


def _keys(documents: Ids, draw: Draw, kind: np.uint64) -> NDArray[np.uint64]:
    """A key [D] for each document at this step, another one for each kind of draw."""
    base = _mixed(np.array([draw.seed], dtype=np.uint64) + _STEP)
    base = _mixed(base ^ np.uint64(draw.step))
    return _mixed(_mixed(base ^ documents.astype(np.uint64)) ^ kind)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: each bit of a value changes about half of the bits of the result."""
    with np.errstate(over="ignore"):
        mixed = values + _STEP
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
