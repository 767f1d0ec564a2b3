"""Records to documents, one function a task. A document is token ids, target marks and the task's columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from data_prep.errors import BadDataError
from data_prep.records import Record, label_field, messages_field, shape_of, text_field
from data_prep.templates import ChatFormat, mark_spans
from data_prep.tokenizer import Tokenizer


@dataclass(frozen=True)
class Document:
    """One encoded record: ids and marks of equal length; label and truncated for tasks with labels."""

    input_ids: list[int]
    targets: list[bool]
    line: int
    label: int = -1
    truncated: bool = False


def encode_causal_lm(records: Sequence[Record], tokenizer: Tokenizer, chat: ChatFormat | None) -> list[Document]:
    """Documents for next-token prediction, one a record.

    ``text``: every token but the first is a target. ``prompt``/``response``: encoded apart, as inference
    would; the response and its eos are targets. ``messages``: what the assistant says, with the end of
    its turn; needs `chat`. The first token of a document is never a target. Raises BadDataError.
    """
    assert tokenizer.eos_id is not None
    texts: list[str] = []
    conversations: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    shapes = [shape_of(record) for record in records]
    for record, shape in zip(records, shapes, strict=True):
        if shape == "messages":
            assert chat is not None
            rendered, found = chat.render_with_spans(messages_field(record), record.where)
            conversations.append(rendered)
            spans.append(found)
        elif shape == "text":
            texts.append(text_field(record, "text"))
        else:
            texts += [text_field(record, "prompt"), text_field(record, "response")]
    encoded = iter(tokenizer.encode_batch(texts))
    rendered_ids = iter(zip(tokenizer.encode_rendered(conversations), spans, strict=True))

    documents = []
    for record, shape in zip(records, shapes, strict=True):
        if shape == "messages":
            (ids, offsets), found = next(rendered_ids)
            marks = mark_spans(offsets, found)
        else:
            context = [*tokenizer.prefix_ids, *(next(encoded) if shape == "prompt" else [])]
            answer = next(encoded)
            _refuse_control_ids(tokenizer, context[len(tokenizer.prefix_ids) :] + answer, record)
            ids = [*context, *answer, tokenizer.eos_id]
            marks = [False] * len(context) + [bool(answer)] * (len(answer) + 1)
        marks[:1] = [False] if ids else []
        _check_ids(tokenizer, ids, record)
        if not any(marks):
            reason = {"messages": "no turn of the assistant", "prompt": "the response is empty"}.get(shape, "no text")
            raise BadDataError(f"{record.where}: nothing in this record would be trained: {reason}")
        documents.append(Document(ids, marks, record.line))
    return documents


def encode_sequence_classification(
    records: Sequence[Record], tokenizer: Tokenizer, label_index: Mapping[str, int], limit_tokens: int | None
) -> list[Document]:
    """Documents for classification: the text with the tokenizer's own special tokens, and its label's index.

    With `limit_tokens`, longer texts are cut so that the special tokens still stand around what is left.
    Raises BadDataError, also for a label that `label_index` does not know.
    """
    encoded = tokenizer.encode_batch([text_field(record, "text") for record in records])
    room = None if limit_tokens is None else limit_tokens - len(tokenizer.prefix_ids) - len(tokenizer.suffix_ids)
    documents = []
    for record, content in zip(records, encoded, strict=True):
        _refuse_control_ids(tokenizer, content, record)
        truncated = room is not None and len(content) > room
        ids = [*tokenizer.prefix_ids, *content[:room], *tokenizer.suffix_ids]
        _check_ids(tokenizer, ids, record)
        if not content:
            raise BadDataError(f"{record.where}: the text is empty")
        label = label_field(record)
        if label not in label_index:
            known = ", ".join(list(label_index)[:8])
            raise BadDataError(f"{record.where}: label {label!r} is not one of {known} (data.label_names, or train)")
        documents.append(Document(ids, [False] * len(ids), record.line, label_index[label], truncated))
    return documents


def _refuse_control_ids(tokenizer: Tokenizer, ids: list[int], record: Record) -> None:
    if tokenizer.holds_control_ids(ids):
        raise BadDataError(f"{record.where}: this tokenizer turns part of the text into a control token")


def _check_ids(tokenizer: Tokenizer, ids: list[int], record: Record) -> None:
    if ids and max(ids) >= tokenizer.vocab_size:
        raise BadDataError(f"{record.where}: token id {max(ids)} is outside the vocabulary of {tokenizer.vocab_size}")


@dataclass(frozen=True)
class Columns:
    """Documents of one span, flat: ids [tokens], marks [tokens], lengths, lines and labels [documents]."""

    input_ids: np.ndarray
    marks: np.ndarray
    lengths: np.ndarray
    lines: np.ndarray
    labels: np.ndarray


def flatten(documents: Sequence[Document], id_type: np.dtype) -> Columns:
    """The columns of `documents`, ids in `id_type` (uint16 or uint32)."""
    lengths = np.array([len(document.input_ids) for document in documents], dtype=np.uint32)
    total = int(lengths.sum())
    ids = np.fromiter(chain.from_iterable(document.input_ids for document in documents), id_type, total)
    marks = np.fromiter(chain.from_iterable(document.targets for document in documents), np.uint8, total)
    lines = np.array([document.line for document in documents], dtype=np.uint32)
    labels = np.array([document.label for document in documents], dtype=np.int32)
    return Columns(ids, marks, lengths, lines, labels)
