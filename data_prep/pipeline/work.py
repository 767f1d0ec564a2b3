"""The work of encoding: spans of files, the splits that are made of them, and what every process must know."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import xxhash

from data_prep.config import DataConfig
from data_prep.errors import BadDataError
from data_prep.shapes.shape import Shape
from data_prep.sources.read import read_records
from data_prep.sources.records import Record, SourceFile, Span
from data_prep.tasks.data_task import DataTask

_BATCH_RECORDS = 1024
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class HashRange:
    """The records whose 64-bit hash lies in [low, high)."""

    low: int
    high: int


@dataclass(frozen=True)
class SplitJob:
    """A split that is made of the spans: which records it takes and where its parts go."""

    name: str
    chosen: HashRange | None  # None: every record
    parts_dir: Path


@dataclass(frozen=True)
class Job:
    """The values that every worker needs."""

    task: DataTask
    config: DataConfig
    tokenizer_dir: Path  # the folder that goes into the store, so that exactly it is what encodes
    chat_template: str | None
    now: datetime
    chats: bool  # whether records are conversations
    splits: tuple[SplitJob, ...]


@dataclass(frozen=True)
class Work:
    """A span of a large file, or of several small ones, what their records are, and the name of its parts."""

    part: str  # follows from the content of the spans
    pieces: tuple[tuple[SourceFile, Span], ...]
    shape: Shape


def record_hash(record: Record) -> int:
    """64 bits from the content of a record alone, whatever its file, line and order of fields."""
    canonical = json.dumps(record.value, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_64_intdigest(canonical.encode("ascii"))


def batches_of(
    work: Work, splits: Sequence[SplitJob], read: list[int]
) -> Iterator[tuple[str, list[Record], list[int]]]:
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
