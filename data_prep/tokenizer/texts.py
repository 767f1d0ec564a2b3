"""The texts that tokenizers learn from: read one after the other, some held out to measure on."""

import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.config import SourceConfig
from data_prep.sources.archives import is_archive
from data_prep.sources.decompress import all_blocks
from data_prep.sources.lines import text_lines
from data_prep.sources.read import read_records
from data_prep.sources.scan import find_sources
from data_prep.sources.source_files import FORMATS

CHUNK_CHARACTERS = 2000
_HOLD_OUT_EVERY = 50
_SAMPLE_CHARACTERS = 2_000_000
_LINE_SECONDS = 5.0


class LearningTexts:
    """An iterable over pieces of the inputs, at most 2,000 characters each, without the held-out ones.

    Every 50th piece is held out, up to two million characters. `sample()` gives these after the
    iteration; where there was too little text to hold any out, what was learned from, with False.
    """

    def __init__(self, inputs: Iterable[str | Path], progress: bool = False):
        self._inputs = inputs
        self._progress = progress
        self._held_out: list[str] = []
        self._first: list[str] = []
        self.num_characters = 0

    def __iter__(self) -> Iterator[str]:
        began = last = time.monotonic()
        room = _SAMPLE_CHARACTERS
        chunks = (chunk for text in _texts(self._inputs) for chunk in _chunks(text))
        for number, chunk in enumerate(chunks, start=1):
            if number % _HOLD_OUT_EVERY == 0 and room > 0:
                self._held_out.append(chunk)
                room -= len(chunk)
                continue
            if number < _HOLD_OUT_EVERY:
                self._first.append(chunk)
            self.num_characters += len(chunk)
            yield chunk
            if self._progress and time.monotonic() - last >= _LINE_SECONDS:
                last = time.monotonic()
                self._say(f"reading: {self.num_characters / 1e6:.1f} million characters, {last - began:.0f} s")
        if self._progress:
            self._say(f"read {self.num_characters / 1e6:.1f} million characters in {time.monotonic() - began:.0f} s")

    def sample(self) -> tuple[list[str], bool]:
        """Pieces to measure on, and whether they were held out."""
        return (self._held_out, True) if self._held_out else (self._first, False)

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _texts(inputs: Iterable[str | Path]) -> Iterator[str]:
    for entry in inputs:
        if isinstance(entry, str):
            yield entry
            continue
        known = any(suffix.lower() in FORMATS for suffix in entry.suffixes) or is_archive(entry.name)
        plain = not known and (entry.is_file() or (entry.suffixes and not entry.is_dir()))  # sources, notes, books
        tabs = not plain and {".tsv", ".tab"} & set(entry.suffixes)  # where a quotation mark is mostly just that
        config = SourceConfig(path=str(entry), format="text" if plain else None, quoting=not tabs)
        for file in itertools.chain.from_iterable(find_sources((config,), "FILES", Path())):
            if file.format == "text":  # with its line breaks: a tokenizer has pieces for these, too
                lines = text_lines(all_blocks(file.path, file.compression), file.label, 1)
                yield from ("\n".join([*some, ""]) for some, _ in lines)
            else:
                for record in read_records(file):
                    yield from _strings(record.value)


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys and roles left out; words of a list as one text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        if value and all(isinstance(item, str) and " " not in item for item in value):
            yield " ".join(value)
        else:
            for item in value:
                yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("role", "from", "label", "tags"):
                yield from _strings(item)


def _chunks(text: str) -> Iterator[str]:
    """A text in pieces of whole lines where they are short enough: trainers skip what is longer than their limit."""
    chunk = ""
    for line in text.splitlines(keepends=True):
        if len(chunk) + len(line) > CHUNK_CHARACTERS and chunk:
            yield chunk
            chunk = ""
        if len(line) > CHUNK_CHARACTERS:
            yield from (line[at : at + CHUNK_CHARACTERS] for at in range(0, len(line), CHUNK_CHARACTERS))
        else:
            chunk += line
    if chunk:
        yield chunk
