"""Finds the first of equal documents by 128-bit hashes, in memory that does not grow with their number."""

from collections.abc import Sequence

import numpy as np
import xxhash

from data_prep.encode.blocks import CUT_TARGETS, CUT_TOKENS, Block, Column, marks_of, values_per_document
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


def document_hashes(block: Block, of_task: Sequence[Column]) -> dict[str, np.ndarray]:
    """128 bits of everything a document trains, as columns ``hash_low`` and ``hash_high`` (uint64).

    The lengths are hashed with what they count out. Lines and numbers of records are places, not content.
    """
    columns = {**block.columns, "marks": marks_of(block.columns)}
    left_out = {"lines", "lengths", CUT_TOKENS, CUT_TARGETS}.union(
        column.name for column in of_task if column.holds == "record numbers"
    )
    left_out.update(column.lengths_name for column in of_task)
    pieces = []
    for name in (name for name in columns if name not in left_out):
        given = values_per_document(columns, name, of_task)
        counts = np.ones(block.num_documents, dtype=np.int64) if given is None else given.astype(np.int64)
        firsts = np.cumsum(counts) - counts
        pieces.append((np.ascontiguousarray(columns[name]), firsts.tolist(), counts.tolist()))
    digests = bytearray()
    for document in range(block.num_documents):
        digest = xxhash.xxh3_128()
        for column, firsts, counts in pieces:
            digest.update(counts[document].to_bytes(8, "little"))
            digest.update(column[firsts[document] : firsts[document] + counts[document]].data)
        digests += digest.digest()
    halves = np.frombuffer(bytes(digests), dtype=np.uint64).reshape(-1, 2)
    return {"hash_low": halves[:, 0].copy(), "hash_high": halves[:, 1].copy()}
