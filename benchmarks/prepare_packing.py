"""Packing, random access and seeking, timed in one process; run by benchmarks/prepare.py. Prints one JSON object.

    python benchmarks/prepare_packing.py STORE --rounds 3 --row-lengths 2048 8192 --pack-documents 10000000

Lengths are drawn with replacement from the documents of STORE (seed 0), those above a row cut to a row, and as many
as fill 4,500 rows; the timed packings take `--pack-documents` of them. Row access goes through the store's plan and
gives the tensors of a training batch. Seeking finds 512 rows of the endless stream at position 10^9 of 10^10.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.rows.pack import pack_rows
from data_prep.token_store import TokenStore
from data_prep.token_store.rows import RowSource, open_rows

FILL_ROWS = 4500
ROWS_READ = 400


def cpu_seconds() -> float:
    """User and system seconds of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def median_cpu(work: Callable[[], object], rounds: int) -> float:
    """Median CPU seconds of `work`."""
    seconds = []
    for _ in range(rounds):
        before = cpu_seconds()
        work()
        seconds.append(cpu_seconds() - before)
    return statistics.median(seconds)


def drawn(lengths: np.ndarray, count: int, row_tokens: int) -> np.ndarray:
    """`count` of the lengths, uint32, none above a row."""
    chosen = np.random.default_rng(0).choice(lengths, count)
    return np.minimum(chosen, row_tokens).astype(np.uint32)


def fill(lengths: np.ndarray, row_tokens: int) -> float:
    """Share of the slots of rows that hold a token."""
    sample = drawn(lengths, int(FILL_ROWS * row_tokens / np.minimum(lengths, row_tokens).mean()), row_tokens)
    _, ends = pack_rows(sample, row_tokens)
    return float(sample.sum(dtype=np.int64)) / (len(ends) * row_tokens)


def read_microseconds(store: TokenStore, rounds: int) -> float:
    """Median CPU time of the batch of one row at a random place, in microseconds per 8,192 tokens."""
    from engine.batches import flat_batch

    rows = open_rows(store, store.manifest["row_tokens"])
    places = np.random.default_rng(0).choice(rows.num_rows, ROWS_READ)
    times = []
    for _ in range(rounds):
        for row in places:
            before = time.thread_time()
            batch = flat_batch(store, rows, np.array([row]), 0)
            times.append((time.thread_time() - before) / batch.num_tokens)
    return statistics.median(times) * 8192 * 1e6


def seek_milliseconds(rounds: int) -> float:
    """Median CPU time to find the 512 rows at position 10^9 of a stream of 10^10 rows an epoch."""
    from engine.row_stream import stream_rows

    sources = [RowSource("all", 0, 10**10, 10**10)]
    stream_rows(0, 512, sources, seed=1)
    return median_cpu(lambda: stream_rows(10**9, 512, sources, seed=1), 5 * rounds) * 1e3


def main() -> None:
    """Time all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--row-lengths", type=int, nargs="+", default=[2048, 8192, 32768, 131072])
    parser.add_argument("--pack-documents", type=int, default=10**7)
    arguments = parser.parse_args()
    store = TokenStore.open(arguments.store)
    lengths = store.document_lengths
    result: dict[str, Any] = {"mean_length": float(lengths.mean())}
    for row_tokens in arguments.row_lengths:
        result[f"fill_{row_tokens}"] = fill(lengths, row_tokens)
    for name, row_tokens in (("pack_1e7_8k_seconds", 8192), ("pack_1e7_128k_seconds", 131072)):
        sample = drawn(lengths, arguments.pack_documents, row_tokens)
        seconds = median_cpu(
            lambda sample=sample, row_tokens=row_tokens: pack_rows(sample, row_tokens), arguments.rounds
        )
        result[name] = seconds * 10**7 / arguments.pack_documents
    result["gather_8192_microseconds"] = read_microseconds(store, arguments.rounds)
    result["seek_1e9_milliseconds"] = seek_milliseconds(arguments.rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
