"""Next-token prediction over texts, prompts with their responses, and conversations.

No Python object is made for a token: ids come from the backend as arrays, and documents are laid out by index
arithmetic.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from data_prep.encode.blocks import Block, block_of_tokens, join_blocks, spans_to_marks
from data_prep.encode.chats import encode_chats
from data_prep.encode.content import Context, check_content, refuse_untrainable
from data_prep.errors import UntrainableError
from data_prep.shapes.examples import ChatExample, Example, PromptExample, TextExample
from data_prep.sources.records import Record
from data_prep.tasks.data_task import DataTask, DocumentView
from data_prep.token_store import TokenStore

_LONG_TOKENS = 512  # documents that are longer on average are copied one by one


def encode(records: Sequence[Record], examples: Sequence[Example], context: Context) -> Block:
    """Documents for next-token prediction, one an example.

    Text: every token but the first is a target. Prompt and response: encoded apart, as inference would;
    the response and its eos are targets. Conversations: the turns that the chat settings train, with
    their stop tokens. The first token of a document is never a target. Raises BadDataError.
    """
    blocks = []
    start = 0
    for kind, run in groupby(examples, key=type):
        chosen: list[Any] = list(run)
        theirs = records[start : start + len(chosen)]
        start += len(chosen)
        try:
            if kind is TextExample:
                blocks.append(_texts(theirs, chosen, context))
            elif kind is PromptExample:
                blocks.append(_prompts(theirs, chosen, context))
            else:
                assert kind is ChatExample
                blocks.append(encode_chats(theirs, chosen, context))
        except UntrainableError as error:
            before = start - len(chosen)
            raise UntrainableError(str(error), tuple(index + before for index in error.indices)) from error
    return join_blocks(blocks)


def _texts(records: Sequence[Record], examples: Sequence[TextExample], context: Context) -> Block:
    tokenizer = context.tokenizer
    ids, ends = context.backend.encode([example.text for example in examples])
    check_content(tokenizer, ids, ends, records)
    sizes = np.diff(ends, prepend=0)
    refuse_untrainable(sizes == 0, records, "no text")
    num_prefix = len(tokenizer.prefix_ids)
    lengths = sizes + num_prefix + 1
    out, starts = _documents(lengths, context)
    _place(out, starts + num_prefix, sizes, ids)
    return block_of_tokens(out, None, lengths, [record.line for record in records])


def _prompts(records: Sequence[Record], examples: Sequence[PromptExample], context: Context) -> Block:
    tokenizer = context.tokenizer
    texts = [text for example in examples for text in (example.prompt, example.response)]
    ids, ends = context.backend.encode(texts)
    check_content(tokenizer, ids, ends[1::2], records)
    sizes = np.diff(ends, prepend=0)
    prompts, responses = sizes[0::2], sizes[1::2]
    refuse_untrainable(responses == 0, records, "the response is empty")
    num_prefix = len(tokenizer.prefix_ids)
    lengths = prompts + responses + num_prefix + 1
    out, starts = _documents(lengths, context)
    answers = starts + num_prefix + prompts
    _place(out, np.stack([starts + num_prefix, answers], axis=1).ravel(), sizes, ids)
    marks = np.ones(len(out), dtype=np.uint8)
    if not context.train_on_prompt:
        marks -= spans_to_marks(len(out), starts, answers)
    marks[starts] = 0
    lines = [record.line for record in records]
    return block_of_tokens(out, marks, lengths, lines, num_answers=len(records), num_stops=len(records))


def _documents(lengths: np.ndarray, context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Room for documents of these lengths, prefix and eos written, and where each starts."""
    starts = np.cumsum(lengths) - lengths
    out = np.empty(int(lengths.sum()), dtype=context.id_type)
    for place, token in enumerate(context.tokenizer.prefix_ids):
        out[starts + place] = token
    assert context.tokenizer.eos_id is not None
    out[starts + lengths - 1] = context.tokenizer.eos_id
    return out, starts


def _place(out: np.ndarray, destinations: np.ndarray, sizes: np.ndarray, ids: np.ndarray) -> None:
    """Copy consecutive stretches of `ids`, `sizes` long, to `destinations` in `out`."""
    sources = np.cumsum(sizes) - sizes
    if len(ids) > _LONG_TOKENS * len(sizes):
        for place, source, size in zip(destinations.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            out[place : place + size] = ids[source : source + size]
        return
    out[np.repeat(destinations - sources, sizes) + np.arange(len(ids))] = ids


def _view(store: TokenStore, document: int, start: int, stop: int) -> DocumentView:
    learned = store.targets(document, start, stop)
    learned[:1] = False  # nothing predicts a segment's first token
    return DocumentView(learned, int(learned.sum()))


TASK = DataTask(
    name="causal_lm",
    shapes=("text", "prompt", "alpaca", "sharegpt", "messages", "parallel"),
    encode=encode,
    marks_tokens=True,
    packs=True,
    needs_eos=True,
    learned="trained",
    view=_view,
)
