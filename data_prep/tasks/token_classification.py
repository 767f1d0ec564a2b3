"""A tag for every word of a sentence."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_prep.encode.blocks import Block
from data_prep.encode.content import Context, refuse_untrainable_at
from data_prep.shapes.examples import Example, TaggedExample
from data_prep.sources.records import Record
from data_prep.tasks.data_task import Blank, DataTask, DocumentView, Histogram, name_histogram, name_of
from data_prep.tasks.tagged_words import SENTENCES, TAGS, WORD_STARTS, Sentence, TaggedWords, pieces_of_words
from data_prep.token_store import TokenStore


def encode(records: Sequence[Record], examples: Sequence[Example], context: Context) -> Block:
    """Documents of words; the tokens that carry a tag are the targets. Raises BadDataError."""
    tokenizer = context.tokenizer
    chosen = [one for one in examples if isinstance(one, TaggedExample)]
    wordless = [index for index, one in enumerate(chosen) if not one.words]
    refuse_untrainable_at(wordless, records, "the sentence has no words")
    encoded = tokenizer.encode_words([one.words for one in chosen])
    made = TaggedWords(context)
    for number, (record, one, (ids, owners)) in enumerate(zip(records, chosen, encoded, strict=True)):
        words = pieces_of_words(ids, owners, len(one.words), record, context)
        made.add(Sentence(record, number, words, one.tags, tokenizer.prefix_ids, tokenizer.suffix_ids))
    return made.block(records)


def view(store: TokenStore, document: int, start: int, stop: int) -> DocumentView:
    """The tokens that have a tag, and their tags."""
    learned = store.targets(document, start, stop)
    numbers = store.token_column(TAGS.name, document, start, stop).tolist()
    tags = tuple(name_of(store, number) if is_tag else None for number, is_tag in zip(numbers, learned, strict=True))
    return DocumentView(learned, int(learned.sum()), tags=tags)


def histograms(store: TokenStore) -> list[Histogram]:
    """How often each tag is used."""
    unit = "pieces of words" if WORD_STARTS.name in store.columns else "words"
    return [name_histogram(store, TAGS, "Tags", unit)]


def name_of_each_word(names: Sequence[str]) -> Callable[[Mapping[str, Any]], list[str]]:
    """The stand-in for the tags of a record that has words alone: the first of `names` for each."""

    def value(fields: Mapping[str, Any]) -> list[str]:
        words = fields.get("words")
        return [names[0]] * len(words.split(" ") if isinstance(words, str) else words or ())

    return value


def _blank(_config: Mapping[str, Any], names: Sequence[str]) -> Blank:
    """Any tag for each word; the predicted tags stand beside the words."""
    return Blank("tags", "tags", name_of_each_word(names), repeats=("words",))


TASK = DataTask(
    name="token_classification",
    shapes=("tags",),
    columns=(TAGS, WORD_STARTS, SENTENCES),
    encode=encode,
    marks_tokens=True,
    has_label_names=True,
    tags_words=True,
    learned="tagged",
    view=view,
    histograms=histograms,
    legend="(tag O is not written)",
    blank=_blank,
)
