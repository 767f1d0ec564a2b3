"""Finds the first of equal documents by 128-bit hashes, in memory that does not grow with their number."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.parts import PartAccount, read_blocks

_DOCUMENTS_AT_ONCE = 1 << 22


def keep_first(parts_dir: Path, accounts: Sequence[PartAccount]) -> list[np.ndarray]:
    """For every part, bool [documents]: whether no equal document comes before it in the order of the parts.

    Documents are looked at in groups of equal hash prefix, so one group is in memory at a time.
    """
    total = sum(account.num_documents for account in accounts)
    kept = [np.ones(account.num_documents, dtype=bool) for account in accounts]
    groups = max(1, -(-total // _DOCUMENTS_AT_ONCE))
    for group in range(groups):
        low, high, place = [], [], []
        first = 0
        for index, account in enumerate(accounts):
            for block in read_blocks(parts_dir, index, account):
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
