"""Sentences with a word a line: CoNLL, CoNLL-U, and CoNLL-U with the predicates and roles of the PropBanks."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.errors import BadDataError
from data_prep.sources.lines import LINE_LIMIT_BYTES, OnFault, raise_fault, text_lines
from data_prep.sources.records import Record

#: Its lines, the number of the first, and the fault of one that is not UTF-8.
_Sentence = tuple[list[str], int, BadDataError | None]
_PLURAL = {"token": "tokens", "tag": "tags"}
_CONLLU = {"tokens": 1, "lemmas": 2, "tags": 3, "xpos": 4, "deprel": 7}
_CONLLU_NUMBER = re.compile(r"[0-9]+")
_CONLLU_SKIPPED = re.compile(r"[0-9]+[-.][0-9]+")  # multiword ranges (their words follow) and empty nodes
#: The column of predicates' senses; a column of roles follows for each predicate.
_SENSES = 10
_NOTHING = ("_", "")
#: Begins the comment in which CoNLL-U Plus names its columns, and a column that has many roles in one cell.
_HEADER, _ONE_COLUMN = "# global.columns", "UP:ARGHEADS"
_NO_ROLE = "O"


def read_conll(
    blocks: Iterable[bytes],
    path: str,
    columns: Sequence[str] | None,
    first_line: int = 1,
    limit_bytes: int = LINE_LIMIT_BYTES,
    on_fault: OnFault = raise_fault,
) -> Iterator[Record]:
    """Records {"tokens": [...], "tags": [...], and each other column under its name}, one a sentence.

    `columns` names the columns in their order; of two columns the names are token and tag. Columns are separated by
    tabs, or by blanks in a line without a tab. `on_fault` gets a sentence with a line that has other columns or is
    not UTF-8. Raises BadDataError with file:line.
    """
    names = columns
    for lines, first, fault in _sentences(blocks, path, first_line, limit_bytes):
        rows: list[list[str]] = []
        places: list[int] = []  # the line of each row
        for line, text in enumerate(lines if fault is None else (), first):
            cells = text.split("\t") if "\t" in text else [cell for cell in text.split(" ") if cell]
            if names is None and len(cells) == 2:
                names = ("token", "tag")
            if names is not None and len(cells) == len(names):
                rows.append(cells)
                places.append(line)
            elif not text.startswith("# "):  # a comment, unless it could be the word # and its columns
                wanted = f"not {len(names)}" if names else "name them in order: `columns: [token, ..., tag]`"
                fault = BadDataError(f"{path}:{line}: {len(cells)} columns, {wanted}", "wrong_columns")
                break
        if fault is not None:
            on_fault(fault, first)
        elif names is not None and rows:
            yield Record(_columns_of(rows, names), f"{path}:{places[0]}", places[0], item_lines=places)


def _columns_of(rows: list[list[str]], names: Sequence[str]) -> dict[str, Any]:
    return {_PLURAL.get(name, name): list(cells) for name, cells in zip(names, zip(*rows, strict=True), strict=True)}


def read_conllu(
    blocks: Iterable[bytes],
    path: str,
    first_line: int = 1,
    limit_bytes: int = LINE_LIMIT_BYTES,
    on_fault: OnFault = raise_fault,
) -> Iterator[Record]:
    """Records {"tokens" (FORM), "lemmas", "tags" (UPOS), "xpos", "deprel"}, lists of texts, one a sentence.

    Columns beyond the ten of CoNLL-U (predicates of the Universal PropBanks) are left out, as are ranges such as 3-4,
    whose words follow, and empty nodes. `on_fault` gets a faulty sentence. Raises BadDataError with file:line.
    """
    for sentence in _word_lines(blocks, path, first_line, limit_bytes, on_fault):
        yield Record(sentence.value(), sentence.where(path), sentence.places[0], item_lines=sentence.places)


def read_conllup(
    blocks: Iterable[bytes],
    path: str,
    first_line: int = 1,
    limit_bytes: int = LINE_LIMIT_BYTES,
    on_fault: OnFault = raise_fault,
) -> Iterator[Record]:
    """Records of CoNLL-U with roles, as the Universal PropBanks (version 1) have them: one a predicate.

    Column 11 has the sense of a word that is a predicate, and each predicate in its order a column of roles behind
    that. A record has the fields of `read_conllu`, and "predicate": [number of the word from 0], "sense", and "roles",
    which are O where the column is empty. A sentence without predicates is one record with "predicate": [].
    `on_fault` gets a faulty sentence. Raises BadDataError with file:line.
    """
    for sentence in _word_lines(blocks, path, first_line, limit_bytes, on_fault):
        where, places, fault = sentence.where(path), sentence.places, sentence.fault_of_roles(path)
        if fault is not None:
            on_fault(fault, places[0])
            continue
        value = sentence.value()
        predicates = sentence.predicates()
        for number, word in enumerate(predicates):
            roles = [_NO_ROLE if role in _NOTHING else role for role in sentence.column(_SENSES + 1 + number)]
            own = {"predicate": [word], "sense": sentence.rows[word][_SENSES], "roles": roles}
            yield Record(value | own, where, places[0], item_lines=places)
        if not predicates:
            own = {"predicate": [], "sense": "", "roles": [_NO_ROLE] * len(places)}
            yield Record(value | own, where, places[0], item_lines=places)


@dataclass
class _Words:
    """The words of a sentence of CoNLL-U: the cells of each, and its line; `header` has what a first line says."""

    rows: list[list[str]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    header: str = ""

    def where(self, path: str) -> str:
        return f"{path}:{self.places[0]}"

    def column(self, number: int) -> list[str]:
        """The cells of a column; a word that lacks it has an empty one."""
        return [row[number] if number < len(row) else "" for row in self.rows]

    def value(self) -> dict[str, Any]:
        return {name: self.column(number) for name, number in _CONLLU.items()}

    def predicates(self) -> list[int]:
        return [place for place, sense in enumerate(self.column(_SENSES)) if sense not in _NOTHING]

    def fault_of_roles(self, path: str) -> BadDataError | None:
        """The first line that has other columns of roles than the sentence has predicates."""
        if _ONE_COLUMN in self.header:
            raise BadDataError(
                f"{path}:1: the roles of all predicates stand in one column ({_ONE_COLUMN}, version 2 of the Universal"
                " PropBanks), which is not read; give version 1, or JSON lines with tokens, roles and predicate"
            )
        count = len(self.predicates())
        for row, line in zip(self.rows, self.places, strict=True):
            filled = max((number for number, cell in enumerate(row, 1) if cell not in _NOTHING), default=0)
            have = max(0, len(row) - _SENSES - 1)
            if filled > _SENSES + 1 + count or have < count:
                said = f"columns of roles: {have}, predicates in the sentence (column {_SENSES + 1}): {count}"
                return BadDataError(f"{path}:{line}: {said}", "wrong_columns")
        return None


def _word_lines(
    blocks: Iterable[bytes], path: str, first_line: int, limit_bytes: int, on_fault: OnFault
) -> Iterator[_Words]:
    """The sentences of CoNLL-U that have words. `on_fault` gets a faulty one."""
    for lines, first, fault in _sentences(blocks, path, first_line, limit_bytes):
        sentence = _Words()
        for line, text in enumerate(lines if fault is None else (), first):
            cells = text.split("\t")
            if text.startswith(_HEADER):
                sentence.header = text
            if text.startswith("#") or _CONLLU_SKIPPED.fullmatch(cells[0]):
                continue
            if len(cells) < 10 or not _CONLLU_NUMBER.fullmatch(cells[0]):
                what = f"{cells[0]!r} is not the number of a word"
                wanted = f"{len(cells)} columns; CoNLL-U has ten, separated by tabs" if len(cells) < 10 else what
                fault = BadDataError(f"{path}:{line}: {wanted}", "wrong_columns")
                break
            sentence.rows.append(cells)
            sentence.places.append(line)
        if fault is not None:
            on_fault(fault, first)
        elif sentence.rows:
            yield sentence


def _sentences(blocks: Iterable[bytes], path: str, first_line: int, limit_bytes: int) -> Iterator[_Sentence]:
    """Runs of lines between blank or -DOCSTART- lines."""
    sentence: list[str] = []
    begin = size = 0
    fault: BadDataError | None = None  # the first of the sentence that has begun
    broken: list[tuple[BadDataError, int]] = []  # lines that are not UTF-8, behind those given so far
    for lines, first in text_lines(
        blocks, path, first_line, limit_bytes, lambda found, line: broken.append((found, line))
    ):
        if broken and fault is None:
            fault, line = broken[0]
            begin = begin if sentence else line
        broken.clear()
        for line, text in enumerate(lines, first):
            if text.startswith("-DOCSTART-") or not text.strip(" \t\r"):
                if sentence or fault is not None:
                    yield sentence, begin, fault
                    sentence, fault = [], None
                continue
            if not sentence:
                begin, size = begin if fault is not None else line, 0
            sentence.append(text[:-1] if text[-1] == "\r" else text)
            size += len(text)
            if size > limit_bytes:
                raise BadDataError(f"{path}:{begin}: no blank line within {limit_bytes} characters")
    if broken and fault is None:
        fault, line = broken[0]
        begin = begin if sentence else line
    if sentence or fault is not None:
        yield sentence, begin, fault
