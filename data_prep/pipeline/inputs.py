"""The sources of a run as units of work, the splits that are made of them, and where both have their folders."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.config import DataConfig, SourceConfig
from data_prep.pipeline.work import HashRange, Work
from data_prep.shapes.recognise import Shape
from data_prep.sources.records import SourceFile, Span
from data_prep.sources.spans import SPAN_BYTES
from data_prep.tasks.data_task import DataTask
from data_prep.tokenizer.tokenizer import Tokenizer

_PACKED = 4  # how many times as large compressed data is taken to be
_NOT_READING = {"path", "hub", "aligned", "name", "weight", "epochs"}  # keys of a source that change no example


@dataclass(frozen=True)
class Encoding:
    """How the records of a run become documents; the same for all its splits."""

    task: DataTask
    tokenizer: Tokenizer
    chat_template: str | None


@dataclass(frozen=True)
class Input:
    """One source of the run file: its files, cut into spans, and what its records are."""

    config: SourceConfig
    name: str
    files: tuple[SourceFile, ...]
    shape: Shape

    def reading_key(self) -> Any:
        """What of it changes the examples that a file gives, as JSON values."""
        return [self.config.model_dump(mode="json", exclude=_NOT_READING), self.shape.key()]

    @cached_property
    def work(self) -> tuple[Work, ...]:
        """Its spans in order; small ones are worked on together, up to about the size of a span."""
        work = []
        pieces: list[tuple[SourceFile, Span]] = []
        size = 0
        reading = self.reading_key()
        spans = [(file, span) for file in self.files for span in file.spans]
        for number, (file, span) in enumerate(spans, 1):
            pieces.append((file, span))
            size += num_bytes(file, span) * (_PACKED if file.compression != "none" else 1)
            if size >= SPAN_BYTES or number == len(spans):
                work.append(Work(_part_name(reading, pieces), tuple(pieces), self.shape))
                pieces, size = [], 0
        return tuple(work)


def _part_name(reading_key: Any, pieces: Sequence[tuple[SourceFile, Span]]) -> str:
    """The same for the same content read in the same way, wherever the files lie and whatever is beside them."""
    spans = [(file.format, file.compression, file.xxh3_128, span.start, span.stop) for file, span in pieces]
    return hashlib.sha256(json.dumps([reading_key, spans], sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Split:
    """One split to make: its name, which records of the input it takes, and the identity of content and rows."""

    name: str
    chosen: HashRange | None
    content_key: str
    store_key: str


@dataclass(frozen=True)
class Group:
    """Splits that are made of the same input, in one pass over it. `key` is the identity of how it is encoded."""

    splits: tuple[Split, ...]
    inputs: tuple[Input, ...]
    key: str

    @property
    def work(self) -> list[Work]:
        """Every span of the input, in order."""
        return [work for one in self.inputs for work in one.work]


def work_dir(config: DataConfig, group: Group) -> Path:
    """Where the parts of a group are made and kept until its stores are published.

    It belongs to an encoding, not to an input: after a faulty file is mended, the parts of the others count.
    """
    return config.store_dir / f".{group.key[:16]}.work"


def parts_dir(config: DataConfig, group: Group, split: Split) -> Path:
    """Where the parts of one split are: another share of the records is another folder."""
    chosen = "" if split.chosen is None else f"-{split.chosen.low:x}-{split.chosen.high:x}"
    return work_dir(config, group) / f"records{chosen}"


def store_path(config: DataConfig, split: Split) -> Path:
    """The folder of the finished store of `split`."""
    return config.store_dir / f"{split.name}-{split.store_key[:16]}"


def num_bytes(file: SourceFile, span: Span) -> int:
    """A span's share of its file: the units of spans are those of their format."""
    if len(file.spans) == 1:
        return file.size_bytes
    whole = sum(span.stop - span.start for span in file.spans)
    return file.size_bytes * (span.stop - span.start) // max(1, whole)
