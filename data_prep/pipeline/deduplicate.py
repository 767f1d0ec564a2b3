"""Finds the first of equal documents by 128-bit hashes, in memory that does not grow with their number."""

from collections.abc import Sequence

import numpy as np
import xxhash

from data_prep.encode.blocks import Block, marks_of
from data_prep.pipeline.parts import Part

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


def document_hashes(block: Block) -> dict[str, np.ndarray]:
    """128 bits of everything a document trains, as columns ``hash_low`` and ``hash_high`` (uint64)."""
    columns = {**block.columns, "marks": marks_of(block.columns)}
    starts = np.cumsum(columns["lengths"], dtype=np.int64) - columns["lengths"]
    pieces = []
    for name, column in columns.items():
        if name in ("lines", "lengths", "questions") or name.endswith("_lengths"):
            continue
        if f"{name}_lengths" in columns:
            counts = columns[f"{name}_lengths"].astype(np.int64)
            firsts = np.cumsum(counts) - counts
        elif len(column) == block.num_tokens and name in ("input_ids", "marks", "tags"):
            firsts, counts = starts, columns["lengths"].astype(np.int64)
        else:
            firsts, counts = np.arange(block.num_documents), np.ones(block.num_documents, dtype=np.int64)
        pieces.append((np.ascontiguousarray(column), firsts.tolist(), counts.tolist()))
    digests = bytearray()
    for document in range(block.num_documents):
        digest = xxhash.xxh3_128()
        for column, firsts, counts in pieces:
            digest.update(counts[document].to_bytes(8, "little"))
            digest.update(column[firsts[document] : firsts[document] + counts[document]].data)
        digests += digest.digest()
    halves = np.frombuffer(bytes(digests), dtype=np.uint64).reshape(-1, 2)
    return {"hash_low": halves[:, 0].copy(), "hash_high": halves[:, 1].copy()}
