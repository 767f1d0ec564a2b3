"""Exact match and F1 of answers against the published rules, written out here a second time and another way."""

import math
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.tasks.answers import (
    AnswerOptions,
    Scored,
    Span,
    answer_figures,
    best_of,
    english_words,
    longest_run,
    scored,
    softmax,
    threshold_of,
)

# --- SQuAD's rules, from the text of the papers and the behaviour of both scripts


def normal_form(text: str) -> str:
    text = "".join(letter for letter in text.lower() if letter not in r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~""")
    parts = re.split(r"(\W+)", text)  # words and what stands between them, as \b sees them
    return " ".join("".join(" " if part in ("a", "an", "the") else part for part in parts).split())


def f1_v1(pred: str, gold: str) -> float:
    one, other = normal_form(pred).split(), normal_form(gold).split()
    left = list(other)
    same = 0
    for word in one:
        if word in left:
            left.remove(word)
            same += 1
    if not same:
        return 0.0
    return 2 * (same / len(one)) * (same / len(other)) / (same / len(one) + same / len(other))


def f1_v2(pred: str, gold: str) -> float:
    if not normal_form(pred).split() or not normal_form(gold).split():
        return float(normal_form(pred) == normal_form(gold))
    return f1_v1(pred, gold)


def squad_v1(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    pairs = list(zip(predictions, golds, strict=True))
    exact = [max(float(normal_form(pred) == normal_form(gold)) for gold in own) for pred, own in pairs]
    f1 = [max(f1_v1(pred, gold) for gold in own) for pred, own in pairs]
    return {"exact_match": sum(exact) / len(exact), "f1": sum(f1) / len(f1)}


def squad_v2(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    kept = [[gold for gold in own if normal_form(gold)] or [""] for own in golds]
    pairs = list(zip(predictions, kept, strict=True))
    exact = [max(float(normal_form(pred) == normal_form(gold)) for gold in own) for pred, own in pairs]
    f1 = [max(f1_v2(pred, gold) for gold in own) for pred, own in pairs]
    figures = {"exact_match": sum(exact) / len(exact), "f1": sum(f1) / len(f1)}
    for prefix, wanted in (("has_answer_", True), ("no_answer_", False)):
        own = [place for place, gold in enumerate(golds) if bool(gold) == wanted]
        for name, values in (("exact_match", exact), ("f1", f1)):
            figures[prefix + name] = sum(values[place] for place in own) / max(1, len(own))
    return figures


TEXTS = st.text(alphabet="aAnN tTheE.,-'?\u00e9\u2019_1\u00a0\n", max_size=12) | st.sampled_from(
    ["the", "A", "an answer", "The Answer!", "answer, an", "", "(a)", "don't", "theatre", "an\u00a0ox", "1,000"]
)
MARGINS = st.floats(-9, 9) | st.sampled_from([-1.0, 1.0])  # some of them equal
GOLDS = st.lists(TEXTS.filter(bool), min_size=1, max_size=3)


@given(st.lists(st.tuples(TEXTS, GOLDS), min_size=1, max_size=6))
def test_squad_without_unanswerable_questions(rows: list[tuple[str, list[str]]]) -> None:
    questions = [scored(text, golds, 0.0, "en", may_lack=False) for text, golds in rows]
    figures = answer_figures(questions, math.inf)
    assert figures == pytest.approx(squad_v1(*zip(*rows, strict=True)), rel=1e-12)


@given(st.lists(st.tuples(TEXTS, GOLDS | st.just([]), MARGINS), min_size=1, max_size=8), st.floats(-5, 5))
def test_squad_with_unanswerable_questions(rows: list[tuple[str, list[str], float]], threshold: float) -> None:
    """With a question without an answer, always: the first has none."""
    rows = [("an ox", [], 1.0), *rows]
    questions = [scored(text, golds, margin, "en", may_lack=True) for text, golds, margin in rows]
    figures = answer_figures(questions, threshold)
    golds = [own for _, own, _ in rows]

    def at(border: float) -> dict[str, float]:
        return squad_v2(["" if margin > border else text for text, _, margin in rows], golds)

    expected = at(threshold)
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    borders = [-math.inf, *(margin for _, _, margin in rows)]
    for name in ("exact_match", "f1"):
        assert figures[f"best_{name}"] == pytest.approx(max(at(border)[name] for border in borders), rel=1e-12)
        assert at(figures[f"best_{name}_threshold"])[name] == pytest.approx(figures[f"best_{name}"], rel=1e-12)
    assert len(figures) == 10


def test_questions_with_equal_margins_are_on_one_side_of_every_threshold() -> None:
    """The first of them is right with an answer, the others without: all without is best."""
    rows = [("ox", ["ox"]), ("ox", []), ("ox", [])]
    figures = answer_figures([scored(text, golds, 0.5, "en", may_lack=True) for text, golds in rows], 0.0)
    assert figures["best_f1"] == figures["best_exact_match"] == pytest.approx(2 / 3)
    assert figures["best_f1_threshold"] < 0.5


def test_a_true_answer_of_articles_alone_is_left_out_by_the_second_script() -> None:
    assert scored("a", ["The"], 0.0, "en", may_lack=False) == Scored(True, 0.0, (1.0, 1.0), (0.0, 0.0))
    assert scored("a", ["The"], 0.0, "en", may_lack=True) == Scored(True, 0.0, (1.0, 1.0), (1.0, 1.0))
    assert scored("ox", ["The", "ox"], 0.0, "en", may_lack=True) == Scored(True, 0.0, (1.0, 0.0), (1.0, 0.0))


# --- CMRC 2018's rules

MARKS = "- : _ * ^ / \\ ~ ` + = \uff0c \u3002 \uff1a \uff1f \uff01 \u201c \u201d \uff1b \u2019 \u300a \u300b \u00b7 \u3001".split()
MARKS += "\u300c \u300d \uff08 \uff09 \uff0d \uff5e \u300e \u300f".split()


def segments(text: str) -> list[str]:
    text = "".join(letter for letter in text.lower().strip() if letter not in MARKS)
    found = []
    for piece in re.split("([\u4e00-\u9fa5])", text):
        found += [piece] if re.fullmatch("[\u4e00-\u9fa5]", piece) else piece.split()
    return found


def cmrc_f1(pred: str, gold: str) -> float:
    one, other = segments(pred), segments(gold)
    runs = {tuple(other[i:j]) for i in range(len(other)) for j in range(i + 1, len(other) + 1)}
    common = max(
        (j - i for i in range(len(one)) for j in range(i + 1, len(one) + 1) if tuple(one[i:j]) in runs), default=0
    )
    if not common:
        return 0.0
    return 2 * (common / len(one)) * (common / len(other)) / (common / len(one) + common / len(other))


def cmrc_exact(pred: str, gold: str) -> float:
    return float(plain(pred) == plain(gold))


def plain(text: str) -> str:
    return "".join(letter for letter in text.lower().strip() if letter not in MARKS)


CHINESE = st.text(alphabet="\u6d1b\u6749\u77f6\u6e56\u4eba\uff0c\u3002\u300a\u300b- ab12", max_size=14)


@given(st.lists(st.tuples(CHINESE, st.lists(CHINESE, min_size=1, max_size=3)), min_size=1, max_size=5))
def test_cmrc(rows: list[tuple[str, list[str]]]) -> None:
    figures = answer_figures([scored(text, golds, 0.0, "zh", may_lack=False) for text, golds in rows], math.inf)
    exact = [max(cmrc_exact(text, gold) for gold in golds) for text, golds in rows]
    f1 = [max(cmrc_f1(text, gold) for gold in golds) for text, golds in rows]
    assert figures == pytest.approx({"exact_match": sum(exact) / len(rows), "f1": sum(f1) / len(rows)}, rel=1e-12)


@pytest.mark.parametrize(
    ("given", "gold", "exact", "f1"),
    [
        ("\u300a\u7ea2\u697c\u68a6\u300b", "\u7ea2\u697c\u68a6", 1, 1),  # marks are left out
        ("1990\u5e74", "\u5728 1990\u5e74", 0, 4 / 5),  # a number is one word
        ("\u4e2d\u5927\u56fd", "\u4e2d\u56fd", 0, 2 / 5),  # a run has no gaps: one of 3 and of 2 characters
        ("nexon\u516c\u53f8", "Nexon\u516c\u53f8", 1, 1),
        ("3\u20144", "3-4", 0, 0),  # the hyphen is a mark, so 34 is one word; the dash is a word of its own
    ],
)
def test_cmrc_by_hand(given: str, gold: str, exact: float, f1: float) -> None:
    one = scored(given, [gold], 0.0, "zh", may_lack=False)
    assert (one.exact[0], one.f1[0]) == (exact, pytest.approx(f1))
    assert one.exact[1] == one.f1[1] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("it costs $3.50, doesn't it?", "it costs $ 3.50 , does n't it ?"),
        ('he said "no" (twice).', "he said `` no '' ( twice ) ."),
        ("10,000 people... we'll cannot u.s. end.", "10,000 people ... we 'll can not u.s. end ."),
        ("the dogs' 50% [a@b; c#]", "the dogs ' 50 % [ a @ b ; c # ]"),
    ],
)
def test_english_between_chinese_is_split_as_the_treebank_is(text: str, words: str) -> None:
    assert english_words(text) == words.split()


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_the_longest_run_is_a_substring(first: list[str], second: list[str]) -> None:
    one, other = "".join(first), "".join(second)
    pieces = {one[i:j] for i in range(len(one)) for j in range(i, len(one) + 1)}
    assert longest_run(first, second) == max((len(piece) for piece in pieces if piece in other), default=0)


# --- Spans


def test_the_best_spans_of_windows_that_overlap() -> None:
    spans = [Span(1.0, 5, 9), Span(3.0, 7, 8), Span(2.0, 5, 9), Span(3.0, 2, 8), Span(3.0, 2, 4), Span(-1.0, 0, 1)]
    assert best_of(spans, 4) == [Span(3.0, 2, 4), Span(3.0, 2, 8), Span(3.0, 7, 8), Span(2.0, 5, 9)]
    assert best_of(reversed(spans), 9)[:4] == best_of(spans, 4) and len(best_of(spans, 9)) == 5


def test_a_threshold_is_zero_only_where_questions_may_lack_an_answer() -> None:
    given, none = AnswerOptions(null_threshold=-1.5), AnswerOptions()
    assert [threshold_of(given, may) for may in (True, False)] == [-1.5, -1.5]
    assert [threshold_of(none, may) for may in (True, False)] == [0.0, math.inf]


def test_shares_of_scores() -> None:
    assert softmax([1000.0, 1000.0]) == [0.5, 0.5]
    assert softmax([0.0, math.log(3)]) == pytest.approx([0.25, 0.75])
    assert softmax([0.0]) == [1.0]
