"""What lies in chosen rows or documents of a token store, token by token, ready to be shown."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.errors import DataConfigError
from data_prep.inspect.token_text import Piece, Run, TokenText, visible
from data_prep.tasks import TASKS
from data_prep.token_store import Rows, TokenStore

_SHORTEST = 32


@dataclass(frozen=True)
class Selection:
    """Which rows (or documents) to show: from `number` on, of `source`, or drawn at random."""

    number: int | None = None
    source: str | None = None  # name or index
    seed: int = 0
    count: int = 1
    documents: bool = False


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token, or several that share a character."""

    runs: list[Run]
    ids: tuple[int, ...]
    trained: bool
    control: bool
    tag: str | None


@dataclass(frozen=True)
class ShownDocument:
    """A document, or the segment [start, stop) of it that lies in a row."""

    number: int
    where: str  # file:line of the record
    source: str
    start: int
    stop: int
    length: int  # of the whole document
    num_targets: int
    facts: tuple[str, ...]  # label, score, answers
    tokens: tuple[ShownToken, ...]
    num_hidden: int  # tokens at the end that were left out
    answer: tuple[ShownToken, ...]  # a text of its own that is to be generated


@dataclass(frozen=True)
class ShownRow:
    """One row, or one document alone (`number` is None)."""

    number: int | None
    row_tokens: int | None  # None where a row is one document, padded only to its neighbours in a batch
    num_tokens: int
    num_targets: int
    documents: tuple[ShownDocument, ...]

    @property
    def num_padding(self) -> int:
        """Empty places at the end of the row."""
        return 0 if self.row_tokens is None else self.row_tokens - self.num_tokens


def fills_rows(store: TokenStore) -> bool:
    """True if rows are filled up to their length, so that the rest of one is padding."""
    return store.ledger["total"]["padding_tokens"] is not None


def plural(number: int, noun: str) -> str:
    """1 token, 2,000 tokens."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def select(store: TokenStore, rows: Rows, selection: Selection) -> list[int]:
    """Numbers of the rows, or of the documents, that `selection` means, in the order to show them.

    DataConfigError when there are none.
    """
    what, total = ("document", store.num_documents) if selection.documents else ("row", rows.num_rows)
    if selection.source is not None:
        first, stop = _documents_of(store, selection.source)
        if selection.documents:
            chosen: Sequence[int] = range(first, min(stop, first + selection.count))
        else:
            chosen = _rows_with(rows, first, stop, selection.count)
        if not chosen:
            raise DataConfigError(f"--source {selection.source}: no {what} of {store.path} holds any of it")
        return list(chosen)
    if selection.number is not None:
        if not 0 <= selection.number < total:
            raise DataConfigError(f"--row {selection.number}: {store.path} has {what}s 0 to {total - 1}")
        return list(range(selection.number, min(total, selection.number + selection.count)))
    drawn = random.Random(selection.seed).sample(range(total), min(selection.count, total))  # noqa: S311
    return sorted(drawn)


def _documents_of(store: TokenStore, wanted: str) -> tuple[int, int]:
    """First document and stop of the source with this name, file or index."""
    sources = store.manifest["sources"]
    names = [str(source["name"]) for source in sources]
    if wanted in names:
        index = names.index(wanted)
    elif wanted.isdecimal() and int(wanted) < len(sources):
        index = int(wanted)
    else:
        listed = ", ".join(f"{number} {name}" for number, name in list(enumerate(names))[:10])
        raise DataConfigError(f"--source {wanted}: no such source in {store.path}; there are {listed}")
    first = int(sources[index]["first_document"])
    return first, first + int(sources[index]["num_documents"])


def _rows_with(rows: Rows, first: int, stop: int, count: int) -> list[int]:
    """The first `count` rows that hold a document of [first, stop); reads no more of the plan than that takes."""
    found: list[int] = []
    block = 1 << 16
    for begin in range(0, len(rows.documents), block):
        documents = rows.documents[begin : begin + block]
        segments = np.flatnonzero((documents >= first) & (documents < stop)) + begin
        # Equal types, or numpy would copy the whole column to compare.
        places = np.searchsorted(rows.row_ends, segments.astype(rows.row_ends.dtype), side="right")
        for row in np.unique(places).tolist():
            if row not in found[-1:]:
                found.append(row)
        if len(found) >= count:
            break
    return found[:count]


def show(
    store: TokenStore, rows: Rows, text: TokenText, numbers: Sequence[int], documents: bool, max_tokens: int | None
) -> Iterator[ShownRow]:
    """Rows, or documents, with about `max_tokens` tokens of each decoded."""
    packed = fills_rows(store)
    for number in numbers:
        if documents:
            stop = len(store.tokens(number))
            segments = [(number, 0, stop)]
        else:
            columns = (column.tolist() for column in rows.segments(number))
            segments = [(document, start, start + size) for document, start, size in zip(*columns, strict=True)]
        # Every document of a shortened row shows its beginning.
        each = None if max_tokens is None else max(max_tokens // len(segments), _SHORTEST)
        shown = [
            _document(store, text, document, start, stop, stop if each is None else min(stop, start + each))
            for document, start, stop in segments
        ]
        yield ShownRow(
            None if documents else number,
            rows.row_tokens if packed and not documents else None,
            sum(document.stop - document.start for document in shown),
            sum(document.num_targets for document in shown),
            tuple(shown),
        )


def _document(
    store: TokenStore, text: TokenText, document: int, start: int, stop: int, visible_stop: int
) -> ShownDocument:
    seen = TASKS[store.task].view(store, document, start, stop)
    size = visible_stop - start
    ids = store.tokens(document, start, visible_stop).tolist()
    tags = seen.tags[:size] or [None] * size
    answer = list(seen.answer)
    return ShownDocument(
        number=document,
        where=store.locate(document),
        source=str(store.manifest["sources"][store.source_of(document)]["name"]),
        start=start,
        stop=stop,
        length=len(store.tokens(document)),
        num_targets=seen.num_targets,
        facts=seen.facts,
        tokens=_tokens(text, ids, seen.learned[:size].tolist(), tags, start == 0),
        num_hidden=stop - visible_stop,
        answer=_tokens(text, answer, [True] * len(answer), [None] * len(answer), True),
    )


def _tokens(
    text: TokenText, ids: list[int], trained: list[bool], tags: Sequence[str | None], from_start: bool
) -> tuple[ShownToken, ...]:
    pieces: list[Piece] = text.pieces(ids, list(zip(trained, tags, strict=True)), from_start)
    return tuple(
        ShownToken(runs, tuple(ids[piece.start : piece.stop]), trained[piece.start], piece.control, tags[piece.start])
        for piece, runs in zip(pieces, visible([piece.text for piece in pieces]), strict=True)
    )
