"""A tag for every word of a sentence."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.encode.blocks import Block, Column, block_of_documents, cut_columns
from data_prep.encode.content import Context, refuse_untrainable_at
from data_prep.errors import BadDataError
from data_prep.shapes.examples import Example, TaggedExample
from data_prep.sources.records import Record
from data_prep.tasks.data_task import Blank, DataTask, DocumentView, Histogram, name_histogram, name_of
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
    cut: list[tuple[int, int]] = []
    for record, one, (ids, words) in zip(records, chosen, encoded, strict=True):
        if tokenizer.holds_control_ids(ids):
            raise BadDataError(
                f"{record.where}: this tokenizer turns part of the text into a control token", "control_token"
            )
        body, marks, gone = _body(record, one.tags, ids, words, context)
        documents.append([*tokenizer.prefix_ids, *body, *tokenizer.suffix_ids])
        tags += [*[_NO_TAG] * len(tokenizer.prefix_ids), *marks, *[_NO_TAG] * len(tokenizer.suffix_ids)]
        cut.append(gone)
    block = block_of_documents(documents, [record.line for record in records], context.id_type)
    column = np.array(tags, dtype=np.int32)
    marked = (column != _NO_TAG).astype(np.uint8)
    columns = {**block.columns, "marks": marked, _TAGS.name: column}
    columns |= cut_columns([tokens for tokens, _ in cut], [words for _, words in cut])
    num_truncated = sum(words > 0 for _, words in cut)
    return Block(columns, num_targets=int(marked.sum(dtype=np.int64)), num_truncated=num_truncated)


def _body(
    record: Record, tags: Sequence[str], ids: Sequence[int], words: Sequence[int | None], context: Context
) -> tuple[list[int], list[int], tuple[int, int]]:
    """The tokens of a sentence, the number of a tag at each of them, and the tokens and words left out at the end.

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
            tokens = sum(stops[word] - starts[word] if word in starts else 1 for word in range(number, len(tags)))
            return body, marks, (tokens, len(tags) - number)
        body += pieces
        marks += [context.names.number(tag, record, number), *[_NO_TAG] * (len(pieces) - 1)]
    return body, marks, (0, 0)


def _unknown(unk_id: int | None, record: Record) -> int:
    if unk_id is None:
        raise BadDataError(f"{record.where}: a word becomes no token at all, and the tokenizer has no unknown token")
    return unk_id


def _view(store: TokenStore, document: int, start: int, stop: int) -> DocumentView:
    learned = store.targets(document, start, stop)
    numbers = store.token_column(_TAGS.name, document, start, stop).tolist()
    tags = tuple(name_of(store, number) if is_tag else None for number, is_tag in zip(numbers, learned, strict=True))
    return DocumentView(learned, int(learned.sum()), tags=tags)


def _histograms(store: TokenStore) -> list[Histogram]:
    return [name_histogram(store, _TAGS, "Tags", "words")]


def _blank(_config: Mapping[str, Any], names: Sequence[str]) -> Blank:
    """Any tag for each word; the predicted tags stand beside the words."""

    def tags(fields: Mapping[str, Any]) -> list[str]:
        words = fields.get("words")
        return [names[0]] * len(words.split(" ") if isinstance(words, str) else words or ())

    return Blank("tags", "tags", tags, repeats=("words",))


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
    blank=_blank,
)
