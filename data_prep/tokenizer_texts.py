"""The texts that tokenizers learn from: read one after the other, some held out to measure on."""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.errors import BadDataError, MissingInputError
from data_prep.records import read_records

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
        elif not entry.is_file():
            raise MissingInputError(f"{entry}: no such file")
        elif entry.suffix == ".jsonl":
            for record in read_records(str(entry)):
                yield from _strings(record.value)
        else:
            try:
                yield entry.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise BadDataError(f"{entry}: not UTF-8: {error.reason}") from error


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys and roles left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("role", "label"):
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
