"""A tag for every word of a sentence."""

from collections.abc import Sequence

import numpy as np

from data_prep.encode.blocks import Block, Column, block_of_documents
from data_prep.encode.content import Context, refuse_untrainable_at
from data_prep.errors import BadDataError
from data_prep.shapes.examples import Example, TaggedExample
from data_prep.sources.records import Record
from data_prep.tasks.data_task import DataTask, DocumentView, Histogram, name_histogram, name_of
from data_prep.token_store import TokenStore

_NO_TAG = -1
#: The number of a word's tag on the word's first token, else -1.
_TAGS = Column("tags", per="token", holds="label numbers")


def encode(records: Sequence[Record], examples: Sequence[Example], context: Context) -> Block:
    """Documents of words; the tokens that carry a tag are the targets.

    A word that the tokenizer writes as nothing becomes its unknown token, so that no tag is lost. Raises BadDataError.
    """
    tokenizer = context.tokenizer
    chosen = [one for one in examples if isinstance(one, TaggedExample)]
    wordless = [index for index, one in enumerate(chosen) if not one.words]
    refuse_untrainable_at(wordless, records, "the sentence has no words")
    encoded = tokenizer.encode_words([one.words for one in chosen])
    documents: list[list[int]] = []
    tags: list[int] = []
    truncated = 0
    for record, one, (ids, words) in zip(records, chosen, encoded, strict=True):
        if tokenizer.holds_control_ids(ids):
            raise BadDataError(f"{record.where}: this tokenizer turns part of the text into a control token")
        body, marks, is_cut = _body(record, one.tags, ids, words, context)
        documents.append([*tokenizer.prefix_ids, *body, *tokenizer.suffix_ids])
        tags += [*[_NO_TAG] * len(tokenizer.prefix_ids), *marks, *[_NO_TAG] * len(tokenizer.suffix_ids)]
        truncated += is_cut
    block = block_of_documents(documents, [record.line for record in records], context.id_type)
    column = np.array(tags, dtype=np.int32)
    marked = (column != _NO_TAG).astype(np.uint8)
    columns = {**block.columns, "marks": marked, _TAGS.name: column}
    return Block(columns, num_targets=int(marked.sum(dtype=np.int64)), num_truncated=truncated)


def _body(
    record: Record, tags: Sequence[str], ids: Sequence[int], words: Sequence[int | None], context: Context
) -> tuple[list[int], list[int], bool]:
    """The tokens of a sentence, the number of a tag at each of them, and whether words were left out at the end.

    `words` [tokens] has the place of the word that each token belongs to.
    """
    tokenizer, room = context.tokenizer, None
    if context.limit_tokens is not None:
        room = context.limit_tokens - len(tokenizer.prefix_ids) - len(tokenizer.suffix_ids)
    starts = {word: place for place, word in reversed(list(enumerate(words)))}
    stops = {word: place + 1 for place, word in enumerate(words)}
    body: list[int] = []
    marks: list[int] = []
    for number, tag in enumerate(tags):
        written = number in starts
        pieces = ids[starts[number] : stops[number]] if written else [_unknown(tokenizer.unk_id, record)]
        if room is not None and len(body) + len(pieces) > room:
            return body, marks, True
        body += pieces
        marks += [context.names.number(tag, record, number), *[_NO_TAG] * (len(pieces) - 1)]
    return body, marks, False


def _unknown(unk_id: int | None, record: Record) -> int:
    if unk_id is None:
        raise BadDataError(f"{record.where}: a word becomes no token at all, and the tokenizer has no unknown token")
    return unk_id


def _view(store: TokenStore, document: int, start: int, stop: int) -> DocumentView:
    learned = store.targets(document, start, stop)
    numbers = store.token_column(_TAGS.name, document, start, stop).tolist()
    tags = tuple(name_of(store, number) if number >= 0 else None for number in numbers)
    return DocumentView(learned, int(learned.sum()), tags=tags)


def _histograms(store: TokenStore) -> list[Histogram]:
    return [name_histogram(store, _TAGS, "Tags", "words")]


TASK = DataTask(
    name="token_classification",
    shapes=("tags",),
    columns=(_TAGS,),
    encode=encode,
    marks_tokens=True,
    has_label_names=True,
    learned="tagged",
    view=_view,
    histograms=_histograms,
    legend="(tag O is not written)",
)
