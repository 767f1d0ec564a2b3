"""Examples to documents for tasks with labels: text classification and scoring, tagging, questions, text to text.

These documents stand alone in their row with the tokenizer's own special tokens around them, so what is
too long for a row is cut here (``context.limit_tokens``), between its special tokens.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np

from data_prep.encode.blocks import Block, block_of_documents, ragged
from data_prep.encode.causal_lm import Context, check_content, refuse_untrainable
from data_prep.errors import BadDataError
from data_prep.shapes.examples import (
    Example,
    LabelledExample,
    PromptExample,
    QuestionExample,
    ScoredExample,
    TaggedExample,
)
from data_prep.sources.records import Record


def encode_sequence_classification(records: Sequence[Record], examples: Sequence[Example], context: Context) -> Block:
    """Documents of a text or a pair of texts; columns labels, label_sets or scores, and pair_starts."""
    tokenizer = context.tokenizer
    chosen = [one for one in examples if isinstance(one, LabelledExample | ScoredExample)]
    texts = [text for one in chosen for text in (one.text, one.pair) if text is not None]
    encoded = iter(_content(texts, [r for r, one in zip(records, chosen, strict=True)
                                    for text in (one.text, one.pair) if text is not None], context))  # fmt: skip
    documents: list[list[int]] = []
    empty: list[int] = []
    pair_starts, truncated = [], 0
    for one in chosen:
        first = next(encoded)
        second = next(encoded) if one.pair is not None else None
        if not first and not second:
            empty.append(len(documents))
        around = len(tokenizer.prefix_ids) + len(tokenizer.suffix_ids)
        if second is not None:
            around += len(tokenizer.pair_middle_ids)
        cut_first, cut_second = _cut_pair(first, second, around, context.limit_tokens)
        truncated += len(cut_first) < len(first) or len(cut_second or ()) < len(second or ())
        ids = [*tokenizer.prefix_ids, *cut_first]
        if cut_second is not None:
            ids += tokenizer.pair_middle_ids
            pair_starts.append(len(ids))
            ids += cut_second
        else:
            pair_starts.append(0)
        documents.append([*ids, *tokenizer.suffix_ids])
    _refuse(empty, records, "the text is empty")
    block, _ = block_of_documents(
        documents, [r.line for r in records], context.id_type, num_targets=len(documents), num_truncated=truncated
    )
    columns = {**block.columns, "pair_starts": np.array(pair_starts, dtype=np.uint32)}
    if isinstance(chosen[0], ScoredExample):
        columns["scores"] = np.array([one.score for one in chosen if isinstance(one, ScoredExample)], dtype=np.float32)
        return Block(columns, num_targets=block.num_targets, num_truncated=truncated)
    sets = [
        [context.names.number(name, record.where) for name in one.labels]
        for record, one in zip(records, chosen, strict=True)
        if isinstance(one, LabelledExample)
    ]
    if chosen[0].many:
        columns["label_sets"], columns["label_sets_lengths"] = ragged(sets, np.int32)
    else:
        columns["labels"] = np.array([labels[0] for labels in sets], dtype=np.int32)
    return Block(columns, num_targets=block.num_targets, num_truncated=truncated)


def _refuse(indices: Sequence[int], records: Sequence[Record], reason: str) -> None:
    faulty = np.zeros(len(records), dtype=bool)
    faulty[list(indices)] = True
    refuse_untrainable(faulty, records, reason)


def _cut_pair(
    first: list[int], second: list[int] | None, around: int, limit: int | None
) -> tuple[list[int], list[int] | None]:
    """Both texts cut to `limit` with the special tokens, the longer one first."""
    if limit is None:
        return first, second
    room = max(0, limit - around)
    if second is None:
        return first[:room], None
    keep_second = min(len(second), max(room // 2, room - len(first)))
    return first[: room - keep_second], second[:keep_second]


def _content(texts: Sequence[str], records: Sequence[Record], context: Context) -> list[list[int]]:
    """Ids of every text, checked to hold no control token."""
    ids, ends = context.backend.encode(texts)
    check_content(context.tokenizer, ids, ends, records)
    return [part.tolist() for part in np.split(ids, ends[:-1])] if len(texts) else []


def encode_token_classification(records: Sequence[Record], examples: Sequence[Example], context: Context) -> Block:
    """Documents of words; column tags [tokens] holds a tag's number on the first token of each word, else -1.

    The mark of a target stands on the same tokens. A word that the tokenizer writes as nothing becomes its
    unknown token, so that no tag is lost.
    """
    tokenizer = context.tokenizer
    chosen = [one for one in examples if isinstance(one, TaggedExample)]
    _refuse([index for index, one in enumerate(chosen) if not one.words], records, "the sentence has no words")
    encoded = tokenizer.encode_words([one.words for one in chosen])
    room = None
    if context.limit_tokens is not None:
        room = context.limit_tokens - len(tokenizer.prefix_ids) - len(tokenizer.suffix_ids)
    documents, tags, truncated = [], [], 0
    for record, one, (ids, words) in zip(records, chosen, encoded, strict=True):
        if tokenizer.holds_control_ids(ids):
            raise BadDataError(f"{record.where}: this tokenizer turns part of the text into a control token")
        body: list[int] = []
        marks: list[int] = []
        starts = {word: place for place, word in reversed(list(enumerate(words)))}
        stops = {word: place + 1 for place, word in enumerate(words)}
        for number, tag in enumerate(one.tags):
            pieces = ids[starts[number] : stops[number]] if number in starts else [_unknown(tokenizer.unk_id, record)]
            if room is not None and len(body) + len(pieces) > room:
                truncated += 1
                break
            body += pieces
            marks += [context.names.number(tag, record.where), *[-1] * (len(pieces) - 1)]
        documents.append([*tokenizer.prefix_ids, *body, *tokenizer.suffix_ids])
        tags += [*[-1] * len(tokenizer.prefix_ids), *marks, *[-1] * len(tokenizer.suffix_ids)]
    block, _ = block_of_documents(documents, [r.line for r in records], context.id_type)
    column = np.array(tags, dtype=np.int32)
    marked = (column >= 0).astype(np.uint8)
    columns = {**block.columns, "marks": marked, "tags": column}
    return Block(columns, num_targets=int(marked.sum(dtype=np.int64)), num_truncated=truncated)


def _unknown(unk_id: int | None, record: Record) -> int:
    if unk_id is None:
        raise BadDataError(f"{record.where}: a word becomes no token at all, and the tokenizer has no unknown token")
    return unk_id


def encode_question_answering(records: Sequence[Record], examples: Sequence[Example], context: Context) -> Block:
    """Windows of question and context, `context.row_tokens` long at most; neighbours share `stride_tokens`.

    Columns: answer_spans (start, stop, ... token positions of the answers that lie whole in the window),
    pair_starts (where the context begins), questions (the number of the record in this block's span).
    """
    tokenizer = context.tokenizer
    chosen = [one for one in examples if isinstance(one, QuestionExample)]
    questions = _content([one.question for one in chosen], records, context)
    contexts = tokenizer.encode_with_offsets([one.context for one in chosen])
    fixed = len(tokenizer.prefix_ids) + len(tokenizer.pair_middle_ids) + len(tokenizer.suffix_ids)
    documents: list[list[int]] = []
    spans: list[list[int]] = []
    lines, pair_starts, numbers, truncated = [], [], [], 0
    for number, (record, one, question, (ids, offsets)) in enumerate(
        zip(records, chosen, questions, contexts, strict=True)
    ):
        if tokenizer.holds_control_ids(ids):
            raise BadDataError(f"{record.where}: this tokenizer turns part of the text into a control token")
        # Half of a row stays for the context, whatever the question.
        kept = question[: max(1, (context.row_tokens - fixed) // 2)]
        truncated += len(kept) < len(question)
        room = context.row_tokens - fixed - len(kept)
        if not ids or room <= context.stride_tokens:
            raise BadDataError(
                f"{record.where}: the context is empty or a row of {context.row_tokens} tokens leaves"
                f" it no room beside data.stride_tokens {context.stride_tokens}"
            )
        found = [_token_span(offsets, start, start + len(text)) for start, text in one.answers]
        begin = 0
        while True:
            stop = min(begin + room, len(ids))
            head = [*tokenizer.prefix_ids, *kept, *tokenizer.pair_middle_ids]
            documents.append([*head, *ids[begin:stop], *tokenizer.suffix_ids])
            inside = [(a, b) for a, b in found if begin <= a and b <= stop]
            spans.append([len(head) + place - begin for pair in inside for place in pair])
            lines.append(record.line)
            pair_starts.append(len(head))
            numbers.append(number)
            if stop == len(ids):
                break
            begin += room - context.stride_tokens
    block, _ = block_of_documents(documents, lines, context.id_type)
    flat, counts = ragged(spans, np.int32)
    columns = {
        **block.columns,
        "answer_spans": flat,
        "answer_spans_lengths": counts,
        "pair_starts": np.array(pair_starts, dtype=np.uint32),
        "questions": np.array(numbers, dtype=np.uint32),
    }
    return Block(
        columns,
        num_targets=len(documents),
        num_truncated=truncated,
        num_extra=len(documents) - len(records),
        num_moved=sum(one.num_moved for one in chosen),
    )


def _token_span(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[int, int]:
    """The tokens [first, last) that hold the characters [start, stop)."""
    first = bisect_right(offsets, start, key=lambda offset: offset[1])
    return first, max(first + 1, bisect_left(offsets, stop, key=lambda offset: offset[0]))


def encode_seq2seq_lm(records: Sequence[Record], examples: Sequence[Example], context: Context) -> Block:
    """Documents of a source text; column target_ids holds the target text with its end token."""
    tokenizer = context.tokenizer
    chosen = [one for one in examples if isinstance(one, PromptExample)]
    sources = _content([one.prompt for one in chosen], records, context)
    targets = _content([one.response for one in chosen], records, context)
    eos_id = tokenizer.eos_id
    assert eos_id is not None
    around = len(tokenizer.prefix_ids) + len(tokenizer.suffix_ids)
    documents, outputs, truncated = [], [], 0
    empty = [
        index for index, (source, target) in enumerate(zip(sources, targets, strict=True)) if not source or not target
    ]
    _refuse(empty, records, "the source or the target text is empty")
    for record, source, target in zip(records, sources, targets, strict=True):
        limit, target_limit = context.limit_tokens, context.target_limit_tokens
        kept = source if limit is None else source[: limit - around]
        if target_limit is not None and len(target) + 1 > target_limit:
            if limit is None:
                raise BadDataError(
                    f"{record.where}: a target of {len(target) + 1} tokens is longer than {target_limit}"
                    " (data.target_tokens); raise it, or set data.overlong: truncate"
                )
            target = target[: target_limit - 1]
            truncated += len(kept) == len(source)
        truncated += len(kept) < len(source)
        documents.append([*tokenizer.prefix_ids, *kept, *tokenizer.suffix_ids])
        outputs.append([*target, eos_id])
    block, _ = block_of_documents(documents, [r.line for r in records], context.id_type)
    flat, lengths = ragged(outputs, context.id_type)
    columns = {**block.columns, "target_ids": flat, "target_ids_lengths": lengths}
    return Block(columns, num_targets=len(flat), num_truncated=truncated)
