"""Documents of words with a tag each: pieces of words, and overlapping windows where a sentence is longer than a row.

A word is a target in exactly one window, in training as in an evaluation: in the one in which it stands farthest from
a cut, which is where it has most context; of two such windows in the earlier one. The targets of the windows of a
sentence, one window after the other, are therefore its words in their order.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from data_prep.encode.blocks import Block, Column, block_of_documents, cut_columns
from data_prep.encode.content import Context, refuse_strides
from data_prep.errors import BadDataError
from data_prep.sources.records import Record

_NO_TAG = -1
#: The number of a word's tag on its first piece, or on each of its pieces (data.tag_pieces); -1 elsewhere.
TAGS = Column("tags", per="token", holds="label numbers")
#: 1 on the first piece of a word that is a target; only where every piece is one.
WORD_STARTS = Column("word_starts", per="token")
#: The number of the record that a window was cut from; only with `overlong: split`.
SENTENCES = Column("sentence_numbers", per="document", holds="record numbers")


class Window(NamedTuple):
    """A stretch of words [first, stop) of a sentence, of which [scored_first, scored_stop) are targets here."""

    first: int
    stop: int
    scored_first: int
    scored_stop: int


def word_windows(sizes: Sequence[int], room: int, stride: int) -> list[Window]:
    """Windows over words of `sizes` pieces, at most `room` each: whole words, neighbours sharing up to `stride` pieces.

    A window in which no word would be a target is left out.
    """
    ends = list(accumulate(sizes, initial=0))
    stretches = list(_stretches(ends, room, stride))
    middles = [begin + end for begin, end in pairwise(ends)]
    # Between two neighbours, a word is farther from the cut where the later one begins if its middle lies behind
    # the middle of what they share. Begins and ends both grow, so no other window is better than these two.
    borders = [ends[later] + ends[stop] for (_, stop), (later, _) in pairwise(stretches)]
    places = [0, *(bisect_right(middles, border) for border in borders), len(sizes)]
    found = [Window(*stretch, *scored) for stretch, scored in zip(stretches, pairwise(places), strict=True)]
    return [window for window in found if window.scored_first < window.scored_stop]


def _stretches(ends: Sequence[int], room: int, stride: int) -> Iterator[tuple[int, int]]:
    """First and stop of each stretch of words that has room; word number i has the pieces ends[i]..ends[i + 1]."""
    first, last = 0, len(ends) - 1
    while True:
        stop = bisect_right(ends, ends[first] + room) - 1
        yield first, stop
        if stop == last:
            return
        # The next one takes one more word at least.
        least = max(ends[stop] - stride, ends[stop + 1] - room)
        first = next(word for word in range(first + 1, stop + 1) if ends[word] >= least)


class Sentence(NamedTuple):
    """The pieces of each word and its tag, and the tokens around the words of each of its documents.

    `number` is that of its record among the ones that are encoded. `marked` are the words that have type 1, like the
    last `typed` tokens behind the words.
    """

    record: Record
    number: int
    words: Sequence[list[int]]
    tags: Sequence[str]
    before: Sequence[int]
    after: Sequence[int]
    marked: Sequence[int] = ()
    typed: int = 0


@dataclass
class TaggedWords:
    """Documents in the making, and for each its record's number and the tokens and words that encoding left out."""

    context: Context
    documents: list[list[int]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    tags: list[int] = field(default_factory=list)
    word_starts: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    cut: list[tuple[int, int]] = field(default_factory=list)
    num_windowed: int = 0

    def add(self, sentence: Sentence) -> None:
        """Add a sentence: as one document, cut where that is asked for, or as windows where it is long."""
        words, around = sentence.words, len(sentence.before) + len(sentence.after)
        windows, tokens_cut, words_cut = [Window(0, len(words), 0, len(words))], 0, 0
        room = self.context.row_tokens - around
        if self.context.limit_tokens is not None:
            kept = bisect_right(list(accumulate(map(len, words))), self.context.limit_tokens - around)
            windows, words_cut = [Window(0, kept, 0, kept)], len(words) - kept
            tokens_cut = sum(map(len, words[kept:]))
        elif self.context.makes_windows and sum(map(len, words)) > room:
            refuse_strides(sentence.record, "sentence", room, self.context)
            tokens_cut = sum(max(0, len(pieces) - room) for pieces in words)
            sentence = sentence._replace(words=[pieces[:room] for pieces in words])
            windows = word_windows([len(pieces) for pieces in sentence.words], room, self.context.stride_tokens)
            self.num_windowed += len(windows) > 1
        for window in windows:
            self._add_window(sentence, window)
            self.cut.append((tokens_cut, words_cut))
            tokens_cut = words_cut = 0

    def _add_window(self, sentence: Sentence, window: Window) -> None:
        body: list[int] = []
        head, tail = [0] * len(sentence.before), [0] * len(sentence.after)
        self.tags += [_NO_TAG] * len(head)
        self.word_starts += head
        self.types += head
        for word in range(window.first, window.stop):
            pieces = sentence.words[word]
            body += pieces
            is_scored = window.scored_first <= word < window.scored_stop
            name = sentence.tags[word]
            tag = self.context.names.number(name, sentence.record, word) if is_scored else _NO_TAG
            self.tags += [tag, *[tag if self.context.every_piece else _NO_TAG] * (len(pieces) - 1)]
            self.word_starts += [int(is_scored), *[0] * (len(pieces) - 1)]
            self.types += [int(word in sentence.marked)] * len(pieces)
        self.tags += [_NO_TAG] * len(tail)
        self.word_starts += tail
        self.types += [*tail[sentence.typed :], *[1] * sentence.typed]
        self.documents.append([*sentence.before, *body, *sentence.after])
        self.numbers.append(sentence.number)

    def block(self, records: Sequence[Record]) -> Block:
        """The documents as a block; `records` are those that the numbers mean."""
        lines = [records[number].line for number in self.numbers]
        block = block_of_documents(self.documents, lines, self.context.id_type)
        tags = np.array(self.tags, dtype=np.int32)
        marks = (tags != _NO_TAG).astype(np.uint8)
        columns = {**block.columns, "marks": marks, TAGS.name: tags}
        if self.context.every_piece:
            columns[WORD_STARTS.name] = np.array(self.word_starts, dtype=np.uint8)
        if self.context.makes_windows:
            columns[SENTENCES.name] = np.array(self.numbers, dtype=np.uint32)
        columns |= cut_columns([tokens for tokens, _ in self.cut], [words for _, words in self.cut])
        return Block(
            columns,
            num_targets=int(marks.sum(dtype=np.int64)),
            num_truncated=sum(tokens > 0 for tokens, _ in self.cut),
            num_extra=len(self.documents) - len(records),
            notes={"windowed": self.num_windowed} if self.num_windowed else {},
        )


def pieces_of_words(
    ids: Sequence[int], owners: Sequence[int | None], num_words: int, record: Record, context: Context
) -> list[list[int]]:
    """The pieces of each word of a sentence, whose tokens `ids` belong to the words `owners`.

    A word that the tokenizer writes as nothing becomes its unknown token, so that no tag is lost. Raises BadDataError.
    """
    if context.tokenizer.holds_control_ids(ids):
        raise BadDataError(
            f"{record.where}: this tokenizer turns part of the text into a control token", "control_token"
        )
    starts = {word: place for place, word in reversed(list(enumerate(owners)))}
    stops = {word: place + 1 for place, word in enumerate(owners)}
    unknown = context.tokenizer.unk_id
    words: list[list[int]] = []
    for number in range(num_words):
        if number in starts:
            words.append(list(ids[starts[number] : stops[number]]))
        elif unknown is None:
            raise BadDataError(
                f"{record.where}: a word becomes no token at all, and the tokenizer has no unknown token"
            )
        else:
            words.append([unknown])
    return words
