"""Text: documents that are lines, files or paragraphs, and sentences with a word a line (CoNLL and CoNLL-U)."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from data_prep.errors import BadDataError
from data_prep.sources.lines import (
    BOM,
    LINE_LIMIT_BYTES,
    OnFault,
    decode,
    raise_fault,
    text_lines,
    whole_lines,
)
from data_prep.sources.records import Record

_MAY_BE_BLANK = np.array([byte >= 0x80 or chr(byte).isspace() for byte in range(256)])
#: Its lines, the number of the first, and the fault of one that is not UTF-8.
_Sentence = tuple[list[str], int, BadDataError | None]
_PLURAL = {"token": "tokens", "tag": "tags"}
_CONLLU = {"tokens": 1, "lemmas": 2, "tags": 3, "xpos": 4, "deprel": 7}
_CONLLU_NUMBER = re.compile(r"[0-9]+")
_CONLLU_SKIPPED = re.compile(r"[0-9]+[-.][0-9]+")  # multiword ranges (their words follow) and empty nodes


def read_text(
    blocks: Iterable[bytes],
    path: str,
    document: Literal["line", "file", "blank_line"],
    first_line: int = 1,
    limit_bytes: int = LINE_LIMIT_BYTES,
    on_fault: OnFault = raise_fault,
) -> Iterator[Record]:
    """Records {"text": ...}. Lines that hold only white space are no documents.

    `on_fault` gets documents that are not UTF-8. Raises BadDataError with file:line.
    """
    match document:
        case "line":
            return _lines(blocks, path, first_line, limit_bytes, on_fault)
        case "blank_line":
            return _paragraphs(blocks, path, first_line, limit_bytes, on_fault)
        case "file":
            return _file(blocks, path, limit_bytes, on_fault)


def _lines(
    blocks: Iterable[bytes], path: str, first_line: int, limit_bytes: int, on_fault: OnFault
) -> Iterator[Record]:
    for lines, first in text_lines(blocks, path, first_line, limit_bytes, on_fault):
        for line, text in enumerate(lines, first):
            if text and not text.isspace():
                yield Record({"text": text[:-1] if text[-1] == "\r" else text}, f"{path}:{line}", line, len(text), True)


def _paragraphs(
    blocks: Iterable[bytes], path: str, first_line: int, limit_bytes: int, on_fault: OnFault
) -> Iterator[Record]:
    held: list[bytes] = []  # a paragraph that has begun in earlier chunks
    begin = size = 0
    for chunk, newlines, first in whole_lines(blocks, path, first_line, limit_bytes):
        if first == 1 and chunk.startswith(BOM):
            chunk, newlines = chunk.removeprefix(BOM), newlines - len(BOM)
        if not chunk:
            continue
        ends = newlines if len(newlines) and newlines[-1] == len(chunk) - 1 else np.append(newlines, len(chunk))
        blank = _blank_lines(chunk, ends)
        if held and len(blank) and blank[0] == 0:
            yield from _paragraph(held, path, begin, on_fault)
            held = []
        for run_start, run_stop, start, stop in _runs(ends, blank):
            piece = chunk[start:stop]
            if not held:
                begin, size = first + run_start, 0
            held.append(piece)
            size += len(piece)
            if size > limit_bytes:
                raise BadDataError(f"{path}:{begin}: no blank line within {limit_bytes} bytes")
            if run_stop < len(ends):
                yield from _paragraph(held, path, begin, on_fault)
                held = []
    if held:
        yield from _paragraph(held, path, begin, on_fault)


def _blank_lines(chunk: bytes, ends: np.ndarray) -> np.ndarray:
    """The numbers, ascending from 0, of the lines that hold only white space. `ends`: where each line ends."""
    data = np.frombuffer(chunk, dtype=np.uint8)
    # Only a line whose last byte is white space, or part of a wider character, can be blank; so of its first.
    odd = np.flatnonzero(_MAY_BE_BLANK[data[ends - 1]])  # before an empty line stands a newline; at a chunk's end too
    starts = np.where(odd > 0, ends[odd - 1] + 1, 0)
    empty = starts == ends[odd]
    odd, starts, empty = (values[empty | _MAY_BE_BLANK[data[starts]]] for values in (odd, starts, empty))
    for place in np.flatnonzero(~empty).tolist():
        line = chunk[int(starts[place]) : int(ends[odd[place]])]
        empty[place] = line.isspace() or line.decode(errors="replace").isspace()
    blank: np.ndarray = odd[empty]
    return blank


def _runs(ends: np.ndarray, blank: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """The runs of lines that are not blank: lines [start, stop) from 0, and their bytes [start, stop)."""
    starts = np.concatenate(([0], blank + 1))
    stops = np.append(blank, len(ends))
    some = starts < stops
    starts, stops = starts[some], stops[some]
    first_bytes = np.where(starts > 0, ends[starts - 1] + 1, 0)
    return zip(starts.tolist(), stops.tolist(), first_bytes.tolist(), ends[stops - 1].tolist(), strict=True)


def _paragraph(pieces: list[bytes], path: str, line: int, on_fault: OnFault) -> Iterator[Record]:
    content = pieces[0] if len(pieces) == 1 else b"\n".join(pieces)
    if b"\r" in content:
        content = content.replace(b"\r\n", b"\n").removesuffix(b"\r")
    text, fault = decode(content, path, line)
    if fault is not None:
        on_fault(fault, line)
    else:
        yield Record({"text": text}, f"{path}:{line}", line, len(text), True)


def _file(blocks: Iterable[bytes], path: str, limit_bytes: int, on_fault: OnFault) -> Iterator[Record]:
    pieces: list[bytes] = []
    size = 0
    for block in blocks:
        pieces.append(block)
        size += len(block)
        if size > limit_bytes:
            raise BadDataError(f"{path}:1: more than {limit_bytes} bytes for one document; set `document: line`")
    text, fault = decode(b"".join(pieces).removeprefix(BOM), path, 1)
    if fault is not None:
        on_fault(fault, 1)
    elif text and not text.isspace():
        yield Record({"text": text}, f"{path}:1", 1, len(text), True)


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
    for lines, first, fault in _sentences(blocks, path, first_line, limit_bytes):
        value: dict[str, Any] = {name: [] for name in _CONLLU}
        places: list[int] = []  # the line of each word
        for line, text in enumerate(lines if fault is None else (), first):
            if text.startswith("#"):
                continue
            cells = text.split("\t")
            if len(cells) < 10:
                wanted = f"{len(cells)} columns; CoNLL-U has ten, separated by tabs"
                fault = BadDataError(f"{path}:{line}: {wanted}", "wrong_columns")
                break
            if _CONLLU_SKIPPED.fullmatch(cells[0]):
                continue
            if not _CONLLU_NUMBER.fullmatch(cells[0]):
                fault = BadDataError(f"{path}:{line}: {cells[0]!r} is not the number of a word", "wrong_columns")
                break
            places.append(line)
            for name, column in _CONLLU.items():
                value[name].append(cells[column])
        if fault is not None:
            on_fault(fault, first)
        elif places:
            yield Record(value, f"{path}:{places[0]}", places[0], item_lines=places)


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
