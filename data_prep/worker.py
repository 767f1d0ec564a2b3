"""Encodes one span of one source into part files, in worker processes. What it writes depends on the span alone."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from data_prep.encode import Columns, Document, encode_causal_lm, encode_sequence_classification, flatten
from data_prep.errors import BadDataError
from data_prep.records import Record, Span, label_field, read_records
from data_prep.templates import ChatFormat
from data_prep.tokenizer import Tokenizer, open_tokenizer

Task = Literal["causal_lm", "sequence_classification"]

_BATCH_RECORDS = 256
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class HashRange:
    """The records whose 64-bit hash lies in [low, high)."""

    low: int
    high: int

    def holds(self, record: Record) -> bool:
        canonical = json.dumps(record.value, sort_keys=True, separators=(",", ":"))
        return self.low <= xxhash.xxh3_64_intdigest(canonical.encode("ascii")) < self.high


@dataclass(frozen=True)
class Job:
    """What every worker needs to know."""

    task: Task
    tokenizer_dir: Path  # the folder that goes into the store, so that exactly it is what encodes
    chat_template: str | None
    now: datetime
    label_names: tuple[str, ...]
    chosen: HashRange | None  # None: every record
    refuse_above_tokens: int | None  # a longer record is an error
    truncate_to_tokens: int | None  # classification: cut at encoding, so that special tokens stay
    parts_dir: Path


@dataclass(frozen=True)
class SpanResult:
    """What one span came to."""

    num_read: int
    num_other_split: int
    num_documents: int
    num_tokens: int
    num_targets: int
    num_truncated: int


def overlong_message(where: str, num_tokens: int, row_tokens: int) -> str:
    """The one line for a record that fits no row."""
    return (
        f"{where}: {num_tokens} tokens do not fit a row of {row_tokens} (data.row_tokens);"
        " raise it, or set data.overlong to drop, split or truncate"
    )


def id_type(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """The stored type of token ids."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


class Encoder:
    """A job with its tokenizer and template opened, as each process holds it once."""

    def __init__(self, job: Job):
        self.job = job
        self.tokenizer: Tokenizer = open_tokenizer(str(job.tokenizer_dir))
        self.chat = ChatFormat(job.chat_template, self.tokenizer, job.now) if job.chat_template is not None else None
        self.label_index = {name: index for index, name in enumerate(job.label_names)}

    def encode(self, records: list[Record]) -> list[Document]:
        """Documents of a batch of records. Raises the BadDataError of the first faulty one, by line."""
        try:
            return self._encode(records)
        except BadDataError:
            if len(records) > 1:
                for record in records:
                    self._encode([record])
            raise

    def _encode(self, records: list[Record]) -> list[Document]:
        match self.job.task:
            case "causal_lm":
                documents = encode_causal_lm(records, self.tokenizer, self.chat)
            case "sequence_classification":
                documents = encode_sequence_classification(
                    records, self.tokenizer, self.label_index, self.job.truncate_to_tokens
                )
        limit = self.job.refuse_above_tokens
        for record, document in zip(records, documents, strict=True):
            if limit is not None and len(document.input_ids) > limit:
                raise BadDataError(overlong_message(record.where, len(document.input_ids), limit))
        return documents


_encoder: Encoder | None = None


def start_worker(job: Job) -> None:
    """Initialise a worker process: one tokenizer thread each, since there is a process for every core."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(job)


def encode_span_in_worker(index: int, path: str, span: Span) -> SpanResult:
    """`encode_span` with the encoder of this process."""
    assert _encoder is not None
    return encode_span(_encoder, index, path, span)


def encode_span(encoder: Encoder, index: int, path: str, span: Span) -> SpanResult:
    """Encode the records of one span and write them as part files `index`. Raises BadDataError."""
    num_read = num_other = num_truncated = 0
    blocks: list[Columns] = []
    stored = id_type(encoder.tokenizer.vocab_size)
    for batch, read in _batches(path, span, encoder.job.chosen):
        num_read += read
        num_other += read - len(batch)
        documents = encoder.encode(batch)
        num_truncated += sum(document.truncated for document in documents)
        blocks.append(flatten(documents, stored))
    lengths = write_parts(encoder.job.parts_dir, index, blocks or [flatten([], stored)])
    marks = sum(int(block.marks.sum()) for block in blocks)
    targets = marks if encoder.job.task == "causal_lm" else len(lengths)
    return SpanResult(num_read, num_other, len(lengths), int(lengths.sum()), targets, num_truncated)


def _batches(path: str, span: Span, chosen: HashRange | None) -> Iterator[tuple[list[Record], int]]:
    """Batches of chosen records, each with the number of records read for it."""
    batch: list[Record] = []
    read = characters = 0
    unreadable: BadDataError | None = None
    try:
        for record in read_records(path, span):
            read += 1
            if chosen is None or chosen.holds(record):
                batch.append(record)
                characters += sum(len(value) for value in record.value.values() if isinstance(value, str))
            if len(batch) == _BATCH_RECORDS or characters >= _BATCH_CHARACTERS:
                yield batch, read
                batch, read, characters = [], 0, 0
    except BadDataError as error:
        unreadable = error
    yield batch, read  # before a fault on a later line is told: it may hold the first one
    if unreadable is not None:
        raise unreadable


PART_COLUMNS = ("input_ids", "marks", "lengths", "lines", "labels")


def part_path(parts_dir: Path, index: int, column: str) -> Path:
    """Raw values of one column of span `index`, without a header."""
    return parts_dir / f"{index:08d}.{column}"


def write_parts(parts_dir: Path, index: int, blocks: list[Columns]) -> np.ndarray:
    """Write the columns of a span; returns the document lengths."""
    for column in PART_COLUMNS:
        with part_path(parts_dir, index, column).open("wb") as file:
            for block in blocks:
                file.write(np.ascontiguousarray(getattr(block, column)).data)
    return np.concatenate([block.lengths for block in blocks]).astype(np.int64)


def collect_labels(path: str, span: Span, chosen: HashRange | None) -> list[str]:
    """The different labels of a span, sorted. Raises BadDataError for a record without one."""
    records = read_records(path, span)
    return sorted({label_field(record) for record in records if chosen is None or chosen.holds(record)})
