"""What reading is about: records, and the files and spans they come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from data_prep.config import Format, SourceConfig
from data_prep.errors import BadDataError
from data_prep.sources.decompress import Compression


class Record(NamedTuple):
    """An input object, its place for people (``file:line``), and the line, row or element as a number from 1.

    `num_characters`: roughly what its texts take in memory, where the reader knows. `sound`: the reader has seen to
    it that UTF-8 can hold all its texts. `num_nulls`: nulls inside of its fields that a table has and the record may
    not have had, which are left out. `item_lines`: the line of each word, where a record has a word a line.
    """

    value: dict[str, Any]
    where: str
    line: int
    num_characters: int = 0
    sound: bool = False
    num_nulls: int = 0
    item_lines: Sequence[int] = ()

    def place(self, item: int) -> str:
        """The place of item number `item` (from 0) of the record: its own line, where it has one."""
        if item >= len(self.item_lines):
            return self.where
        return f"{self.where.rpartition(':')[0]}:{self.item_lines[item]}"


@dataclass(frozen=True)
class Span:
    """A piece of one source: [start, stop) in bytes, row groups, batches or lines, whatever its format counts in.

    `first_line` is the number (from 1) of its first line, row or item.
    """

    start: int
    stop: int
    first_line: int


#: The field that `label_from` adds to records.
LABEL_FIELD = "label"

#: The span of what cannot be cut: compressed, not in UTF-8, or a stream whose batches need those before them.
WHOLE_FILE = Span(0, 0, 1)


@dataclass(frozen=True)
class AlignedFile:
    """One of the text files whose equal lines belong together."""

    field: str
    path: str
    compression: Compression
    size_bytes: int
    modified_ns: int
    xxh3_128: str
    offsets: tuple[int, ...]  # byte where each span begins; none for WHOLE_FILE


@dataclass(frozen=True)
class SourceFile:
    """One input file: what it is, its identity, and the spans it is worked on in, the same for any number of workers.

    Of aligned files `path` is the first, `size_bytes` the sum, `xxh3_128` a hash of all and their field names.
    """

    path: str  # what is opened; of a data set on the Hub, where its records lie on this machine
    label: str  # what people are shown
    format: Format | Literal["aligned"]
    compression: Compression
    config: SourceConfig
    size_bytes: int
    modified_ns: int
    xxh3_128: str
    spans: tuple[Span, ...]
    aligned: tuple[AlignedFile, ...] = ()
    folder_label: str | None = None  # the label of all its records, where `label_from` takes it from the file's place


#: What records are counted in, where it is not the line they begin in.
UNITS = {"json": "element", "squad": "article", "parquet": "row", "arrow": "row"}


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object")


def checked_text(value: Any, what: str, where: str) -> str:
    """`value` if it is a text that UTF-8 can hold; else a BadDataError beginning with `where` and `what`."""
    if not isinstance(value, str):
        reason = "null_field" if value is None else "wrong_type"
        raise BadDataError(f"{where}: {what} must be text, not {kind(value)}", reason)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            fault = f"{where}: {what} holds half of a surrogate pair at character {error.start}"
            raise BadDataError(fault, "half_character") from error
    return value
