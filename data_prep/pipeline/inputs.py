"""The sources of a run as units of work, the splits that are made of them, and where both have their folders."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.config import DataConfig, SourceConfig
from data_prep.errors import BadDataError, none_usable
from data_prep.pipeline.labels import KnownLabels
from data_prep.pipeline.source_names import source_names
from data_prep.pipeline.work import HashRange, Work
from data_prep.shapes.find_label_names import label_field, label_order, with_label_names
from data_prep.shapes.recognise import recognise
from data_prep.shapes.shape import Shape
from data_prep.shapes.turns import refuse_unknown_roles
from data_prep.sources.class_names import class_names
from data_prep.sources.read import read_records
from data_prep.sources.records import Record, SourceFile, Span
from data_prep.sources.scan import find_sources
from data_prep.sources.source_files import reads_other_ending
from data_prep.sources.spans import SPAN_BYTES
from data_prep.tasks import TASKS
from data_prep.tasks.data_task import DataTask
from data_prep.token_store import FORMAT_VERSION
from data_prep.tokenizer.tokenizer import Tokenizer

_RECOGNISED_FROM_RECORDS = 100
#: Keys of the data section that change the documents of a store; the others change their rows or nothing.
_CONTENT_KEYS = ("chat", "overlong", "min_targets", "deduplicate", "label_names", "stride_tokens", "target_tokens")
_ASSUMED_COMPRESSION = 4  # compressed data is taken to be so many times as large
_NOT_READING = {"path", "hub", "aligned", "name", "weight", "epochs"}  # keys of a source that change no example


#: Keys of a source that are no part of its identity where they are not given, as in stores made before they came.
_ONLY_IF_GIVEN = frozenset({"delimiter", "label_from"})


@dataclass(frozen=True)
class Preparation:
    """A run of ``prepare``: the values that all of its steps need."""

    config: DataConfig
    task: DataTask
    tokenizer: Tokenizer
    templates: Mapping[str, str]  # the tokenizer's own chat templates by their names
    chat_template: str | None  # the one that is used; None: not yet chosen, or there is none
    progress: bool  # whether people read along
    held_out_only: bool = False  # only the records of data.validation, whose labels the run file gives

    def say(self, line: str) -> None:
        """Print a line for people."""
        if self.progress:
            print(line, flush=True)


@dataclass(frozen=True)
class Input:
    """A source of the run file: its files, cut into spans, and what its records are."""

    config: SourceConfig
    name: str
    files: tuple[SourceFile, ...]
    shape: Shape

    def reading_key(self) -> Any:
        """The settings that change the examples that a file gives, as JSON values."""
        settings = self.config.model_dump(mode="json", exclude=_NOT_READING)
        given = {key: value for key, value in settings.items() if value is not None or key not in _ONLY_IF_GIVEN}
        return [given, self.shape.key()]

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
            size += num_bytes(file, span) * (_ASSUMED_COMPRESSION if file.compression != "none" else 1)
            if size >= SPAN_BYTES or number == len(spans):
                work.append(Work(_part_name(reading, pieces), tuple(pieces), self.shape))
                pieces, size = [], 0
        return tuple(work)


def _part_name(reading_key: Any, pieces: Sequence[tuple[SourceFile, Span]]) -> str:
    """The same for the same content read in the same way, wherever the files lie and whatever is beside them."""
    spans = [
        (file.format, file.compression, file.xxh3_128, span.start, span.stop)
        + (() if file.folder_label is None else (file.folder_label,))
        for file, span in pieces
    ]
    return hashlib.sha256(json.dumps([reading_key, spans], sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Split:
    """A split to make: its name, which records of the input it takes, and the identity of content and rows."""

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


def work_dir(run: Preparation, group: Group) -> Path:
    """The folder in which the parts of a group are made and kept until its stores are published.

    It belongs to an encoding, not to an input: after a faulty file is mended, the parts of the others count.
    """
    return run.config.store_dir / f".{group.key[:16]}.work"


def parts_dir(run: Preparation, group: Group, split: Split) -> Path:
    """The folder of the parts of one split: another share of the records is another folder."""
    chosen = "" if split.chosen is None else f"-{split.chosen.low:x}-{split.chosen.high:x}"
    return work_dir(run, group) / f"records{chosen}"


def store_path(run: Preparation, split: Split) -> Path:
    """The folder of the finished store of `split`."""
    return run.config.store_dir / f"{split.name}-{split.store_key[:16]}"


def num_bytes(file: SourceFile, span: Span) -> int:
    """A span's share of its file: the units of spans are those of their format."""
    if len(file.spans) == 1:
        return file.size_bytes
    whole = sum(span.stop - span.start for span in file.spans)
    return file.size_bytes * (span.stop - span.start) // max(1, whole)


def find_inputs(run: Preparation) -> dict[str, tuple[Input, ...]]:
    """The inputs of every split that has its own, hashed and recognised. Raises PreparationError."""
    found = {} if run.held_out_only else {"train": _inputs(run, run.config.train, "train")}
    if run.config.validation is not None:
        found["validation"] = _inputs(run, run.config.validation, "validation")
    return found


def find_groups(run: Preparation, inputs: Mapping[str, tuple[Input, ...]]) -> tuple[Group, ...]:
    """The splits of a run with their inputs. `run` has the chat template that goes with these."""
    config = run.config
    encoded = _encoding_key(run)
    if run.held_out_only:
        held_out = inputs["validation"]
        split = _split(config, "validation", None, _input_key(encoded, held_out, ""), held_out)
        return (Group((split,), held_out, encoded),)
    train = inputs["train"]
    whole = _input_key(encoded, train, "")
    share = config.validation_fraction
    if share is not None:
        border = int(share * 2**64)
        ranges = {"train": HashRange(border, 2**64), "validation": HashRange(0, border)}
        return (Group(tuple(_split(config, *one, whole, train) for one in ranges.items()), train, encoded),)
    groups = [Group((_split(config, "train", None, whole, train),), train, encoded)]
    if config.validation is not None:
        held_out = inputs["validation"]
        # Labels are numbered as in train, so a store of held-out records belongs to its training records.
        key = _input_key(encoded, held_out, "" if run.task.packs else whole)
        groups.append(Group((_split(config, "validation", None, key, held_out),), held_out, encoded))
    return tuple(groups)


def _inputs(run: Preparation, sources: tuple[SourceConfig, ...], key: str) -> tuple[Input, ...]:
    look = partial(_recognised, run)
    found = find_sources(sources, f"data.{key}", run.config.store_dir / ".cache", run.progress, look)
    names = source_names(sources, found)
    inputs = []
    for source, name, files in zip(sources, names, found, strict=True):
        first = _first_records(files[0])
        shape = _with_names(run, _recognised(run, first, source), first, files[0], key)
        read_as = f", read as {files[0].format}" if reads_other_ending(files[0].path) else ""
        count = ("1 file" if len(files) == 1 else f"{len(files)} files") + read_as
        run.say(f"{key} {name}: {shape.describe()}; {count}{_joining(run, shape)}")
        inputs.append(Input(source, name, tuple(files), shape))
    return tuple(inputs)


def _recognised(run: Preparation, first: Sequence[Record], source: SourceConfig) -> Shape:
    """The shape of the first records of a source."""
    shapes_of = {task.name: task.shapes for task in TASKS.values()}
    chat = run.config.chat
    shape = recognise(first, source, run.task.name, shapes_of, _told_later, chat.roles, chat.apply_to)
    if run.config.unusable == "error":
        refuse_unknown_roles(shape, first)
    return shape


def _with_names(run: Preparation, shape: Shape, first: Sequence[Record], file: SourceFile, key: str) -> Shape:
    """The shape with the names of its labels, where the run file or the data says them."""
    name = label_field(shape)
    own = None if name is None else class_names(file, name)
    may_be_unknown = key == "validation" and run.config.unknown_labels == "count_wrong"
    return with_label_names(shape, first, run.config.label_names, run.config.label_map, own, may_be_unknown)


def given_labels(run: Preparation, groups: Sequence[Group]) -> KnownLabels | None:
    """The labels in the order of their numbers, where the run file or the training data says it."""
    config = run.config
    own = [one.shape.labels.own for one in groups[0].inputs if one.shape.labels is not None]
    names = label_order(config.label_names, config.label_map, own)
    if names is None:
        return None
    key = "data.label_names" if config.label_names is not None else "data.label_map"
    return KnownLabels(names, key if config.label_names or config.label_map else "the description of the data")


def _joining(run: Preparation, shape: Shape) -> str:
    """How conversations and prompts become text, where that is not what everybody would expect."""
    if not run.task.takes_chats or shape.name == "text":
        return ""
    if not shape.gives_chats:
        how = f"`data.chat.apply_to: [{shape.name}]` renders them with it"
        return f"; prompt and response are joined as they stand, without a chat template ({how})"
    how = "; prompt and response are turns that the chat template renders" if shape.as_chat else ""
    if run.config.chat.template is None and not run.templates:
        how += "; the tokenizer has no chat template: the built-in User/Assistant one is used (data.chat.template)"
    return how


def _told_later(_fault: BadDataError, _line: int) -> None:
    """The `OnFault` of recognition: the record is met again when its span is encoded."""


def _first_records(file: SourceFile) -> list[Record]:
    """The first records of a file without those that cannot be read, which are reported when their span is encoded."""
    records: list[Record] = []
    faults: list[BadDataError] = []

    def on_fault(fault: BadDataError, _line: int) -> None:
        faults.append(fault)
        if len(faults) >= _RECOGNISED_FROM_RECORDS:
            raise fault

    try:
        records.extend(islice(read_records(file, on_fault=on_fault), _RECOGNISED_FROM_RECORDS))
    except BadDataError as fault:
        faults.append(fault)
    if not records:
        raise none_usable(faults) if faults else BadDataError(f"{file.label}: the file holds no records")
    return records


def _encoding_key(run: Preparation) -> str:
    """Identity of how records become documents, whatever the records are."""
    settings = run.config.model_dump(mode="json", include=set(_CONTENT_KEYS))
    settings["chat"] = run.config.chat.key()
    if run.config.tag_pieces != "first":  # stores made before this key have it not in theirs
        settings["tag_pieces"] = run.config.tag_pieces
    if run.task.packs:
        del settings["overlong"]  # what becomes of over-long documents is a matter of rows there
    else:
        settings["row_tokens"] = run.config.row_tokens
    files = run.tokenizer.all_files(run.chat_template)
    tokenizer = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    revised = {"revision": run.task.revision} if run.task.revision else {}
    return _key(
        {"format": FORMAT_VERSION, "task": run.task.name, "tokenizer": tokenizer, "settings": settings} | revised
    )


def _input_key(encoding_key: str, inputs: Sequence[Input], belongs_to: str) -> str:
    """Identity of the documents that an input becomes."""
    described = [
        [one.name, one.reading_key(), [(file.label, file.size_bytes, file.xxh3_128) for file in one.files]]
        for one in inputs
    ]
    return _key([encoding_key, belongs_to, described])


def _split(config: DataConfig, name: str, chosen: HashRange | None, input_key: str, inputs: Sequence[Input]) -> Split:
    content_key = _key([input_key, None if chosen is None else (chosen.low, chosen.high)])
    shares = [(one.config.weight, one.config.epochs) for one in inputs]
    rows = [config.row_tokens, config.packing, config.overlong, config.min_targets, shares]
    return Split(name, chosen, content_key, _key([content_key, rows]))


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
