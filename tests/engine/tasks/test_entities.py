"""Entities and their figures: the logic of conlleval and of seqeval's strict mode, written out here, on random tags."""

import math
from typing import Any

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tasks.entities import (
    Entity,
    lenient_entities,
    num_illegal,
    scheme_of,
    score_of,
    scores_by_kind,
    strict_entities,
    tag_of,
)

KINDS = ("PER", "LOC", "x-y")
BIO = ("O", *(f"{prefix}-{kind}" for prefix in "BI" for kind in KINDS))
BIOES = ("O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in KINDS))
SENTENCES = st.lists(st.lists(st.integers(0, len(BIOES) - 1), min_size=1, max_size=9), min_size=1, max_size=5)


def split_tag(tag: str) -> tuple[str, str]:
    prefix, _, kind = tag.partition("-")
    return prefix, kind


def conlleval(truth: list[list[str]], guessed: list[list[str]]) -> dict[str, int]:
    """The counting loop of the script: a found entity is right if both begin together and end together."""
    counts = {"correct": 0, "found_correct": 0, "found_guessed": 0}
    in_correct = False
    last_true, last_guess = ("O", ""), ("O", "")
    for own, other in zip(truth, guessed, strict=True):
        for true_tag, guess_tag in zip([*own, "O"], [*other, "O"], strict=True):  # a sentence ends at an O
            true, guess = split_tag(true_tag), split_tag(guess_tag)
            true_end, guess_end = end_of_chunk(last_true, true), end_of_chunk(last_guess, guess)
            if in_correct:
                if true_end and guess_end and last_true[1] == last_guess[1]:
                    in_correct = False
                    counts["correct"] += 1
                elif true_end != guess_end or true[1] != guess[1]:
                    in_correct = False
            true_start, guess_start = start_of_chunk(last_true, true), start_of_chunk(last_guess, guess)
            if true_start and guess_start and true[1] == guess[1]:
                in_correct = True
            counts["found_correct"] += true_start
            counts["found_guessed"] += guess_start
            last_true, last_guess = true, guess
    return counts


def end_of_chunk(before: tuple[str, str], now: tuple[str, str]) -> bool:
    pairs = {("B", "B"), ("B", "S"), ("B", "O"), ("I", "B"), ("I", "S"), ("I", "O")}
    return before[0] in ("E", "S") or (before[0], now[0]) in pairs or (before[0] != "O" and before[1] != now[1])


def start_of_chunk(before: tuple[str, str], now: tuple[str, str]) -> bool:
    pairs = {("E", "E"), ("E", "I"), ("S", "E"), ("S", "I"), ("O", "E"), ("O", "I")}
    return now[0] in ("B", "S") or (before[0], now[0]) in pairs or (now[0] != "O" and before[1] != now[1])


#: seqeval's tables: (prefix before, prefix, whether the types must be the same, must differ, or anything).
IOB2 = {
    "start": {("*", "B", "any")},
    "inside": {("B", "I", "same"), ("I", "I", "same")},
    "end": {(one, *rest) for one in "BI" for rest in (("O", "any"), ("I", "diff"), ("B", "any"))},
}
IOBES = {
    "start": {("*", "B", "any"), ("*", "S", "any")},
    "inside": {("B", "I", "same"), ("B", "E", "same"), ("I", "I", "same"), ("I", "E", "same")},
    "end": {("S", "*", "any"), ("E", "*", "any")},
}


def fits(patterns: set[tuple[str, str, str]], before: tuple[str, str], now: tuple[str, str]) -> bool:
    same = {"any": True, "same": before[1] == now[1], "diff": before[1] != now[1]}
    return any(one in ("*", before[0]) and two in ("*", now[0]) and same[how] for one, two, how in patterns)


def seqeval_strict(tags: list[str], scheme: dict[str, set[tuple[str, str, str]]]) -> set[tuple[int, int, str]]:
    """`Tokens.entities` of seqeval's strict mode: from a start as far as it goes on; an entity if it ends properly."""
    tokens = [*map(split_tag, tags), ("O", "")]
    found, place, before = set(), 0, ("O", "")
    while place < len(tokens):
        if fits(scheme["start"], before, tokens[place]):
            stop = place + 1
            while stop < len(tokens) and fits(scheme["inside"], tokens[stop - 1], tokens[stop]):
                stop += 1
            if stop < len(tokens) and fits(scheme["end"], tokens[stop - 1], tokens[stop]):
                found.add((place, stop - 1, tokens[place][1]))
            place = stop
        else:
            place += 1
        before = tokens[place - 1]
    return found


@settings(examples(300))
@given(truth=SENTENCES, seed=st.randoms(use_true_random=False), names=st.sampled_from([BIO, BIOES]))
def test_lenient_figures_are_those_of_conlleval(truth: list[list[int]], seed: Any, names: tuple[str, ...]) -> None:
    own = [[names[tag % len(names)] for tag in one] for one in truth]
    other = [[tag if seed.random() < 0.6 else seed.choice(names) for tag in one] for one in own]
    counts = conlleval(own, other)
    sets = [
        {
            entity
            for number, tags in enumerate(side)
            for entity in lenient_entities(number, [tag_of(names.index(tag), names) for tag in tags])
        }
        for side in (own, other)
    ]
    assert (len(sets[0]), len(sets[1]), len(sets[0] & sets[1])) == (
        counts["found_correct"], counts["found_guessed"], counts["correct"],
    )  # fmt: skip
    score = score_of(*sets)
    precision = counts["correct"] / counts["found_guessed"] if counts["found_guessed"] else 0.0
    recall = counts["correct"] / counts["found_correct"] if counts["found_correct"] else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    assert score.precision == precision and score.recall == recall and math.isclose(score.f1, f1)
    kinds = scores_by_kind(*sets)
    assert sum(one.support for one in kinds.values()) == score.support
    assert all(0 <= one.f1 <= 1 for one in kinds.values())


@settings(examples(300))
@given(truth=SENTENCES, names=st.sampled_from([BIO, BIOES]))
def test_strict_entities_are_those_of_seqeval(truth: list[list[int]], names: tuple[str, ...]) -> None:
    scheme = scheme_of(names)
    assert scheme is not None
    for number, one in enumerate(truth):
        tags = [names[tag % len(names)] for tag in one]
        expected = seqeval_strict(tags, IOB2 if names is BIO else IOBES)
        found = strict_entities(number, [tag_of(names.index(tag), names) for tag in tags], scheme)
        assert {tuple(entity)[1:] for entity in found} == expected


@settings(examples(200))
@given(truth=SENTENCES, names=st.sampled_from([BIO, BIOES]))
def test_legal_tags_give_the_same_entities_leniently_and_strictly(
    truth: list[list[int]], names: tuple[str, ...]
) -> None:
    scheme = scheme_of(names)
    assert scheme is not None
    for one in truth:
        tags = [tag_of(tag % len(names), names) for tag in one]
        lenient, strict = set(lenient_entities(0, tags)), set(strict_entities(0, tags, scheme))
        if num_illegal(tags, scheme) == 0:
            assert lenient == strict
        covered = {place for entity in strict for place in range(entity.first, entity.last + 1)}
        if covered == {place for place, tag in enumerate(tags) if tag.prefix != "O"}:
            assert num_illegal(tags, scheme) == 0


def test_repaired_sequences_by_hand() -> None:
    tags = [tag_of(BIO.index(tag), BIO) for tag in ("I-PER", "I-PER", "B-LOC", "I-PER", "O", "I-LOC")]
    lenient = [Entity(0, 0, 1, "PER"), Entity(0, 2, 2, "LOC"), Entity(0, 3, 3, "PER"), Entity(0, 5, 5, "LOC")]
    assert list(lenient_entities(0, tags)) == lenient
    assert list(strict_entities(0, tags, "BIO")) == [Entity(0, 2, 2, "LOC")]
    assert num_illegal(tags, "BIO") == 3
    unfinished = [
        tag_of(BIOES.index(tag), BIOES) for tag in ("B-PER", "O", "S-LOC", "E-LOC", "B-PER", "E-PER", "I-PER")
    ]
    assert list(strict_entities(0, unfinished, "BIOES")) == [Entity(0, 2, 2, "LOC"), Entity(0, 4, 5, "PER")]
    assert num_illegal(unfinished, "BIOES") == 4


@pytest.mark.parametrize(
    ("names", "scheme"),
    [
        (BIO, "BIO"),
        (BIOES, "BIOES"),
        (("B-a", "I-a", "L-a", "O", "U-a"), "BIOES"),
        (("B-a", "M-a", "E-a", "S-a", "O"), "BIOES"),
        (("I-LOC", "I-PER", "O"), "IO"),
        (("B", "I", "O"), "BIO"),
        (("NOUN", "VERB", "X"), None),
        (("B-a", "O", "other"), None),
        (("O",), None),
        (("I", "O"), None),
        (("-LRB-", "HYPH", "I-a"), None),
    ],
    ids=str,
)
def test_the_scheme_follows_from_the_names(names: tuple[str, ...], scheme: str | None) -> None:
    assert scheme_of(names) == scheme


def test_tags_of_io_are_runs_of_one_type() -> None:
    names = ("I-LOC", "I-PER", "O")
    tags = [tag_of(number, names) for number in (0, 0, 1, 2, 1)]
    runs = [Entity(0, 0, 1, "LOC"), Entity(0, 2, 2, "PER"), Entity(0, 4, 4, "PER")]
    assert list(lenient_entities(0, tags)) == runs == list(strict_entities(0, tags, "IO"))
    assert num_illegal(tags, "IO") == 0


def test_a_number_without_a_name_equals_no_entity() -> None:
    unknown = [tag_of(-1, BIO), tag_of(-1, BIO)]
    assert list(lenient_entities(0, unknown)) == [Entity(0, 0, 1, "label -1")]
    assert not set(lenient_entities(0, unknown)) & set(lenient_entities(0, [tag_of(99, BIO)] * 2))
