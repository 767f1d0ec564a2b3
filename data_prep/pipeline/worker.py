"""Encodes spans into part files, in worker processes. What it writes depends on the spans alone."""

import gc
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

import numpy as np

from data_prep.chat.child import Proof
from data_prep.encode.blocks import Block, Names
from data_prep.encode.content import Context, refuse_untrainable_at
from data_prep.errors import (
    BadDataError,
    PreparationError,
    RefusedError,
    StorageError,
    UntrainableError,
    overlong_message,
)
from data_prep.pipeline.deduplicate import document_hashes
from data_prep.pipeline.parts import PartAccount, PartWriter
from data_prep.pipeline.work import Job, Work, batches_of
from data_prep.shapes.shape import Shape, says_untrained, to_example
from data_prep.sources.read import check_unchanged
from data_prep.sources.records import Record
from data_prep.tokenizer.backends import open_backend
from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:  # with its template engine, which most data does without
    from data_prep.chat.format import ChatFormat


_COLLECT_AFTER_OBJECTS = 200_000


class Encoder:
    """A job with its tokenizer, backend and template opened, as each process holds it once."""

    def __init__(self, job: Job, tokenizer: Tokenizer | None = None):
        """Open all but the template, which `open_chat` does."""
        self.job = job
        self.tokenizer = tokenizer or open_tokenizer(str(job.tokenizer_dir))
        self._chat: ChatFormat | None = None
        with ThreadPoolExecutor(1) as thread:
            if job.chats:
                thread.submit(import_module, "data_prep.chat.format")  # meanwhile: it brings the template engine
            self._backend = open_backend(job.config.backend, self.tokenizer, rendered=job.chats)

    def open_chat(self, plan: str) -> None:
        """Open the template, of which `plan` is what its proof found."""
        from data_prep.chat.child import read_plan
        from data_prep.chat.format import ChatFormat

        job, tokenizer = self.job, self.tokenizer
        if self._chat is None:
            assert job.chat_template is not None
            names = tokenizer.special_tokens, tokenizer.control_strings
            self._chat = ChatFormat(job.chat_template, *names, job.now, job.config.chat, read_plan(plan))

    def context(self, names: Names) -> Context:
        """What the encode functions take, with a book for the names they meet."""
        config = self.job.config
        cuts = not self.job.task.packs and config.overlong == "truncate"
        return Context(
            tokenizer=self.tokenizer,
            backend=self._backend,
            chat=self._chat,
            names=names,
            train_on_prompt=config.chat.train_on_prompt,
            allow_untrained_stop=config.chat.allow_untrained_stop,
            limit_tokens=config.row_tokens if cuts else None,
            target_limit_tokens=config.target_tokens or config.row_tokens,
            row_tokens=config.row_tokens,
            stride_tokens=config.stride_tokens,
        )

    def encode(self, records: Sequence[Record], shape: Shape, context: Context) -> tuple[Block | None, Sequence[int]]:
        """A block of a batch of records (None if all were dropped), and which of them it holds, by index.

        Raises the BadDataError of the first faulty record, by line.
        """
        kept: Sequence[int] = range(len(records))
        while records:
            try:
                return self._encode(records, shape, context), kept
            except UntrainableError as error:
                if self.job.config.min_targets is None:
                    self._raise_first(records, shape, context)
                    raise
                gone = set(error.indices)
                left = [index for index in range(len(records)) if index not in gone]
                records, kept = [records[index] for index in left], [kept[index] for index in left]
            except BadDataError:
                self._raise_first(records, shape, context)
                raise
        return None, []

    def _raise_first(self, records: Sequence[Record], shape: Shape, context: Context) -> None:
        """Which of several faulty records comes first is known only when each is tried alone."""
        for record in records if len(records) > 1 else ():
            try:
                self._encode([record], shape, context)
            except UntrainableError:
                if self.job.config.min_targets is None:
                    raise

    def _encode(self, records: Sequence[Record], shape: Shape, context: Context) -> Block:
        untrained = [index for index, record in enumerate(records) if says_untrained(shape, record)]
        refuse_untrainable_at(untrained, records, "a field of the record says so")
        examples = [to_example(shape, record) for record in records]
        block = self.job.task.encode(records, examples, context)
        if self.job.config.overlong == "error":
            lengths, limit = block.columns["lengths"], self.job.config.row_tokens
            if len(lengths) and int(lengths.max()) > limit:
                place = int(np.argmax(lengths > limit))
                where = records[int(self.job.task.records_of(block)[place])].where
                raise BadDataError(overlong_message(where, int(lengths[place]), limit))
        return block


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
    """Open the encoder of this process, but for its template; what fails is told."""
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


@_collector_at_rest()
def encode_work(encoder: Encoder, work: Work) -> dict[str, PartAccount]:
    """Encode the records of some spans and seal their part of every split.

    Raises BadDataError; then no part is left.
    """
    job = encoder.job
    names = {split.name: Names() for split in job.splits}
    writers = {split.name: PartWriter(split.parts_dir, work.part, names[split.name]) for split in job.splits}
    contexts = {name: encoder.context(book) for name, book in names.items()}
    read = [0] * len(work.pieces)
    made = {name: np.zeros(len(work.pieces), dtype=np.int64) for name in names}
    taken = dict.fromkeys(names, 0)
    dropped = dict.fromkeys(names, 0)
    try:
        for name, batch, pieces in batches_of(work, job.splits, read):
            taken[name] += len(batch)
            if batch:
                block, kept = encoder.encode(batch, work.shape, contexts[name])
                dropped[name] += len(batch) - len(kept)
                if block is not None:
                    piece_of_record = np.array(pieces)[np.asarray(kept)]
                    made[name] += np.bincount(piece_of_record[job.task.records_of(block)], minlength=len(read))
                    if job.config.deduplicate:
                        block.columns.update(document_hashes(block, job.task.columns))
                    writers[name].write(block)
        for file, _ in work.pieces:
            check_unchanged(file)  # a part is known by the hashes of its files, so it must hold what was hashed
        return {
            name: writer.close(
                read, made[name].tolist(), taken[name], {"no_targets": dropped[name]} if dropped[name] else {}
            )
            for name, writer in writers.items()
        }
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise


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
