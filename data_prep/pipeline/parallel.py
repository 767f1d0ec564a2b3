"""Runs the encoding of spans in processes, accounts in input order."""

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess

from data_prep.chat.child import Proof
from data_prep.errors import PreparationError, RefusedError, StorageError
from data_prep.pipeline.parts import PartAccount
from data_prep.pipeline.work import Job, Work
from data_prep.pipeline.worker import Encoder, encode_in_worker, encode_work, open_in_worker, start_worker
from data_prep.tokenizer.tokenizer import Tokenizer


def num_processes(workers: int | None, num_tasks: int) -> int:
    """Processes for `num_tasks` spans: `workers`, or one for each core that this process may use."""
    return min(workers or len(os.sched_getaffinity(0)), num_tasks)


def encode_spans(
    job: Job, work: Sequence[Work], workers: int | None, tokenizer: Tokenizer, proof: Proof | None = None
) -> Iterator[dict[str, PartAccount]]:
    """Encode spans into the parts of every split; accounts in the order of `work`.

    A single process uses `tokenizer`, from which the job's files were written, and its threads. It is this one, but
    for conversations: what a template does in a single step can only be ended with its process.
    `proof` is that of their template, waited for while the processes open all else.
    The first error, by order, ends it; parts that are sealed by then stay.
    """
    number = num_processes(workers, len(work))
    if number <= 1 and proof is None:
        encoder = Encoder(job, tokenizer) if work else None
        for item in work:
            assert encoder is not None
            yield encode_work(encoder, item)
        return
    if number > 1:
        pool = ProcessPoolExecutor(number, get_context("spawn"), initializer=start_worker, initargs=(job,))
    else:
        pool = ProcessPoolExecutor(1, get_context("fork"), initializer=start_worker, initargs=(job, tokenizer))
    futures: list[Future[dict[str, PartAccount]]] = []
    processes: set[BaseProcess] = set()
    with pool:
        try:
            plan = None
            if proof is not None:
                for _ in range(number):
                    pool.submit(open_in_worker)
                plan = proof.result()
            for item in work:
                futures.append(pool.submit(encode_in_worker, item, plan))
                if len(futures) <= number:  # each of these has started a process
                    processes.update(active_children())
            for future in futures:
                yield future.result()
        except BrokenProcessPool as error:
            pool.shutdown(wait=True)  # then every exit code is known
            raise _why_it_broke([process.exitcode for process in processes]) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _why_it_broke(exit_codes: Sequence[int | None]) -> PreparationError:
    """What to say of a pool whose processes ended like this; the pool itself ends those that are left."""
    if -signal.SIGPROF in exit_codes:  # only template_sandbox.limits sets this clock
        return RefusedError("chat template: it takes too much time in a single step, with one of the records")
    kept = "finished parts are kept"
    died = next((code for code in exit_codes if code and code not in (-signal.SIGTERM, -signal.SIGKILL)), None)
    if died is None:
        return StorageError(
            "a worker process died, perhaps for lack of memory; set data.workers lower, and prepare again: " + kept
        )
    how = f"by signal {-died}" if died < 0 else f"with exit code {died}"
    return StorageError(f"a worker process ended {how}; prepare again: {kept}")
