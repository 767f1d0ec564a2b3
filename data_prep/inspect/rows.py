"""What lies in chosen rows or documents of a token store, token by token, ready to be shown."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.errors import DataConfigError
from data_prep.inspect.token_text import Piece, Run, TokenText, visible
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
    answer: tuple[ShownToken, ...]  # seq2seq_lm: what is to be generated


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
    """Whether rows are filled up to their length, so that the rest of one is padding."""
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
    trained, num_targets = _targets(store, document, start, stop)
    size = visible_stop - start
    tags: list[str | None] = [None] * size
    answer: tuple[ShownToken, ...] = ()
    if store.task == "token_classification":
        indices = store.token_column("tags", document, start, visible_stop).tolist()
        tags = [_name(store, index) if index >= 0 else None for index in indices]
    if store.task == "seq2seq_lm":
        target_ids = store.ragged("target_ids", document).tolist()
        answer = _tokens(text, target_ids, [True] * len(target_ids), [None] * len(target_ids), True)
    ids = store.tokens(document, start, visible_stop).tolist()
    return ShownDocument(
        number=document,
        where=store.locate(document),
        source=str(store.manifest["sources"][store.source_of(document)]["name"]),
        start=start,
        stop=stop,
        length=len(store.tokens(document)),
        num_targets=num_targets,
        facts=tuple(_facts(store, document)),
        tokens=_tokens(text, ids, trained[:size].tolist(), tags, start == 0),
        num_hidden=stop - visible_stop,
        answer=answer,
    )


def _targets(store: TokenStore, document: int, start: int, stop: int) -> tuple[np.ndarray, int]:
    """Which tokens of a segment are marked as what is learned (bool [stop - start]), and the number of targets."""
    trained = np.zeros(stop - start, dtype=bool)
    match store.task:
        case "causal_lm":
            trained[1:] = store.targets(document, start, stop)[1:]  # nothing predicts a segment's first token
        case "token_classification":
            trained = store.targets(document, start, stop)
        case "question_answering":
            for first, last in store.ragged("answer_spans", document).reshape(-1, 2).tolist():
                trained[max(first - start, 0) : max(last - start, 0)] = True
            return trained, 1
        case "seq2seq_lm":
            return trained, len(store.ragged("target_ids", document))
        case _:
            return trained, 1
    return trained, int(trained.sum())


def _facts(store: TokenStore, document: int) -> list[str]:
    """What a task's columns say about a document as a whole."""
    facts = []
    if "labels" in store.columns:
        facts.append(f"label: {_name(store, int(store.column('labels')[document]))}")
    if "label_sets" in store.columns:
        names = [_name(store, index) for index in store.ragged("label_sets", document).tolist()]
        facts.append(f"labels: {', '.join(names) or 'none'}")
    if "scores" in store.columns:
        facts.append(f"score: {float(store.column('scores')[document]):g}")
    if "questions" in store.columns:
        spans = len(store.ragged("answer_spans", document)) // 2
        answers = f"{spans} answers" if spans > 1 else "one answer" if spans else "no answer in this window"
        facts.append(f"question {int(store.column('questions')[document])}: {answers}")
    if "pair_starts" in store.columns and (first := int(store.column("pair_starts")[document])):
        facts.append(f"second text from token {first}")
    return facts


def _tokens(
    text: TokenText, ids: list[int], trained: list[bool], tags: list[str | None], from_start: bool
) -> tuple[ShownToken, ...]:
    pieces: list[Piece] = text.pieces(ids, list(zip(trained, tags, strict=True)), from_start)
    return tuple(
        ShownToken(runs, tuple(ids[piece.start : piece.stop]), trained[piece.start], piece.control, tags[piece.start])
        for piece, runs in zip(pieces, visible([piece.text for piece in pieces]), strict=True)
    )


def _name(store: TokenStore, index: int) -> str:
    return store.label_names[index] if 0 <= index < len(store.label_names) else str(index)
