"""The ids that a token store uses, counted from its tokens: a vocabulary can be larger."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from data_prep.token_store.store import TokenStore

ID_TYPES = ("uint16", "uint32")
_BLOCK_TOKENS = 1 << 23


def largest_id(store: "TokenStore") -> int:
    """The largest id of all tokens. The manifest has it; of an older store the tokens are read."""
    stored = store.manifest.get("largest_id")
    if isinstance(stored, int):
        return stored
    ids = store.load_array("input_ids", store.num_tokens, ID_TYPES)
    found = max((int(ids[first:stop].max()) for first, stop, _ in _blocks(store)), default=-1)
    store.release_memory()
    return found


def documents_with_ids_from(store: "TokenStore", first_id: int) -> Counter[int]:
    """Every id from `first_id` on that the tokens have, and the number of documents that have it."""
    ids = store.load_array("input_ids", store.num_tokens, ID_TYPES)
    counts: Counter[int] = Counter()
    for first, stop, ends in _blocks(store):
        block = ids[first:stop]
        places = np.flatnonzero(block >= first_id)
        pairs = np.stack([block[places].astype(np.int64), np.searchsorted(ends, places + first, side="right")])
        tokens, numbers = np.unique(np.unique(pairs, axis=1)[0], return_counts=True)
        counts.update(dict(zip(tokens.tolist(), numbers.tolist(), strict=True)))
    store.release_memory()
    return counts


def _blocks(store: "TokenStore") -> Iterator[tuple[int, int, np.ndarray]]:
    """First and last token of whole documents, about _BLOCK_TOKENS at a time, and the ends of those documents."""
    document = 0
    while document < store.num_documents:
        stop = max(document + 1, store.documents_within(document, store.num_documents, _BLOCK_TOKENS))
        begins, ends = store.borders_between(document, stop)
        yield int(begins[0]), int(ends[-1]), ends
        document = stop
