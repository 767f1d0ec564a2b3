"""Finds the first of equal documents by 128-bit hashes, in memory that does not grow with their number."""

from collections.abc import Sequence

import numpy as np

from data_prep.parts import Part

_DOCUMENTS_AT_ONCE = 1 << 22


def keep_first(parts: Sequence[Part]) -> list[np.ndarray]:
    """For every part, bool [documents]: whether no equal document comes before it in the order of the parts.

    Documents are looked at in groups of equal hash prefix, so one group is in memory at a time.
    """
    accounts = [part.account for part in parts]
    total = sum(account.num_documents for account in accounts)
    kept = [np.ones(account.num_documents, dtype=bool) for account in accounts]
    groups = max(1, -(-total // _DOCUMENTS_AT_ONCE))
    for group in range(groups):
        low, high, place = [], [], []
        first = 0
        for part in parts:
            for block in part.blocks():
                chosen = np.flatnonzero(block["hash_high"] % np.uint64(groups) == group)
                low.append(block["hash_low"][chosen])
                high.append(block["hash_high"][chosen])
                place.append(chosen + first)
                first += len(block["lengths"])
        if not low:
            continue
        lows, highs, places = np.concatenate(low), np.concatenate(high), np.concatenate(place)
        order = np.lexsort((places, lows, highs))
        same = np.zeros(len(order), dtype=bool)
        same[1:] = (lows[order[1:]] == lows[order[:-1]]) & (highs[order[1:]] == highs[order[:-1]])
        repeated = np.sort(places[order[same]])
        begins = np.cumsum([0, *(account.num_documents for account in accounts)])
        owners = np.searchsorted(begins, repeated, side="right") - 1
        for owner in np.unique(owners):
            kept[owner][repeated[owners == owner] - begins[owner]] = False
    return kept
