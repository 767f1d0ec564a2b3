"""Encodes spans into part files, in worker processes. What it writes depends on the spans alone."""

import gc
import os
import signal
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess

import numpy as np

from data_prep.chat.child import Proof
from data_prep.encode.blocks import Names
from data_prep.errors import (
    MOST_LISTED,
    OVERLONG,
    BadDataError,
    FatalDataError,
    Finding,
    FindingsError,
    PreparationError,
    RefusedError,
    StorageError,
)
from data_prep.pipeline.deduplicate import document_hashes
from data_prep.pipeline.encoder import Encoder
from data_prep.pipeline.findings import Unusable, refused
from data_prep.pipeline.parts import PartAccount, PartWriter
from data_prep.pipeline.work import UNREADABLE_HASH, Job, SplitJob, Work, batches_of
from data_prep.sources.read import check_unchanged
from data_prep.sources.records import Record
from data_prep.tokenizer.tokenizer import Tokenizer

_COLLECT_AFTER_OBJECTS = 200_000


_job: Job | None = None
_tokenizer: Tokenizer | None = None
_encoder: Encoder | None = None


def start_worker(job: Job, tokenizer: Tokenizer | None = None) -> None:
    """Initialise a worker process, which ends when the one that started it is gone.

    Without `tokenizer` it will open the job's own and give it one thread: there is a process for every core.
    """
    global _job, _tokenizer
    if tokenizer is None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _job, _tokenizer = job, tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def open_in_worker() -> None:
    """Open the encoder of this process, but for its template."""
    global _encoder
    if _encoder is None:
        assert _job is not None
        _encoder = Encoder(_job, _tokenizer)


def encode_in_worker(work: Work, plan: str | None) -> dict[str, PartAccount]:
    """`encode_work` with the encoder of this process; `plan` is that of the template, where there are conversations."""
    open_in_worker()
    assert _encoder is not None
    if plan is not None:
        _encoder.open_chat(plan)
    return encode_work(_encoder, work)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Let Python look for cycles rarely: records make many objects and no cycles, and looking costs a quarter."""
    thresholds = gc.get_threshold()
    gc.set_threshold(_COLLECT_AFTER_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


class _Draft:
    """A split of a part in the making."""

    def __init__(self, encoder: Encoder, work: Work, split: SplitJob):
        names = Names()
        self.split = split
        self.unusable = Unusable()
        self.writer = PartWriter(split.parts_dir, work.part, names)
        self._encoder, self._work = encoder, work
        self._context = encoder.context(names)
        self._made = np.zeros(len(work.pieces), dtype=np.int64)
        self._taken = 0

    def add_unreadable(self, piece: int, line: int, fault: BadDataError) -> None:
        """Note a record that has no content to choose a split by."""
        if self.split.takes(UNREADABLE_HASH):
            self._taken += 1
            self.unusable.add(self._work, piece, line, fault)

    def add(self, batch: Sequence[Record], pieces: Sequence[int]) -> None:
        """Encode a batch of records, each from the piece with its number."""

        def on_fault(index: int, fault: BadDataError) -> None:
            self.unusable.add(self._work, pieces[index], batch[index].line, fault)

        job = self._encoder.job
        self._taken += len(batch)
        block, kept = self._encoder.encode(batch, self._work.shape, self._context, on_fault)
        if block is not None:
            piece_of_record = np.array(pieces)[np.asarray(kept)]
            self._made += np.bincount(piece_of_record[job.task.records_of(block)], minlength=len(self._made))
            if job.config.deduplicate:
                block.columns.update(document_hashes(block, job.task.columns))
            self.writer.write(block)

    def close(self, read: list[int]) -> PartAccount:
        """Seal the part; `read` has the records of each piece."""
        counts = dict(self.unusable.counts)
        return self.writer.close(read, self._made.tolist(), self._taken, counts, self.unusable.first())


@_collector_at_rest()
def encode_work(encoder: Encoder, work: Work) -> dict[str, PartAccount]:
    """Encode the records of some spans and seal their part of every split.

    Raises BadDataError; then no part is left.
    """
    drafts = {split.name: _Draft(encoder, work, split) for split in encoder.job.splits}
    try:
        read = _fill(encoder.job, work, drafts)
        return {name: draft.close(read) for name, draft in drafts.items()}
    except BaseException:
        for draft in drafts.values():
            draft.writer.abandon()
        raise


def _fill(job: Job, work: Work, drafts: Mapping[str, _Draft]) -> list[int]:
    """Encode all records of `work`; returns how many each piece has.

    Raises FindingsError for records that the settings do not let go: when they are enough for a message, or where
    the part, which belongs to other settings too, must not be sealed.
    """
    read = [0] * len(work.pieces)

    def on_unreadable(piece: int, line: int, fault: BadDataError) -> None:
        for draft in drafts.values():
            draft.add_unreadable(piece, line, fault)

    def enough() -> bool:
        return sum(refused(draft.unusable.counts, job.config) for draft in drafts.values()) >= MOST_LISTED

    try:
        for name, batch, pieces in batches_of(work, job.splits, read, on_unreadable, enough):
            if batch:
                drafts[name].add(batch, pieces)
    except FatalDataError:
        raise
    except BadDataError as error:
        _refuse(job, drafts, str(error))
        raise
    for file, _ in work.pieces:
        check_unchanged(file)  # a part is known by the hashes of its files, so it must hold what was hashed
    if enough() or any(OVERLONG in draft.unusable.counts for draft in drafts.values()):
        _refuse(job, drafts, None)
    return read


def _refuse(job: Job, drafts: Mapping[str, _Draft], then: str | None) -> None:
    """Raise FindingsError for the records that the settings do not let go, if there are any."""
    first = [finding for draft in drafts.values() for finding in draft.unusable.first()]
    findings = [finding for finding in first if refused({finding.reason: 1}, job.config)]
    if findings:
        raise FindingsError(sorted(findings, key=Finding.place)[:MOST_LISTED], then)


def num_processes(workers: int | None, num_tasks: int) -> int:
    """Processes for `num_tasks` spans: `workers`, or one for each core that this process may use."""
    return min(workers or len(os.sched_getaffinity(0)), num_tasks)


def encode_spans(
    job: Job, work: Sequence[Work], workers: int | None, tokenizer: Tokenizer, proof: Proof | None = None
) -> Generator[dict[str, PartAccount]]:
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
    pool = _open_pool(job, number, tokenizer)
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


def _open_pool(job: Job, number: int, tokenizer: Tokenizer) -> ProcessPoolExecutor:
    """Processes that start as copies of nothing, or one that is a copy of this process and has its `tokenizer`."""
    if number > 1:
        return ProcessPoolExecutor(number, get_context("spawn"), initializer=start_worker, initargs=(job,))
    return ProcessPoolExecutor(1, get_context("fork"), initializer=start_worker, initargs=(job, tokenizer))


def _why_it_broke(exit_codes: Sequence[int | None]) -> PreparationError:
    """The message for a pool whose processes ended like this; the pool itself ends those that are left."""
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
