"""The answer to a question as a span of a context, in windows where the context is longer than a row.

An evaluation takes texts from the context by the places of its tokens, so the store has the context, once a record:
the first window of a record holds what belongs to all of them, the others have no values in these columns.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_prep.encode.blocks import Block, Column, block_of_documents, cut_columns, ragged
from data_prep.encode.content import Context, encode_texts, refuse_strides
from data_prep.errors import BadDataError
from data_prep.shapes.examples import Example, QuestionExample
from data_prep.sources.records import Record
from data_prep.tasks.data_task import PAIR_STARTS, Blank, DataTask, DocumentView, Histogram, pair_fact
from data_prep.token_store import TokenStore

#: Start, stop, start, stop ...: the places of the answers that lie whole in the window.
_ANSWER_SPANS = Column("answer_spans", per="ragged")
#: The number of the record that a window was cut from.
_QUESTIONS = Column("questions", per="document", holds="record numbers")
#: The number, among the tokens of the record's whole context, of the first one that a window has, and how many it has.
_CONTEXT_FIRSTS = Column("context_firsts", per="document")
_CONTEXT_COUNTS = Column("context_counts", per="document")
#: Of a record's first window: the context in UTF-8; start, stop, start, stop ... of all its tokens there, in bytes,
#: without the white space around them; and the texts of its answers, each in UTF-8 with `_TEXT_END` behind it.
_CONTEXT_TEXTS = Column("context_texts", per="ragged")
_CONTEXT_OFFSETS = Column("context_offsets", per="ragged")
_ANSWER_TEXTS = Column("answer_texts", per="ragged")
_TEXT_END = b"\xff"  # no byte of UTF-8
#: A note of the ledger: answers whose first or last character stands inside a token.
_INSIDE_TOKENS = "answers_inside_tokens"


class _Texts(NamedTuple):
    """The values of a record's text columns; those of its later windows are empty."""

    context: bytes = b""
    offsets: Sequence[int] = ()
    answers: bytes = b""


class _Window(NamedTuple):
    """A document: a question and a part of its context."""

    ids: list[int]
    spans: list[int]
    pair_start: int
    first: int  # token of the whole context
    num_tokens: int  # of the context
    texts: _Texts


class _Encoded(NamedTuple):
    """A record: its windows, the tokens cut off its question, and its answers that begin or end within a token."""

    windows: list[_Window]
    num_cut: int
    num_inside: int


def encode(records: Sequence[Record], examples: Sequence[Example], context: Context) -> Block:
    """Windows of question and context, `context.row_tokens` long at most; neighbours share `stride_tokens`.

    Raises BadDataError.
    """
    tokenizer = context.tokenizer
    chosen = [one for one in examples if isinstance(one, QuestionExample)]
    questions = encode_texts([one.question for one in chosen], records, context)
    contexts = tokenizer.encode_with_offsets([one.context for one in chosen])
    encoded = [
        _encoded(record, one, question, *content, context)
        for record, one, question, content in zip(records, chosen, questions, contexts, strict=True)
    ]
    windows = [window for one in encoded for window in one.windows]
    counts = [len(one.windows) for one in encoded]
    lines = np.repeat([record.line for record in records], counts).tolist()
    columns = {
        **block_of_documents([window.ids for window in windows], lines, context.id_type).columns,
        **ragged(_ANSWER_SPANS, [window.spans for window in windows], np.int32),
        **_texts_column(_CONTEXT_TEXTS, [window.texts.context for window in windows]),
        **ragged(_CONTEXT_OFFSETS, [window.texts.offsets for window in windows], np.uint32),
        **_texts_column(_ANSWER_TEXTS, [window.texts.answers for window in windows]),
        PAIR_STARTS.name: np.array([window.pair_start for window in windows], dtype=np.uint32),
        _QUESTIONS.name: np.repeat(np.arange(len(records), dtype=np.uint32), counts),
        _CONTEXT_FIRSTS.name: np.array([window.first for window in windows], dtype=np.uint32),
        _CONTEXT_COUNTS.name: np.array([window.num_tokens for window in windows], dtype=np.uint32),
        **cut_columns(np.repeat([one.num_cut for one in encoded], counts).tolist(), [0] * len(windows)),
    }
    num_inside = sum(one.num_inside for one in encoded)
    return Block(
        columns,
        num_targets=len(windows),
        num_truncated=sum(one.num_cut > 0 for one in encoded),
        num_extra=len(windows) - len(records),
        num_moved=sum(one.num_moved for one in chosen),
        notes={_INSIDE_TOKENS: num_inside} if num_inside else {},
    )


def _encoded(
    record: Record,
    one: QuestionExample,
    question: list[int],
    ids: list[int],
    offsets: list[tuple[int, int]],
    context: Context,
) -> _Encoded:
    """A record with the ids of its question, and those of its context with their characters. Raises BadDataError."""
    tokenizer = context.tokenizer
    if tokenizer.holds_control_ids(ids):
        raise BadDataError(
            f"{record.where}: this tokenizer turns part of the text into a control token", "control_token"
        )
    head, room = _head(record, question, ids, context)
    answers = [_token_span(offsets, start, start + len(text)) for start, text in one.answers]
    borders = [_without_blanks(one.context, *offset) for offset in offsets]
    windows = []
    for begin, stop in _windows(len(ids), room, max(1, room - context.stride_tokens)):
        inside = [pair for pair in answers if begin <= pair[0] and pair[1] <= stop]
        spans = [len(head) + place - begin for pair in inside for place in pair]
        texts = _Texts() if begin else _texts(one, borders)
        all_ids = [*head, *ids[begin:stop], *tokenizer.suffix_ids]
        windows.append(_Window(all_ids, spans, len(head), begin, stop - begin, texts))
    num_cut = len(tokenizer.prefix_ids) + len(question) + len(tokenizer.pair_middle_ids) - len(head)
    exact = [_is_exact(one.context, borders, *both) for both in zip(answers, one.answers, strict=True)]
    return _Encoded(windows, num_cut, exact.count(False))


def _texts(one: QuestionExample, borders: Sequence[tuple[int, int]]) -> _Texts:
    """The values of a record whose tokens are the characters [start, stop) of its context."""
    codes = np.frombuffer(one.context.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (codes >= 1 << 7) + (codes >= 1 << 11) + (codes >= 1 << 16)
    byte_of = np.concatenate(([0], np.cumsum(sizes)))
    places = byte_of[np.array(borders, dtype=np.int64).reshape(-1)].tolist()
    texts = dict.fromkeys(text for _, text in one.answers)
    return _Texts(one.context.encode(), places, b"".join(text.encode() + _TEXT_END for text in texts))


def _texts_column(column: Column, texts: Sequence[bytes]) -> dict[str, np.ndarray]:
    """A ragged column of bytes, as `ragged` makes one of numbers."""
    lengths = np.array([len(text) for text in texts], dtype=np.uint32)
    return {column.name: np.frombuffer(b"".join(texts), dtype=np.uint8), column.lengths_name: lengths}


def _without_blanks(text: str, start: int, stop: int) -> tuple[int, int]:
    """The characters [start, stop) without the white space at both ends: tokenizers count blanks to words."""
    piece = text[start:stop]
    start += len(piece) - len(piece.lstrip())
    return start, start + len(piece.strip())


def _is_exact(text: str, borders: Sequence[tuple[int, int]], tokens: tuple[int, int], answer: tuple[int, str]) -> bool:
    """True if the tokens [first, stop) are the text of an answer, but for white space around it."""
    return text[borders[tokens[0]][0] : borders[tokens[1] - 1][1]] == answer[1].strip()


def _head(record: Record, question: list[int], ids: Sequence[int], context: Context) -> tuple[list[int], int]:
    """The ids before the context in every window of a record, and the tokens that are left for the context."""
    tokenizer = context.tokenizer
    fixed = len(tokenizer.prefix_ids) + len(tokenizer.pair_middle_ids) + len(tokenizer.suffix_ids)
    # Half of a row stays for the context, whatever the question.
    kept = question[: max(1, (context.row_tokens - fixed) // 2)]
    room = context.row_tokens - fixed - len(kept)
    if not ids:
        raise BadDataError(f"{record.where}: the context is empty", "empty_field")
    if len(ids) > room:
        refuse_strides(record, "context", room, context)
    return [*tokenizer.prefix_ids, *kept, *tokenizer.pair_middle_ids], room


def _windows(length: int, room: int, step: int) -> Iterator[tuple[int, int]]:
    """Begin and stop of windows of `room` tokens over a context, `step` apart; the last one reaches the end."""
    for begin in range(0, length, step):
        stop = min(begin + room, length)
        yield begin, stop
        if stop == length:
            return


def _token_span(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[int, int]:
    """The tokens [first, last) that hold the characters [start, stop)."""
    first = bisect_right(offsets, start, key=lambda offset: offset[1])
    return first, max(first + 1, bisect_left(offsets, stop, key=lambda offset: offset[0]))


def _view(store: TokenStore, document: int, start: int, stop: int) -> DocumentView:
    learned = np.zeros(stop - start, dtype=bool)
    spans = store.ragged(_ANSWER_SPANS.name, document).reshape(-1, 2).tolist()
    for first, last in spans:
        learned[max(first - start, 0) : max(last - start, 0)] = True
    answers = f"{len(spans)} answers" if len(spans) > 1 else "one answer" if spans else "no answer in this window"
    question = int(store.column(_QUESTIONS.name)[document])
    return DocumentView(learned, 1, (f"question {question}: {answers}", *pair_fact(store, document)))


def _histograms(store: TokenStore) -> list[Histogram]:
    counts = np.bincount(np.minimum(store.ragged_lengths(_ANSWER_SPANS.name) // 2, 2), minlength=3)
    answers = ("no answer", "one answer", "several answers")
    return [Histogram("Windows by answers in them", answers, "windows", tuple(counts.tolist()))]


def _blank(_config: Mapping[str, Any], _names: Sequence[str]) -> Blank:
    """No answer; the predicted one stands beside the question."""
    return Blank("question", "answers", lambda _: [], repeats=("question",))


TASK = DataTask(
    name="question_answering",
    shapes=("question",),
    columns=(
        PAIR_STARTS,
        _ANSWER_SPANS,
        _QUESTIONS,
        _CONTEXT_FIRSTS,
        _CONTEXT_COUNTS,
        _CONTEXT_TEXTS,
        _CONTEXT_OFFSETS,
        _ANSWER_TEXTS,
    ),
    encode=encode,
    revision=1,
    learned="answer",
    view=_view,
    histograms=_histograms,
    blank=_blank,
)
