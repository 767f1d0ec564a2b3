"""Next-token prediction over texts, prompts with their responses, and conversations.

No Python object is made for a token: ids come from the backend as arrays, documents are laid out by index
arithmetic, and targets of conversations are found by counting bytes. The bytes behind the tokens of a rendered
conversation are summed up and compared with the byte spans that the template marked. Where the bytes of a document
do not add up to its text (a normaliser changed it), its character offsets are used.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.encode.blocks import Block, add_counts, block_of_tokens, join_blocks, spans_to_marks
from data_prep.encode.content import Context, check_content, check_range, refuse_untrainable
from data_prep.errors import BadDataError, FatalDataError, UntrainableError
from data_prep.shapes.examples import ChatExample, Example, PromptExample, TextExample
from data_prep.sources.records import Record
from data_prep.tasks.data_task import DataTask, DocumentView
from data_prep.token_store import TokenStore
from data_prep.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:  # with its template engine, which most data does without
    from data_prep.chat.format import Rendered

_NO_TURN = "no turn of a trained role"
_LONG_TOKENS = 512  # documents that are longer on average are copied one by one


def encode(records: Sequence[Record], examples: Sequence[Example], context: Context) -> Block:
    """Documents for next-token prediction, one an example.

    Text: every token but the first is a target. Prompt and response: encoded apart, as inference would;
    the response and its eos are targets. Conversations: the turns that the chat settings train, with
    their stop tokens. The first token of a document is never a target. Raises BadDataError.
    """
    blocks: list[Block] = []
    starts: list[int] = []
    start = 0
    for kind, run in groupby(examples, key=type):
        chosen: list[Any] = list(run)
        theirs = records[start : start + len(chosen)]
        starts.append(start)
        start += len(chosen)
        try:
            if kind is TextExample:
                blocks.append(_texts(theirs, chosen, context))
            elif kind is PromptExample:
                blocks.append(_prompts(theirs, chosen, context))
            else:
                assert kind is ChatExample
                blocks.append(_chats(theirs, chosen, context))
        except UntrainableError as error:
            raise UntrainableError(str(error), tuple(index + starts[-1] for index in error.indices)) from error
    if all(block.owners is None for block in blocks):
        return join_blocks(blocks)
    owners = [
        first + (np.arange(block.num_documents) if block.owners is None else block.owners)
        for first, block in zip(starts, blocks, strict=True)
    ]
    return replace(join_blocks(blocks), owners=np.concatenate(owners))


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


def _chats(records: Sequence[Record], examples: Sequence[ChatExample], context: Context) -> Block:
    """Documents of rendered conversations; the turns that the chat settings train are targets, with their stop tokens.

    Raises BadDataError.
    """
    chat = context.chat
    assert chat is not None
    found = [chat.documents(example, record.where) for record, example in zip(records, examples, strict=True)]
    counts = [len(documents) for documents, _ in found]
    refuse_untrainable(np.array(counts) == 0, records, _NO_TURN)
    notes = add_counts(one for _, one in found)
    notes["nulls_left_out"] = sum(record.num_nulls for record in records)
    owners = np.repeat(np.arange(len(records)), counts)
    try:
        block = _rendered_chats(
            [records[owner] for owner in owners.tolist()], [one for documents, _ in found for one in documents], context
        )
    except UntrainableError as error:
        raise UntrainableError(str(error), tuple(sorted({int(owners[index]) for index in error.indices}))) from error
    notes = add_counts((notes, block.notes))
    if len(owners) == len(records):
        return replace(block, notes=notes)
    return replace(block, notes=notes, owners=owners, num_extra=len(owners) - len(records))


def _rendered_chats(records: Sequence[Record], examples: Sequence[ChatExample], context: Context) -> Block:
    """A document of each of `examples`, which `records` [examples] hold."""
    from data_prep.chat.sandbox import limits

    chat, tokenizer = context.chat, context.tokenizer
    assert chat is not None
    try:
        with limits():
            rendered = [chat.render(example, record.where) for record, example in zip(records, examples, strict=True)]
    except BadDataError as refusal:
        refusal.reason = "template_refuses"
        raise
    answers, stops = sum(one.num_answers for one in rendered), sum(one.num_stops for one in rendered)
    if stops < answers and not context.allow_untrained_stop:
        first = next(r for r, one in zip(records, rendered, strict=True) if one.num_stops < one.num_answers)
        raise FatalDataError(
            f"{first.where}: the chat template ends an answer without a stop token that is trained, so the model"
            " would not learn to stop; mend the template, or set data.chat.allow_untrained_stop"
        )
    ids, ends = _encode_rendered(rendered, context)
    lengths = np.diff(ends, prepend=0)
    refuse_untrainable(lengths == 0, records, "the template writes nothing")
    check_range(tokenizer, ids, ends, records)
    marks = _mark_rendered(rendered, ids, ends, tokenizer)
    marks[ends - lengths] = 0
    refuse_untrainable(np.add.reduceat(marks, ends - lengths, dtype=np.int64) == 0, records, _NO_TURN)
    lines = [record.line for record in records]
    block = block_of_tokens(ids, marks, lengths, lines, num_answers=answers, num_stops=stops)
    return replace(block, notes=add_counts(one.notes for one in rendered))


def _encode_rendered(rendered: "Sequence[Rendered]", context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Ids and ends of rendered conversations; those with literal control strings go their own, exact way."""
    ids, ends = context.backend.encode_rendered([one.text for one in rendered])
    escaped = [index for index, one in enumerate(rendered) if one.literal_spans]
    if not escaped:
        return ids, ends
    parts = np.split(ids, ends[:-1])
    for index in escaped:
        found, _ = context.tokenizer.rendered_with_offsets(_literal_pieces(rendered[index]))
        parts[index] = np.array(found, dtype=context.id_type)
    return np.concatenate(parts), np.cumsum([len(part) for part in parts], dtype=np.int64)


def _mark_rendered(
    rendered: "Sequence[Rendered]", ids: np.ndarray, ends: np.ndarray, tokenizer: Tokenizer
) -> np.ndarray:
    """uint8 [tokens]: which tokens hold a character of a trained span.

    A token that begins before a span and reaches into it counts: where a template ends its header with a
    blank, the answer's first word is one token with that blank, and it must not go untrained.
    """
    if not tokenizer.is_byte_level:
        return np.concatenate([_marks_by_offsets(one, tokenizer, None) for one in rendered])
    sizes = tokenizer.token_bytes(ids)
    token_ends = np.cumsum(sizes, dtype=np.int64)
    text_bytes, span_begins, span_stops = _byte_spans(rendered)
    document_ends = token_ends[ends - 1]
    agree = np.diff(document_ends, prepend=0) == text_bytes
    if not tokenizer.keeps_text:
        agree &= np.array([one.text.isascii() for one in rendered])
    if agree.all():
        return _marks_by_bytes(sizes, token_ends, span_begins, span_stops)
    parts = []
    starts = np.concatenate(([0], ends[:-1]))
    for index, one in enumerate(rendered):
        own = slice(int(starts[index]), int(ends[index]))
        if agree[index]:
            _, begin, stop = _byte_spans([one])
            parts.append(_marks_by_bytes(sizes[own], np.cumsum(sizes[own], dtype=np.int64), begin, stop))
        else:
            parts.append(_marks_by_offsets(one, tokenizer, ids[own]))
    return np.concatenate(parts)


def _marks_by_bytes(
    sizes: np.ndarray, token_ends: np.ndarray, span_begins: np.ndarray, span_stops: np.ndarray
) -> np.ndarray:
    """Marks from the bytes behind every token, where these end, and the trained spans in bytes."""
    first = np.searchsorted(token_ends, span_begins, side="right")
    last = np.searchsorted(token_ends - sizes, span_stops, side="left")
    return spans_to_marks(len(sizes), first, last)


def _byte_spans(rendered: "Sequence[Rendered]") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of every text, and the trained spans in bytes of all texts laid end to end."""
    sizes, starts, stops = [], [], []
    base = 0
    for one in rendered:
        text = one.text
        if text.isascii():
            size = len(text)
            for start, stop in one.spans:
                starts.append(base + start)
                stops.append(base + stop)
        else:
            size = at = 0
            for start, stop in one.spans:
                size += len(text[at:start].encode())
                starts.append(base + size)
                size += len(text[start:stop].encode())
                stops.append(base + size)
                at = stop
            size += len(text[at:].encode())
        sizes.append(size)
        base += size
    return np.array(sizes), np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64)


def _marks_by_offsets(one: "Rendered", tokenizer: Tokenizer, ids: np.ndarray | None) -> np.ndarray:
    """Marks of one conversation from character offsets; `ids` are what it was encoded to."""
    found, pairs = tokenizer.rendered_with_offsets(_literal_pieces(one))
    if ids is not None and not np.array_equal(ids, found):
        raise FatalDataError("the tokenizer's backends disagree; set data.backend: tokenizers")
    offsets = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    spans = np.array(one.spans, dtype=np.int64).reshape(-1, 2)
    first = np.searchsorted(offsets[:, 1], spans[:, 0], side="right")
    last = np.searchsorted(offsets[:, 0], spans[:, 1], side="left")
    return spans_to_marks(len(offsets), first, np.maximum(first, last))


def _literal_pieces(one: "Rendered") -> list[str]:
    cuts = [0, *(start + 1 for start, _ in one.literal_spans), len(one.text)]
    return [one.text[a:b] for a, b in pairwise(cuts)]


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
