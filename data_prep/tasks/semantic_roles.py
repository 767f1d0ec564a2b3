"""The roles that the words of a sentence have for one of its predicates: a record a predicate.

With a tokenizer that knows pairs of texts, the predicate is the second text of a pair with the sentence, as in Shi and
Lin, "Simple BERT Models for Relation Extraction and Semantic Role Labeling" (2019): [CLS] sentence [SEP] predicate
[SEP]. Where the same verb stands twice in a sentence, this does not say which is meant; so the predicate's own pieces
in the sentence have token type 1 as well, as in AllenNLP's model of that paper (srl_bert), for models with types.
A tokenizer that puts nothing between two texts is that of a decoder, which sees only what stands before a word: there
the predicate comes first.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.encode.blocks import Block, Column
from data_prep.encode.content import Context, refuse_untrainable_at
from data_prep.shapes.examples import Example, RolesExample
from data_prep.sources.records import Record
from data_prep.tasks.data_task import Blank, DataTask, DocumentView
from data_prep.tasks.tagged_words import SENTENCES, TAGS, WORD_STARTS, Sentence, TaggedWords, pieces_of_words
from data_prep.tasks.token_classification import histograms, name_of_each_word
from data_prep.tasks.token_classification import view as view_of_tags
from data_prep.token_store import TokenStore
from data_prep.tokenizer.tokenizer import Tokenizer

#: 1 on the pieces of the predicate, in the sentence and beside it; and on what follows it.
_PREDICATE_TYPES = Column("predicate_types", per="token")


def encode(records: Sequence[Record], examples: Sequence[Example], context: Context) -> Block:
    """Documents of a sentence and a predicate; the tokens that carry a role are the targets. Raises BadDataError."""
    chosen = [one for one in examples if isinstance(one, RolesExample)]
    without = [index for index, one in enumerate(chosen) if not one.predicate]
    refuse_untrainable_at(without, records, "the sentence has no predicate")
    encoded = context.tokenizer.encode_words([one.words for one in chosen])
    made = TaggedWords(context)
    for number, (record, one, (ids, owners)) in enumerate(zip(records, chosen, encoded, strict=True)):
        words = pieces_of_words(ids, owners, len(one.words), record, context)
        predicate = [piece for word in one.predicate for piece in words[word]]
        before, after, typed = _around(predicate, context.tokenizer)
        made.add(Sentence(record, number, words, one.tags, before, after, one.predicate, typed))
    block = made.block(records)
    block.columns[_PREDICATE_TYPES.name] = np.array(made.types, dtype=np.uint8)
    return block


def _around(predicate: Sequence[int], tokenizer: Tokenizer) -> tuple[list[int], list[int], int]:
    """The tokens before and behind the sentence, and how many of the last ones have type 1."""
    prefix, middle, suffix = tokenizer.prefix_ids, tokenizer.pair_middle_ids, tokenizer.suffix_ids
    if not middle:
        return [*prefix, *predicate], [*suffix], 0
    second = [*predicate, *suffix]
    return [*prefix], [*middle, *second], len(second)


def _view(store: TokenStore, document: int, start: int, stop: int) -> DocumentView:
    shown = view_of_tags(store, document, start, stop)
    marked = np.flatnonzero(store.token_column(_PREDICATE_TYPES.name, document))
    place = f"predicate at token {marked[0]}" if len(marked) else "predicate outside of this window"
    return DocumentView(shown.learned, shown.num_targets, (place,), shown.tags)


def _blank(_config: Mapping[str, Any], names: Sequence[str]) -> Blank:
    """Any role for each word; the predicted ones stand beside the words and their predicate."""
    return Blank("roles", "roles", name_of_each_word(names), repeats=("words", "predicate"))


TASK = DataTask(
    name="semantic_roles",
    shapes=("roles",),
    columns=(TAGS, WORD_STARTS, SENTENCES, _PREDICATE_TYPES),
    encode=encode,
    marks_tokens=True,
    has_label_names=True,
    tags_words=True,
    learned="with a role",
    view=_view,
    histograms=histograms,
    legend="(role O is not written)",
    blank=_blank,
)
