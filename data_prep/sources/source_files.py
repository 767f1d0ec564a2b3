"""Which files a source of the run file means, and what kind each of them is."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.config import Format, SourceConfig
from data_prep.errors import DataConfigError, MissingInputError
from data_prep.sources.decompress import Compression, all_blocks, find_compression
from data_prep.sources.lines import BOM

#: Format by the end of a file's name, compression aside.
FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".text": "text",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".conllu": "conllu",
}
_TEXT_FORMATS = ("jsonl", "json", "squad", "csv", "tsv", "text", "conll", "conllu", "aligned")
_JSON_FAMILY = ("jsonl", "json", "squad")
_COMPRESSED = (".gz", ".zst", ".bz2")
_SNIFF_BYTES = 4 << 20

_SQUAD = re.compile(
    rb'\s*\{\s*(?:"version"\s*:\s*"[^"]*"\s*,\s*)?"data"\s*:\s*\[\s*\{(?=.{0,100000}?"paragraphs"\s*:\s*\[)', re.DOTALL
)
_ARRAY_VALUE = re.compile(rb'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\[\s*[\[{]')


def find_files(config: SourceConfig, dotted_key: str) -> list[str]:
    """What a path, glob or folder names, sorted."""
    assert config.path is not None
    path = Path(config.path).expanduser()
    if path.is_dir():
        with os.scandir(path) as entries:
            found = [entry.path for entry in entries if _fits(entry.name, config.format) and entry.is_file()]
        missing = f"the folder holds no {config.format or 'data'} file (a glob such as /**/*.txt names any)"
    elif path.exists():
        found = [str(path)]
    else:
        root, pattern = Path(path.anchor), str(path.relative_to(path.anchor))
        children = root.glob(pattern) if set("*?[") & set(config.path) else iter(())
        found = [str(child) for child in children if child.is_file()]
        missing = "no such file"
    if not found:
        raise MissingInputError(f"{config.path}: {missing} ({dotted_key}.path)")
    return sorted(found)


def _suffix(name: str) -> str:
    """The last ending of a file's name, in small letters, that is none of a compression."""
    endings = name.rpartition("/")[2].lower().lstrip(".").split(".")[1:]
    return next((f".{ending}" for ending in reversed(endings) if f".{ending}" not in _COMPRESSED), "")


def _fits(name: str, wanted: Format | None) -> bool:
    by_name = FORMATS.get(_suffix(name))
    if name.startswith(".") or by_name is None:
        return False
    family = _JSON_FAMILY if wanted in _JSON_FAMILY else ("conll", "text") if wanted == "conll" else (wanted,)
    return wanted is None or by_name in family


def find_formats(paths: list[str], config: SourceConfig, dotted_key: str) -> list[tuple[str, Format, Compression]]:
    """The format and compression of each file; all of one source are of one kind."""
    found: list[tuple[str, Format, Compression]] = []
    for path in paths:
        compression = find_compression(path)
        by_name = config.format or FORMATS.get(_suffix(path))
        if by_name is None:
            known = ", ".join(dict.fromkeys(FORMATS.values()))
            raise DataConfigError(
                f"{path}: its name does not tell its format; write the source as a mapping with `format:`"
                f" ({known}, squad); archives are not read ({dotted_key})"
            )
        if by_name == "json" and config.format is None:
            by_name = _sniff_json(all_blocks(path, compression, config.encoding))
        found.append((path, by_name, compression))
    kinds = {("jsonl" if name == "json" else name): path for path, name, _ in reversed(found)}
    if len(kinds) > 1:
        listed = ", ".join(f"{path} is {name}" for name, path in kinds.items())
        raise DataConfigError(f"{config.path}: files of several formats ({listed}); set {dotted_key}.format or a glob")
    for _, name, _ in found[:1]:
        check_keys(config, name, dotted_key)
    return found


def check_keys(config: SourceConfig, name: str, dotted_key: str) -> None:
    """Raise DataConfigError for a key that has no meaning for sources of this kind (a format, aligned, or hub)."""
    applies: dict[str, tuple[bool, tuple[str, ...]]] = {
        "encoding": (config.encoding is not None, _TEXT_FORMATS),
        "header": (config.header is not None, ("csv", "tsv")),
        "quoting": (not config.quoting, ("csv", "tsv")),
        "columns": (config.columns is not None, ("csv", "tsv", "conll", "json", "parquet", "arrow")),
        "document": (config.document is not None, ("text",)),
        "split": (config.split is not None, ("json", "hub")),
        "config": (config.config is not None, ("hub",)),
        "revision": (config.revision is not None, ("hub",)),
    }
    for key, (given, kinds) in applies.items():
        if given and name not in kinds:
            raise DataConfigError(f"{dotted_key}.{key} has no meaning for {name}, only for {', '.join(kinds)}")
    if config.header is False and config.columns is None:
        raise DataConfigError(f"{dotted_key}.header: false needs {dotted_key}.columns")
    if config.encoding is not None:
        try:
            "a".encode(config.encoding)
        except LookupError as error:
            raise DataConfigError(f"{dotted_key}.encoding: {error}") from error
    if name in ("aligned", "hub") and config.format is not None:
        raise DataConfigError(f"{dotted_key}.format has no meaning for {name}")


def _sniff_json(blocks: Iterator[bytes]) -> Format:
    """True if a .json file is an array, an object of arrays, SQuAD, or one object a line in disguise."""
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
