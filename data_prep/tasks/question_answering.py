"""The answer to a question as a span of a context, in windows where the context is longer than a row."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.encode.blocks import Block, Column, block_of_documents, cut_columns, ragged
from data_prep.encode.content import Context, encode_texts
from data_prep.errors import BadDataError
from data_prep.shapes.examples import Example, QuestionExample
from data_prep.sources.records import Record
from data_prep.tasks.data_task import PAIR_STARTS, Blank, DataTask, DocumentView, Histogram, pair_fact
from data_prep.token_store import TokenStore

#: Start, stop, start, stop ...: the places of the answers that lie whole in the window.
_ANSWER_SPANS = Column("answer_spans", per="ragged")
#: The number of the record that a window was cut from.
_QUESTIONS = Column("questions", per="document", holds="record numbers")


def encode(records: Sequence[Record], examples: Sequence[Example], context: Context) -> Block:
    """Windows of question and context, `context.row_tokens` long at most; neighbours share `stride_tokens`.

    Raises BadDataError.
    """
    tokenizer = context.tokenizer
    chosen = [one for one in examples if isinstance(one, QuestionExample)]
    questions = encode_texts([one.question for one in chosen], records, context)
    contexts = tokenizer.encode_with_offsets([one.context for one in chosen])
    documents: list[list[int]] = []
    spans: list[list[int]] = []
    lines, pair_starts, numbers, cut, truncated = [], [], [], [], 0
    for number, (record, one, question, (ids, offsets)) in enumerate(
        zip(records, chosen, questions, contexts, strict=True)
    ):
        if tokenizer.holds_control_ids(ids):
            raise BadDataError(
                f"{record.where}: this tokenizer turns part of the text into a control token", "control_token"
            )
        head, room = _head(record, question, ids, context)
        gone = len(tokenizer.prefix_ids) + len(question) + len(tokenizer.pair_middle_ids) - len(head)
        truncated += gone > 0
        answers = [_token_span(offsets, start, start + len(text)) for start, text in one.answers]
        for begin, stop in _windows(len(ids), room, room - context.stride_tokens):
            documents.append([*head, *ids[begin:stop], *tokenizer.suffix_ids])
            inside = [pair for pair in answers if begin <= pair[0] and pair[1] <= stop]
            spans.append([len(head) + place - begin for pair in inside for place in pair])
            lines.append(record.line)
            pair_starts.append(len(head))
            numbers.append(number)
            cut.append(gone)
    block = block_of_documents(documents, lines, context.id_type)
    columns = {
        **block.columns,
        **ragged(_ANSWER_SPANS, spans, np.int32),
        PAIR_STARTS.name: np.array(pair_starts, dtype=np.uint32),
        _QUESTIONS.name: np.array(numbers, dtype=np.uint32),
        **cut_columns(cut, [0] * len(cut)),
    }
    moved, extra = sum(one.num_moved for one in chosen), len(documents) - len(records)
    return Block(columns, len(documents), num_truncated=truncated, num_extra=extra, num_moved=moved)


def _head(record: Record, question: list[int], ids: Sequence[int], context: Context) -> tuple[list[int], int]:
    """The ids before the context in every window of a record, and the tokens that are left for the context."""
    tokenizer = context.tokenizer
    fixed = len(tokenizer.prefix_ids) + len(tokenizer.pair_middle_ids) + len(tokenizer.suffix_ids)
    # Half of a row stays for the context, whatever the question.
    kept = question[: max(1, (context.row_tokens - fixed) // 2)]
    room = context.row_tokens - fixed - len(kept)
    if not ids or room <= context.stride_tokens:
        raise BadDataError(
            f"{record.where}: the context is empty or a row of {context.row_tokens} tokens leaves"
            f" it no room beside data.stride_tokens {context.stride_tokens}"
        )
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
    columns=(PAIR_STARTS, _ANSWER_SPANS, _QUESTIONS),
    encode=encode,
    learned="answer",
    view=_view,
    histograms=_histograms,
    blank=_blank,
)
