"""What a tokenizer gains from new text: pieces on top of its vocabulary, one learner for each kind of model.

All three start from the text as the base tokenizer encodes it, so a new piece is always made of old ones.

BPE: training goes on where it stopped. New merges rank after all old ones, so a text is first cut as it
always was and only then do new merges join what they can. A merge into an old piece is forbidden: it
could let old merges, which rank higher, apply where they did not before.

Unigram: candidates are the same merges; a candidate's score is the logarithm of its share of the new text's
tokens, which is what the old scores are of the old text. So it competes as it would in a vocabulary that
knew both texts equally well. Where that would take an old piece's own text away from it, the score
is lowered until the old piece wins. Scores of old pieces do not change.

WordPiece looks for the longest piece first: candidates are frequent whole words and merged continuations.
"""

import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers

from data_prep.tokenizer.base_model import BaseModel, encode_words
from data_prep.tokenizer.pair_merges import learn_merges

_BLANK = "▁"
_LONGEST_PIECE = 64
_LONGEST_CHARACTERS = 16  # of pieces that are text and not bytes, as sentencepiece has it
_MIN_COUNT = 2
_CHARACTER_COVERAGE = 0.9995
_ROUNDS = 3
_MORE_CANDIDATES = 1000


@dataclass(frozen=True)
class NewPieces:
    """Pieces in the order of their new ids.

    merges: for BPE, in the order of their ranks; scores: for unigram, beside `pieces`.
    num_parts: pieces that stand nowhere in the learned text and only build longer ones (BPE needs them).
    """

    pieces: tuple[str, ...]
    merges: tuple[tuple[str, str], ...] = ()
    scores: tuple[float, ...] = ()
    num_parts: int = 0


def learn_pieces(base: BaseModel, words: Counter[str], num_pieces: int) -> NewPieces:
    """At most `num_pieces` new pieces from words (as the pre-tokenizer leaves them) and how often they occur."""
    match base.kind:
        case "BPE":
            return _learn_bpe(base, words, num_pieces)
        case "Unigram":
            return _learn_unigram(base, words, num_pieces)
        case _:
            return _learn_wordpiece(base, words, num_pieces)


class _Names:
    """Gives merged tokens their ids: equal texts the same one, and none to what must not be made."""

    def __init__(self, base: BaseModel, added: Sequence[str], longest: int):
        self._texts = dict(base.texts)
        self._known = {**base.vocabulary, **base.added}
        self._prefix: str = base.model.get("continuing_subword_prefix") or ""
        self._longest = longest
        self.first: int = max(self._known.values()) + 1
        self.pieces: list[str] = []
        self.ids: dict[str, int] = {}
        for text in added:
            self.add(text)

    def add(self, text: str) -> int:
        index = self.first + len(self.pieces)
        self.pieces.append(text)
        self._texts[index] = text
        self.ids[text] = index
        return index

    def text(self, index: int) -> str:
        return self._texts[index]

    def __call__(self, left: int, right: int) -> int | None:
        text = self._texts[left] + self._texts[right].removeprefix(self._prefix)
        if text in self.ids:
            return self.ids[text]
        if text in self._known or len(text) > self._longest:
            return None
        return self.add(text)


def _learn_bpe(base: BaseModel, words: Counter[str], num_pieces: int) -> NewPieces:
    if base.is_byte_level:
        parts, characters = words, []
    else:
        parts = _cut_by_script(words, base)
        characters = _new_characters(base, parts, num_pieces // 2)
    names = _Names(base, characters, _LONGEST_PIECE if base.is_byte_level else _LONGEST_CHARACTERS)
    sequences = _sequences(base, list(parts), names.ids)
    merges, counts = learn_merges(
        sequences, list(parts.values()), names, num_pieces - len(characters), _MIN_COUNT
    )  # fmt: skip
    used = {index for index in names.ids.values() if counts.get(index, 0)}
    needed = set(used)
    for merge in reversed(merges):
        if merge.token in needed:
            needed |= {merge.left, merge.right}
    kept = [text for text in names.pieces if names.ids[text] in needed]
    return NewPieces(
        tuple(kept),
        tuple((names.text(m.left), names.text(m.right)) for m in merges if m.token in needed),
        num_parts=sum(names.ids[text] not in used for text in kept),
    )


def _sequences(base: BaseModel, words: Sequence[str], characters: Mapping[str, int]) -> list[list[int]]:
    """Words as ids; -1 for what cannot be part of a piece; new single characters with their new ids."""
    closed = base.closed
    if not characters:
        return [
            [-1 if index in closed else index for index in ids] for ids in encode_words(base.encoder(base.model), words)
        ]
    cut = re.compile("([" + "".join(map(re.escape, characters)) + "])")
    runs = [[run for run in cut.split(word) if run] for word in words]
    plain = sorted({run for word in runs for run in word if run not in characters})
    ids = dict(zip(plain, encode_words(base.encoder(base.model), plain), strict=True))
    return [
        [
            -1 if index in closed else index
            for run in word
            for index in ([characters[run]] if run in characters else ids[run])
        ]
        for word in runs
    ]


def _class_of(character: str) -> str:
    if character == _BLANK:
        return _BLANK
    category = unicodedata.category(character)[0]
    if category in "LM":
        code = ord(character)
        ideographic = 0x2E80 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or code >= 0x20000
        return "H" if ideographic else "L"
    return "N" if category == "N" else "P"


def _cut_by_script(words: Counter[str], base: BaseModel) -> Counter[str]:
    """Words cut where no sentencepiece vocabulary lets a piece reach over: letters, ideographs, digits, the rest."""
    single_digits = not any(re.search(r"\d\d", piece) for piece in base.vocabulary)
    digits = "N" if single_digits else "N+"
    pattern = re.compile(rf"{_BLANK}*(?:L+|P+|{digits})|H+|{_BLANK}+")
    classes: dict[int, str] = {}
    parts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            if ord(character) not in classes:
                classes[ord(character)] = _class_of(character)
        for match in pattern.finditer(word.translate(classes)):
            parts[word[match.start() : match.end()]] += count
    return parts


def _new_characters(base: BaseModel, words: Counter[str], limit: int) -> list[str]:
    """Single characters that the base has no piece for, most frequent first, up to nearly all their occurrences."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            if character not in base.vocabulary and character not in base.added:
                counts[character] += count
    total = counts.total()
    chosen: list[str] = []
    covered = 0
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if count < _MIN_COUNT or covered > _CHARACTER_COVERAGE * total or len(chosen) == limit:
            break
        chosen.append(character)
        covered += count
    return chosen


def _learn_unigram(base: BaseModel, words: Counter[str], num_pieces: int) -> NewPieces:
    parts = _cut_by_script(words, base)
    characters = _new_characters(base, parts, num_pieces // 2)
    names = _Names(base, characters, _LONGEST_CHARACTERS)
    sequences = _sequences(base, list(parts), names.ids)
    # More than asked for: parts of longer pieces turn out unused and leave.
    _, merged = learn_merges(sequences, list(parts.values()), names, 2 * num_pieces + _MORE_CANDIDATES, _MIN_COUNT)
    first_scores = _log_shares({text: merged.get(names.ids[text], 0) for text in names.pieces}, sum(merged.values()))
    texts, weights = list(words), list(words.values())

    used, total = _unigram_uses(base, first_scores, texts, weights)
    ranked = _by_gain(base, {text: used[text] for text in names.pieces if used[text] >= _MIN_COUNT})
    scores = _below_old_pieces(base, _log_shares({text: used[text] for text in ranked}, total))
    chosen = _used_pieces(
        ranked, num_pieces, lambda some: _unigram_uses(base, {text: scores[text] for text in some}, texts, weights)[0]
    )
    return NewPieces(tuple(chosen), scores=tuple(scores[text] for text in chosen))


def _log_shares(counts: Mapping[str, int], total: int) -> dict[str, float]:
    # Nine digits name a single-precision score exactly, and survive tokenizer.json.
    return {text: float(f"{math.log(max(count, 1) / total):.9g}") for text, count in counts.items()}


def _by_gain(base: BaseModel, uses: Mapping[str, int]) -> list[str]:
    """Pieces ordered by the tokens they save. What was unknown saves none but its meaning: it counts as one."""
    spelled = dict(zip(uses, base.spell(list(uses)), strict=True))
    return sorted(uses, key=lambda text: (-uses[text] * max(len(spelled[text]) - 1, 1), text))


def _used_pieces(ranked: list[str], num_pieces: int, uses: Callable[[list[str]], Counter[str]]) -> list[str]:
    """The first `num_pieces` of `ranked` that are used when they are together; others take the place of unused ones."""
    for rounds_left in itertools.count(_ROUNDS, -1):
        chosen = ranked[:num_pieces]
        counts = uses(chosen)
        unused = {text for text in chosen if counts[text] < _MIN_COUNT}
        if not unused:
            return chosen
        ranked = [text for text in (ranked if rounds_left > 0 else chosen) if text not in unused]
    raise AssertionError("pieces run out before the counter")


def _with_scores(base: BaseModel, candidates: Mapping[str, float]) -> tokenizers.Tokenizer:
    return base.encoder({**base.model, "vocab": [*base.model["vocab"], *candidates.items()]})


def _unigram_uses(
    base: BaseModel, candidates: Mapping[str, float], words: Sequence[str], counts: Sequence[int]
) -> tuple[Counter[str], int]:
    """How often every candidate is used, and the number of all tokens."""
    first, order = len(base.vocabulary), list(candidates)
    uses = _count_ids(encode_words(_with_scores(base, candidates), words), counts)
    return Counter({text: uses[first + place] for place, text in enumerate(order)}), uses.total()


def _count_ids(encoded: Sequence[Sequence[int]], counts: Sequence[int]) -> Counter[int]:
    flat = np.fromiter(itertools.chain.from_iterable(encoded), np.int64)
    weights = np.repeat(np.asarray(counts, dtype=np.int64), [len(ids) for ids in encoded])
    totals = np.bincount(flat, weights=weights)
    return Counter({int(index): int(totals[index]) for index in np.flatnonzero(totals)})


def _below_old_pieces(base: BaseModel, candidates: Mapping[str, float]) -> dict[str, float]:
    """Scores lowered until every old piece that encodes as itself still does."""
    pieces = [piece for piece, index in base.vocabulary.items() if index not in base.closed]
    encoded = encode_words(base.encoder(base.model), pieces)
    own = [piece for piece, ids in zip(pieces, encoded, strict=True) if ids == [base.vocabulary[piece]]]
    scores = dict(candidates)
    first, order = len(base.vocabulary), list(scores)
    old = [score for _, score in base.model["vocab"]]
    while True:
        encoded = encode_words(_with_scores(base, scores), own)
        lost = [
            (base.vocabulary[piece], ids)
            for piece, ids in zip(own, encoded, strict=True)
            if ids != [base.vocabulary[piece]] and any(index >= first for index in ids)
        ]
        if not lost:
            return scores
        for index, ids in lost:
            new = [order[other - first] for other in ids if other >= first]
            excess = sum(old[other] if other < first else scores[order[other - first]] for other in ids) - old[index]
            for text in new:
                scores[text] = float(f"{scores[text] - max(excess, 0.0) / len(new) - 1e-3:.9g}")


def _learn_wordpiece(base: BaseModel, words: Counter[str], num_pieces: int) -> NewPieces:
    limit = base.model["max_input_chars_per_word"]
    known = {word: count for word, count in words.items() if len(word) <= limit and word not in base.added}
    texts, counts = list(known), list(known.values())
    encoded = encode_words(base.encoder(base.model), texts)
    names = _Names(base, [], limit)
    sequences = [[-1 if index in base.closed else index for index in ids] for ids in encoded]
    learn_merges(sequences, counts, names, 2 * num_pieces + _MORE_CANDIDATES, _MIN_COUNT)
    whole = sorted(word for word in texts if known[word] >= _MIN_COUNT and word not in base.vocabulary)

    def uses(some: list[str]) -> Counter[str]:
        vocabulary = base.vocabulary | {text: names.first + place for place, text in enumerate(some)}
        found = _count_ids(encode_words(base.encoder({**base.model, "vocab": vocabulary}), texts), counts)
        return Counter({text: found[names.first + place] for place, text in enumerate(some)})

    used = uses(list(dict.fromkeys([*whole, *names.pieces])))
    ranked = _by_gain(base, {text: count for text, count in used.items() if count >= _MIN_COUNT})
    return NewPieces(tuple(_used_pieces(ranked, num_pieces, uses)))
