"""The first bytes of a file: what kind of JSON it is, and whether it is what its name says it is."""

import codecs
import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from data_prep.config import Format, SourceConfig
from data_prep.errors import BadDataError
from data_prep.sources.decompress import Compression, all_blocks
from data_prep.sources.lines import BOM

_SNIFF_BYTES = 4 << 20
_HEAD_BYTES = 64 << 10
_MARKS = {  # the byte-order marks of the longer ones first: that of UTF-16 begins that of UTF-32
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_MAGIC = {
    b"PAR1": "Parquet: write `format: parquet`",
    b"ARROW1": "Arrow: write `format: arrow`",
    b"PK\x03\x04": "a zip archive (.xlsx and .docx are such ones): save a table as .csv; of an archive of data files"
    " the name must end in .zip",
    b"%PDF": "a PDF: take its text out first",
    b"SQLite format 3": "an SQLite data base: write its table as .csv",
    b"\x93NUMPY": "a numpy array: write its values as .csv or JSON lines",
    b"version https://git-lfs": "a Git LFS pointer, not the data: `git lfs pull` brings it",
}

_SQUAD = re.compile(
    rb'\s*\{\s*(?:"version"\s*:\s*"[^"]*"\s*,\s*)?"data"\s*:\s*\[\s*\{(?=.{0,100000}?"paragraphs"\s*:\s*\[)', re.DOTALL
)
_ARRAY_VALUE = re.compile(rb'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\[\s*[\[{]')


def check_content(path: str, compression: Compression, name: Format, config: SourceConfig, dotted_key: str) -> None:
    """Raise BadDataError for a file that cannot be what its name says, with the line to write instead."""
    head = next(islice(all_blocks(path, compression), 1), b"")[:_HEAD_BYTES]
    found = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    if name in ("parquet", "arrow"):
        known = (b"PAR1",) if name == "parquet" else (b"ARROW1", b"\xff\xff\xff\xff")
        if not head.startswith(known) and (found is not None or _is_text(head)):
            found = found or (_text_kind(head, name) or "text: write `format:` with what it holds")
        else:
            found = None
    elif config.encoding is None:
        found = found or _encoding_of(head) or _text_kind(head, name) or _line_ends(head, name, config)
    if found is not None:
        raise BadDataError(f"{path}: is read as {name}, but its content is {found} ({dotted_key})")


def _is_text(head: bytes) -> bool:
    return bool(head.strip()) and b"\0" not in head and head[:1] in b' \t\r\n{["' + bytes(range(48, 123)) + BOM


def _encoding_of(head: bytes) -> str | None:
    """How to read a file that is in UTF-16 or UTF-32, with a byte-order mark or without."""
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if encoding is None and len(head) >= 8:
        zeros = [head[start::2].count(0) / len(head[start::2]) for start in (0, 1)]
        if max(zeros) > 0.4 and min(zeros) < 0.1:
            encoding = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    return None if encoding is None else f"{encoding.upper()} text, not UTF-8: write `encoding: {encoding}`"


def _text_kind(head: bytes, name: Format) -> str | None:
    """The format of text that is of another one, where its beginning shows that beyond doubt, and the line to write."""
    body = head.removeprefix(BOM).lstrip()
    first, ended, _ = body.partition(b"\n")
    whole = _object_or_none(first) is not None
    if name == "jsonl" and body[:1] == b"[":
        return "a JSON array: write `format: json`"
    if name == "jsonl" and ended and first.strip() == b"{":
        return (
            "JSON over several lines: for an array or an object of arrays write `format: json`; else put one object"
            " on a line"
        )
    if name != "text" and body[:14].lower() == b"<!doctype html":
        return "a web page, perhaps in place of the download"
    if name in ("csv", "tsv", "conll", "conllu", "conllup", "parquet", "arrow"):
        if whole:
            return "JSON lines: write `format: jsonl`"
        if re.match(rb"\[\s*\{", body):
            return "a JSON array: write `format: json`"
    return None


def _line_ends(head: bytes, name: Format, config: SourceConfig) -> str | None:
    if name in ("json", "squad") or config.document == "file" or b"\n" in head or head.count(b"\r") < 2:
        return None
    return "lines that end with a carriage return alone: write them anew, as with `tr '\\r' '\\n' < old > new`"


def sniff_json(blocks: Iterator[bytes]) -> Format:
    """The format of a .json file: json (an array, or an object of arrays), squad, or jsonl (an object a line)."""
    head = b""
    for block in blocks:
        head += block
        if len(head) >= _SNIFF_BYTES or b"\n" in head.strip():
            break
    head = head.removeprefix(BOM).lstrip()
    if not head.startswith(b"{"):
        return "json"
    if _SQUAD.match(head):
        return "squad"
    first, _, rest = head.partition(b"\n")
    value = _object_or_none(first)
    if value is None:  # an object over several lines, or the beginning of one
        return "json" if rest or _ARRAY_VALUE.match(head) else "jsonl"
    is_table = any(isinstance(item, list) and item and isinstance(item[0], dict | list) for item in value.values())
    return "json" if is_table and not rest.strip() and _ARRAY_VALUE.match(head) else "jsonl"


def _object_or_none(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
