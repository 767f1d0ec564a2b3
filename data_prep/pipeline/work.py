"""The work of encoding: spans of files, the splits that are made of them, and what every process must know."""

import json
from collections.abc import Callable, Iterator, Sequence
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

    def takes(self, digest: int) -> bool:
        """True if a record with this hash belongs to the split."""
        return self.chosen is None or self.chosen.low <= digest < self.chosen.high


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


#: The hash that stands for a record without content: it belongs to train.
UNREADABLE_HASH = 2**64 - 1


def record_hash(record: Record) -> int:
    """64 bits from the content of a record alone, whatever its file, line and order of fields."""
    canonical = json.dumps(record.value, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_64_intdigest(canonical.encode("ascii"))


#: Takes the fault of a record, with the number of its piece and its line.
OnUnreadable = Callable[[int, int, BadDataError], None]
#: Of each split the records that wait to be encoded, and the number of the piece of each.
_Batches = dict[str, tuple[list[Record], list[int]]]


def batches_of(
    work: Work, splits: Sequence[SplitJob], read: list[int], on_unreadable: OnUnreadable, enough: Callable[[], bool]
) -> Iterator[tuple[str, list[Record], list[int]]]:
    """Batches of records of one split each, with the number of the piece of each record.

    Counts in `read` the records of every piece. `on_unreadable` gets those that cannot be read, perhaps before a
    batch with records before them. Reading ends early when `enough` says so. Raises BadDataError for a file that
    cannot be read on, after the batches before it.
    """
    batches: _Batches = {split.name: ([], []) for split in splits}
    waiting, size, number, broken = 0, 0, 0, None
    everything = batches[splits[0].name] if len(splits) == 1 and splits[0].chosen is None else None

    def on_fault(fault: BadDataError, line: int) -> None:
        nonlocal waiting
        read[number] += 1
        waiting += 1
        on_unreadable(number, line, fault)

    try:
        for number, (file, span) in enumerate(work.pieces):
            for record in read_records(file, span, on_fault):
                read[number] += 1
                waiting += 1
                size += record.num_characters or _characters(record.value)
                if everything is not None:
                    everything[0].append(record)
                    everything[1].append(number)
                else:
                    _deal(record, number, splits, batches)
                if size >= _BATCH_CHARACTERS or waiting >= _BATCH_RECORDS:
                    yield from _taken(batches)
                    waiting = size = 0
                    if enough():
                        return
    except BadDataError as error:
        broken = error
    yield from _taken(batches)  # those before the place where reading ended
    if broken is not None:
        raise broken


def _taken(batches: _Batches) -> Iterator[tuple[str, list[Record], list[int]]]:
    """The records that wait in `batches`, which are empty afterwards."""
    for name, (records, pieces) in batches.items():
        yield name, records[:], pieces[:]
        records.clear()
        pieces.clear()


def _deal(record: Record, piece: int, splits: Sequence[SplitJob], batches: _Batches) -> None:
    """Put a record into the batches of its splits."""
    digest = record_hash(record)
    for split in splits:
        if split.takes(digest):
            batches[split.name][0].append(record)
            batches[split.name][1].append(piece)


def _characters(value: Any) -> int:
    """Roughly what a record takes in memory: the characters of all its texts."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum([_characters(inner) for inner in value.values()])
    return sum([_characters(inner) for inner in value]) if isinstance(value, list) else 8
