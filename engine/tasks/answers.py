"""Answers as spans of a context, and how far given answers agree with the true ones.

Two published rules, each as its own evaluation script computes it: SQuAD's (Rajpurkar et al. 2016, and 2018 for
questions without an answer) over words, and that of CMRC 2018 (Cui et al. 2019) over Chinese
characters and other words.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Language = Literal["en", "zh"]


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are chosen and scored; see `evaluation.answers` of the run file."""

    max_tokens: int = 30
    n_best: int = 20
    null_threshold: float | None = None  # None: see `threshold_of`
    language: Language = "en"


class Span(NamedTuple):
    """A piece of a context: bytes [start, stop), and the sum of the logits of its first and its last token."""

    score: float
    start: int
    stop: int


def best_of(spans: Iterable[Span], count: int) -> list[Span]:
    """The `count` spans with the highest scores, the highest first; of equal ones, which several windows have, one.

    Of equal scores the span that begins first comes first, then the shorter.
    """
    highest: dict[tuple[int, int], Span] = {}
    for span in spans:
        known = highest.get(span[1:])
        if known is None or span.score > known.score:
            highest[span[1:]] = span
    return sorted(highest.values(), key=lambda span: (-span.score, span.start, span.stop))[:count]


def threshold_of(options: AnswerOptions, may_lack_answers: bool) -> float:
    """A question gets no answer where the null span's score less the best one's is above this.

    Where the settings give none it is 0 for data with questions that have no answer, else no question goes without.
    """
    if options.null_threshold is not None:
        return options.null_threshold
    return 0.0 if may_lack_answers else math.inf


def softmax(scores: Sequence[float]) -> list[float]:
    """The share of each score's exponential."""
    highest = max(scores)
    powers = [math.exp(score - highest) for score in scores]
    total = math.fsum(powers)
    return [power / total for power in powers]


# SQuAD: lower case, no punctuation of ASCII, no articles; words are what white space separates.
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def plain_words(text: str) -> list[str]:
    """The words of a text as SQuAD compares them."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def word_f1(answer: str, given: str, empty_agree: bool) -> float:
    """F1 over the words of two texts as bags; with `empty_agree`, 1 where neither has any."""
    wanted, found = plain_words(answer), plain_words(given)
    if empty_agree and not (wanted and found):
        return float(wanted == found)
    return _f1((Counter(wanted) & Counter(found)).total(), len(found), len(wanted))


def _f1(common: int, num_found: int, num_wanted: int) -> float:
    if common == 0:
        return 0.0
    precision, recall = common / num_found, common / num_wanted
    return 2 * precision * recall / (precision + recall)


# CMRC 2018: Chinese characters are words, these marks are left out, and all between is split as English text.
_MARKS = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_CHINESE = re.compile("[\u4e00-\u9fa5]")


def without_marks(text: str) -> str:
    """A text as CMRC 2018 compares it as a whole."""
    return "".join(character for character in text.lower().strip() if character not in _MARKS)


def mixed_words(text: str) -> list[str]:
    """The words of a text as CMRC 2018 compares them: Chinese characters, and the English words between them."""
    words: list[str] = []
    begin = 0
    text = without_marks(text)
    for place, character in enumerate(text):
        if _CHINESE.match(character):
            words += [*english_words(text[begin:place]), character]
            begin = place + 1
    return words + english_words(text[begin:])


# The conventions of the Penn Treebank for the marks that are left, in a text that counts as one sentence.
_OPENING = re.compile(r'(?:^|(?<=[ (\[{<]))"')
_APART = re.compile(r'\.{2,}|[;@#$%&?!()\[\]{}<>"–—«»‘„]|,(?!\d)|(?<=[^.])\.(?=[\])}>"\']*\s*$)|``')
_CLITIC = re.compile(r"(?<=[^' ])(?:'(?:s|m|d|ll|re|ve)?|n't)(?= |$)")
_COMPOUND = re.compile(r"\b(can(?=not\b)|gim(?=me\b)|lem(?=me\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b))")


def english_words(text: str) -> list[str]:
    """The words and marks of English text in lower case, split by the conventions of the Penn Treebank."""
    apart = _APART.sub(lambda mark: f" {mark[0]} ".replace('"', "''"), _OPENING.sub("``", text))
    return _COMPOUND.sub(r"\1 ", _CLITIC.sub(lambda clitic: f" {clitic[0]}", apart)).split()


def piece_f1(answer: str, given: str, empty_agree: bool) -> float:
    """F1 over the longest run of words that two texts have in common; `empty_agree` as `word_f1` has it."""
    wanted, found = mixed_words(answer), mixed_words(given)
    if empty_agree and not (wanted or found):
        return 1.0
    return _f1(longest_run(wanted, found), len(found), len(wanted))


def longest_run(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest piece, without gaps, that two sequences have in common."""
    longest = 0
    before = [0] * (len(second) + 1)
    for item in first:
        here = [0]
        for place, other in enumerate(second):
            here.append(before[place] + 1 if item == other else 0)
        longest = max(longest, *here)
        before = here
    return longest


class Scored(NamedTuple):
    """A question's best span and, against it, no answer: how far each agrees with the true answers."""

    has_answer: bool  # the question has a true answer
    margin: float  # score of the null span less that of the best one
    exact: tuple[float, float]  # of the best span's text, of no answer
    f1: tuple[float, float]


def scored(given: str, answers: Sequence[str], margin: float, language: Language, may_lack: bool) -> Scored:
    """Compares the best span's text with the true `answers`, of which the best agreement counts.

    `may_lack`: the data have questions without an answer. Then SQuAD's second script holds, which leaves out true
    answers of articles and marks alone.
    """
    form, f1 = _RULES[language]
    truth = [answer for answer in answers if plain_words(answer)] if may_lack and language == "en" else list(answers)
    truth = truth or [""]
    forms = [form(one) for one in truth]
    exact, best = zip(
        *((float(form(text) in forms), max(f1(one, text, may_lack) for one in truth)) for text in (given, "")),
        strict=True,
    )
    return Scored(bool(answers), margin, exact, best)


#: By language: the form in which two texts are equal, and the F1 of two texts.
_RULES: Mapping[Language, tuple[Callable[[str], object], Callable[[str, str, bool], float]]] = {
    "en": (plain_words, word_f1),
    "zh": (without_marks, piece_f1),
}


def answer_figures(questions: Sequence[Scored], threshold: float) -> dict[str, float]:
    """Exact match and F1 over all questions, as shares.

    Where some have no answer: also over those that have one and over the others, and the highest that any
    threshold would give, with that threshold.
    """
    taken = [int(one.margin > threshold) for one in questions]
    figures = {}
    for prefix, chosen in (("", (True, False)), ("has_answer_", (True,)), ("no_answer_", (False,))):
        own = [place for place, one in enumerate(questions) if one.has_answer in chosen]
        figures[f"{prefix}exact_match"] = _mean([questions[place].exact[taken[place]] for place in own])
        figures[f"{prefix}f1"] = _mean([questions[place].f1[taken[place]] for place in own])
    if all(one.has_answer for one in questions):
        return {name: figures[name] for name in ("exact_match", "f1")}
    margins = [one.margin for one in questions]
    for name, pairs in (("exact_match", [one.exact for one in questions]), ("f1", [one.f1 for one in questions])):
        figures[f"best_{name}"], figures[f"best_{name}_threshold"] = _best_threshold(margins, pairs)
    return figures


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(1, len(values))


def _best_threshold(margins: Sequence[float], pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The highest mean that a threshold gives, and the lowest such threshold: one of `margins`, or just below all."""
    order = sorted(range(len(margins)), key=lambda place: margins[place])
    total = highest = math.fsum(none for _, none in pairs)
    threshold = math.nextafter(margins[order[0]], -math.inf)
    for place, following in zip(order, [*order[1:], None], strict=True):
        total += pairs[place][0] - pairs[place][1]
        is_border = following is None or margins[following] > margins[place]
        if is_border and total > highest:
            highest, threshold = total, margins[place]
    taken = [pair[margin > threshold] for margin, pair in zip(margins, pairs, strict=True)]
    return _mean(taken), threshold
