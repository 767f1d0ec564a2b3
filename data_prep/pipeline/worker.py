"""Encodes spans of one source into part files, in worker processes. What it writes depends on the spans alone."""

import gc
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import parent_process
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.encode.blocks import Block, Names
from data_prep.encode.content import Context
from data_prep.errors import BadDataError, UntrainableError, overlong_message
from data_prep.pipeline.deduplicate import document_hashes
from data_prep.pipeline.parts import PartAccount, PartWriter
from data_prep.pipeline.work import Job, SplitJob, Work, record_hash
from data_prep.shapes.recognise import Shape, to_example
from data_prep.sources.records import Record
from data_prep.sources.sources import check_unchanged, read_records
from data_prep.tokenizer.backends import open_backend
from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:  # with its template engine, which most data does without
    from data_prep.chat.format import ChatFormat


_BATCH_RECORDS = 1024
_BATCH_CHARACTERS = 1 << 20
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
        examples = [to_example(shape, record) for record in records]
        block = self.job.task.encode(records, examples, context)
        if self.job.config.overlong == "error":
            lengths, limit = block.columns["lengths"], self.job.config.row_tokens
            if len(lengths) and int(lengths.max()) > limit:
                place = int(np.argmax(lengths > limit))
                raise BadDataError(overlong_message(records[place].where, int(lengths[place]), limit))
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
        for name, batch, pieces in _batches(work, job.splits, read):
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


def _batches(work: Work, splits: Sequence[SplitJob], read: list[int]) -> Iterator[tuple[str, list[Record], list[int]]]:
    """Batches of records of one split each, with the number of the piece of each record.

    Counts in `read` the records of every piece.
    """
    batches: dict[str, tuple[list[Record], list[int]]] = {split.name: ([], []) for split in splits}
    waiting = size = 0
    unreadable: BadDataError | None = None
    everything = batches[splits[0].name] if len(splits) == 1 and splits[0].chosen is None else None
    try:
        for number, (file, span) in enumerate(work.pieces):
            for record in read_records(file, span):
                read[number] += 1
                waiting += 1
                size += record.num_characters or _characters(record.value)
                if everything is not None:
                    everything[0].append(record)
                    everything[1].append(number)
                else:
                    digest = record_hash(record)
                    for split in splits:
                        if split.chosen is None or split.chosen.low <= digest < split.chosen.high:
                            batches[split.name][0].append(record)
                            batches[split.name][1].append(number)
                if size >= _BATCH_CHARACTERS or waiting >= _BATCH_RECORDS:
                    for name, (records, pieces) in batches.items():
                        yield name, records[:], pieces[:]
                        records.clear()
                        pieces.clear()
                    waiting = size = 0
    except BadDataError as error:
        unreadable = error
    for name, (records, pieces) in batches.items():  # before a fault on a later line is told: they may hold the first
        yield name, records, pieces
    if unreadable is not None:
        raise unreadable


def _characters(value: Any) -> int:
    """Roughly what a record takes in memory: the characters of all its texts."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum([_characters(inner) for inner in value.values()])
    return sum([_characters(inner) for inner in value]) if isinstance(value, list) else 8
