"""Words in columns: CoNLL (one word a line, blank lines between sentences) and CoNLL-U."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from data_prep.errors import BadDataError
from data_prep.sources.lines import LINE_LIMIT_BYTES, text_lines
from data_prep.sources.records import Record

_Sentence = tuple[list[str], int]
_PLURAL = {"token": "tokens", "tag": "tags"}
_CONLLU = {"tokens": 1, "lemmas": 2, "tags": 3, "xpos": 4, "deprel": 7}
_CONLLU_NUMBER = re.compile(r"[0-9]+")
_CONLLU_SKIPPED = re.compile(r"[0-9]+[-.][0-9]+")  # multiword ranges (their words follow) and empty nodes


def read_conll(
    blocks: Iterable[bytes],
    path: str,
    columns: Sequence[str] | None,
    first_line: int = 1,
    limit_bytes: int = LINE_LIMIT_BYTES,
) -> Iterator[Record]:
    """Records {"tokens": [...], "tags": [...], and each other column under its name}, one a sentence.

    `columns` names the columns in their order; of two columns the names are token and tag. Columns are separated by
    tabs, or by blanks in a line without a tab. Raises BadDataError with file:line.
    """
    names = columns
    for lines, first in _sentences(blocks, path, first_line, limit_bytes):
        rows: list[list[str]] = []
        begin = 0
        for line, text in enumerate(lines, first):
            cells = text.split("\t") if "\t" in text else [cell for cell in text.split(" ") if cell]
            if names is None and len(cells) == 2:
                names = ("token", "tag")
            if names is not None and len(cells) == len(names):
                rows.append(cells)
                begin = begin or line
            elif not text.startswith("# "):  # a comment, unless it could be the word # and its columns
                wanted = f"not {len(names)}" if names else "name them in order: `columns: [token, ..., tag]`"
                raise BadDataError(f"{path}:{line}: {len(cells)} columns, {wanted}")
        if names is not None and rows:
            yield Record(_columns_of(rows, names), f"{path}:{begin}", begin)


def _columns_of(rows: list[list[str]], names: Sequence[str]) -> dict[str, Any]:
    return {_PLURAL.get(name, name): list(cells) for name, cells in zip(names, zip(*rows, strict=True), strict=True)}


def read_conllu(
    blocks: Iterable[bytes], path: str, first_line: int = 1, limit_bytes: int = LINE_LIMIT_BYTES
) -> Iterator[Record]:
    """Records {"tokens" (FORM), "lemmas", "tags" (UPOS), "xpos", "deprel"}, lists of texts, one a sentence.

    Columns beyond the ten of CoNLL-U (predicates of the Universal PropBanks) are left out, as are ranges such as 3-4,
    whose words follow, and empty nodes. Raises BadDataError with file:line.
    """
    for lines, first in _sentences(blocks, path, first_line, limit_bytes):
        value: dict[str, Any] = {name: [] for name in _CONLLU}
        begin = 0
        for line, text in enumerate(lines, first):
            if text.startswith("#"):
                continue
            cells = text.split("\t")
            if len(cells) < 10:
                raise BadDataError(f"{path}:{line}: {len(cells)} columns; CoNLL-U has ten, separated by tabs")
            if _CONLLU_SKIPPED.fullmatch(cells[0]):
                continue
            if not _CONLLU_NUMBER.fullmatch(cells[0]):
                raise BadDataError(f"{path}:{line}: {cells[0]!r} is not the number of a word")
            begin = begin or line
            for name, column in _CONLLU.items():
                value[name].append(cells[column])
        if begin:
            yield Record(value, f"{path}:{begin}", begin)


def _sentences(blocks: Iterable[bytes], path: str, first_line: int, limit_bytes: int) -> Iterator[_Sentence]:
    """Runs of lines between blank or -DOCSTART- lines, each with the number of its first line."""
    sentence: list[str] = []
    begin = size = 0
    for lines, first in text_lines(blocks, path, first_line, limit_bytes):
        for line, text in enumerate(lines, first):
            if text.startswith("-DOCSTART-") or not text.strip(" \t\r"):
                if sentence:
                    yield sentence, begin
                    sentence = []
                continue
            if not sentence:
                begin, size = line, 0
            sentence.append(text[:-1] if text[-1] == "\r" else text)
            size += len(text)
            if size > limit_bytes:
                raise BadDataError(f"{path}:{begin}: no blank line within {limit_bytes} characters")
    if sentence:
        yield sentence, begin
