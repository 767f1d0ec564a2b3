"""Runs the encoding of spans in processes, accounts in input order."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from data_prep.errors import StorageError
from data_prep.parts import PartAccount
from data_prep.tokenizer import Tokenizer
from data_prep.worker import Encoder, Job, Work, encode_in_worker, encode_work, start_worker


def num_processes(workers: int | None, num_tasks: int) -> int:
    """Processes for `num_tasks` spans: `workers`, or one for each core that this process may use."""
    return min(workers or len(os.sched_getaffinity(0)), num_tasks)


def encode_spans(
    job: Job, work: Sequence[Work], workers: int | None, tokenizer: Tokenizer
) -> Iterator[dict[str, PartAccount]]:
    """Encode spans into the parts of every split; accounts in the order of `work`.

    A single process is this one: it uses `tokenizer`, from which the job's files were written, and its threads.
    The first error, by order, ends it; parts that are sealed by then stay.
    """
    if num_processes(workers, len(work)) <= 1:
        encoder = Encoder(job, tokenizer) if work else None
        for item in work:
            assert encoder is not None
            yield encode_work(encoder, item)
        return
    pool = ProcessPoolExecutor(
        num_processes(workers, len(work)), get_context("spawn"), initializer=start_worker, initargs=(job,)
    )
    with pool:
        futures: list[Future[dict[str, PartAccount]]] = [pool.submit(encode_in_worker, item) for item in work]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool as error:
            raise StorageError(
                "a worker process died, perhaps for lack of memory; set data.workers lower, and prepare again:"
                " finished parts are kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
