"""Runs work over the spans of the input in processes, results in input order, with a progress display."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import TracebackType
from typing import Any, Self, TypeVar

from tqdm import tqdm

from data_prep.errors import StorageError
from data_prep.records import Span
from data_prep.worker import Encoder, Job, SpanResult, encode_span, encode_span_in_worker, start_worker

Result = TypeVar("Result")
_PLAIN_LINE_SECONDS = 10.0


def _num_processes(workers: int | None, num_tasks: int) -> int:
    return min(workers or len(os.sched_getaffinity(0)), num_tasks)


def map_spans(
    function: Callable[..., Result], work: Sequence[tuple[Any, ...]], workers: int | None
) -> Iterator[Result]:
    """``function(*item)`` for every item, in order. The first error, by order, ends it."""
    if _num_processes(workers, len(work)) <= 1:
        yield from (function(*item) for item in work)
        return
    with ProcessPoolExecutor(_num_processes(workers, len(work)), get_context("spawn")) as pool:
        yield from _in_order(pool, function, work)


def encode_spans(job: Job, work: Sequence[tuple[int, str, Span]], workers: int | None) -> Iterator[SpanResult]:
    """Encode (index, path, span) items, in order; a single process keeps the tokenizer's own threads."""
    if _num_processes(workers, len(work)) <= 1:
        encoder = Encoder(job)
        yield from (encode_span(encoder, *item) for item in work)
        return
    pool = ProcessPoolExecutor(
        _num_processes(workers, len(work)), get_context("spawn"), initializer=start_worker, initargs=(job,)
    )
    with pool:
        yield from _in_order(pool, encode_span_in_worker, work)


def _in_order(
    pool: ProcessPoolExecutor, function: Callable[..., Result], work: Sequence[tuple[Any, ...]]
) -> Iterator[Result]:
    futures: list[Future[Result]] = [pool.submit(function, *item) for item in work]
    try:
        for future in futures:
            yield future.result()
    except BrokenProcessPool as error:
        raise StorageError("a worker process died, perhaps for lack of memory; set data.workers lower") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Progress:
    """A bar on a terminal, a plain line now and then in a log, nothing when not wanted. Counts bytes."""

    def __init__(self, label: str, total_bytes: int, shown: bool):
        self._label = label
        self._total = max(total_bytes, 1)
        self._done = 0
        self._shown = shown
        self._terminal = shown and sys.stderr.isatty()
        self._last_line = time.monotonic()
        self._bar = tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, disable=not self._terminal)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, num_bytes: int) -> None:
        """Count `num_bytes` more as done."""
        self._done += num_bytes
        self._bar.update(num_bytes)
        if self._shown and not self._terminal and time.monotonic() - self._last_line >= _PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            print(f"{self._label}: {self._done / self._total:.0%} of {self._total / 1e6:.1f} MB", flush=True)
