"""What there is to encode: spans of files, the splits that are made of them, and what every process must know."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import xxhash

from data_prep.config import DataConfig
from data_prep.shapes.recognise import Shape
from data_prep.sources.records import Record, SourceFile, Span
from data_prep.tasks.data_task import DataTask


@dataclass(frozen=True)
class HashRange:
    """The records whose 64-bit hash lies in [low, high)."""

    low: int
    high: int


@dataclass(frozen=True)
class SplitJob:
    """One split that is made of the spans: which records it takes and where its parts go."""

    name: str
    chosen: HashRange | None  # None: every record
    parts_dir: Path


@dataclass(frozen=True)
class Job:
    """What every worker needs to know."""

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
