"""A label, several labels or a score for a text or a pair of texts.

These documents stand alone in their row with the tokenizer's own special tokens around them, so what is too long for a
row is cut at encoding (``context.limit_tokens``), between its special tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.encode.blocks import Block, Column, Counts, block_of_documents, cut_columns, ragged
from data_prep.encode.content import Context, encode_texts, refuse_untrainable_at
from data_prep.shapes.examples import Example, LabelledExample, ScoredExample
from data_prep.sources.records import Record
from data_prep.tasks.data_task import (
    PAIR_STARTS,
    Blank,
    DataTask,
    DocumentView,
    Histogram,
    name_histogram,
    name_of,
    pair_fact,
)
from data_prep.token_store import TokenStore
from data_prep.tokenizer.tokenizer import Tokenizer

_LABELS = Column("labels", per="document", holds="label numbers")
_LABEL_SETS = Column("label_sets", per="ragged", holds="label numbers")
_SCORES = Column("scores", per="document")


def encode(records: Sequence[Record], examples: Sequence[Example], context: Context) -> Block:
    """Documents of a text or a pair of texts. Raises BadDataError."""
    chosen = [one for one in examples if isinstance(one, LabelledExample | ScoredExample)]
    contents = _contents(records, chosen, context)
    empty = [index for index, texts in enumerate(contents) if not any(texts)]
    documents: list[list[int]] = []
    pair_starts, cut = [], []
    for texts in contents:
        document, pair_start, num_cut = _document(texts, context.tokenizer, context.limit_tokens)
        documents.append(document)
        pair_starts.append(pair_start)
        cut.append(num_cut)
    refuse_untrainable_at(empty, records, "the text is empty")
    counts: Counts = {"num_targets": len(documents), "num_truncated": len(cut) - cut.count(0)}
    block = block_of_documents(documents, [record.line for record in records], context.id_type, **counts)
    starts = {PAIR_STARTS.name: np.array(pair_starts, dtype=np.uint32)}
    learned = _learned(records, chosen, context)
    return Block({**block.columns, **starts, **learned, **cut_columns(cut, [0] * len(cut))}, **counts)


def _contents(
    records: Sequence[Record], examples: Sequence[LabelledExample | ScoredExample], context: Context
) -> list[list[list[int]]]:
    """The ids of the one or two texts of every example."""
    texts = [[text for text in (one.text, one.pair) if text is not None] for one in examples]
    owners = [record for record, own in zip(records, texts, strict=True) for _ in own]
    encoded = iter(encode_texts([text for own in texts for text in own], owners, context))
    return [[next(encoded) for _ in own] for own in texts]


def _document(texts: list[list[int]], tokenizer: Tokenizer, limit: int | None) -> tuple[list[int], int, int]:
    """A document of one or two texts, where its second text begins (0: it has none), and the tokens cut off."""
    prefix, middle, suffix = tokenizer.prefix_ids, tokenizer.pair_middle_ids, tokenizer.suffix_ids
    around = len(prefix) + len(suffix) + (len(middle) if len(texts) == 2 else 0)
    first, *second = texts if limit is None else _cut(texts, max(0, limit - around))
    num_cut = sum(map(len, texts)) - len(first) - sum(map(len, second))
    if not second:
        return [*prefix, *first, *suffix], 0, num_cut
    before = [*prefix, *first, *middle]
    return [*before, *second[0], *suffix], len(before), num_cut


def _cut(texts: list[list[int]], room: int) -> list[list[int]]:
    """Cuts one or two texts to `room` tokens together, the longer one first."""
    if len(texts) == 1:
        return [texts[0][:room]]
    first, second = texts
    keep_second = min(len(second), max(room // 2, room - len(first)))
    return [first[: room - keep_second], second[:keep_second]]


def _learned(
    records: Sequence[Record], examples: Sequence[LabelledExample | ScoredExample], context: Context
) -> dict[str, np.ndarray]:
    """The column of what is learned: one label each, any number of labels, or a score."""
    if isinstance(examples[0], ScoredExample):
        scores = [one.score for one in examples if isinstance(one, ScoredExample)]
        return {_SCORES.name: np.array(scores, dtype=np.float32)}
    sets = [
        [context.names.number(name, record) for name in one.labels]
        for record, one in zip(records, examples, strict=True)
        if isinstance(one, LabelledExample)
    ]
    if examples[0].many:
        return ragged(_LABEL_SETS, sets, np.int32)
    return {_LABELS.name: np.array([labels[0] for labels in sets], dtype=np.int32)}


def _view(store: TokenStore, document: int, start: int, stop: int) -> DocumentView:
    facts = []
    if _LABELS.name in store.columns:
        facts.append(f"label: {name_of(store, int(store.column(_LABELS.name)[document]))}")
    if _LABEL_SETS.name in store.columns:
        names = [name_of(store, label) for label in store.ragged(_LABEL_SETS.name, document).tolist()]
        facts.append(f"labels: {', '.join(names) or 'none'}")
    if _SCORES.name in store.columns:
        facts.append(f"score: {float(store.column(_SCORES.name)[document]):g}")
    return DocumentView(np.zeros(stop - start, dtype=bool), 1, (*facts, *pair_fact(store, document)))


def _histograms(store: TokenStore) -> list[Histogram]:
    """How often each label is used, or how the scores are spread."""
    found = [
        name_histogram(store, column, "Labels", "documents")
        for column in (_LABELS, _LABEL_SETS)
        if column.name in store.columns
    ]
    if _SCORES.name in store.columns:
        counts, borders = np.histogram(store.column(_SCORES.name), bins=10)
        labels = tuple(f"{low:.3g}" for low in borders[:-1])
        found.append(Histogram("Scores", labels, "documents", tuple(counts.tolist())))
    return found


def _blank(config: Mapping[str, Any], names: Sequence[str]) -> Blank:
    """A score for a model without names, no label for one of several labels a text, else any label."""
    if not names:
        return Blank("score", "score", lambda _: 0.0)
    if config.get("problem_type") == "multi_label_classification":
        return Blank("label", "label", lambda _: [])
    return Blank("label", "label", lambda _: names[0])


TASK = DataTask(
    name="sequence_classification",
    shapes=("label", "score"),
    columns=(_LABELS, _LABEL_SETS, _SCORES, PAIR_STARTS),
    encode=encode,
    has_label_names=True,
    learned=None,
    view=_view,
    histograms=_histograms,
    blank=_blank,
)
