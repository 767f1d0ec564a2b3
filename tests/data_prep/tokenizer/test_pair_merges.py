"""Incremental pair merging against counting everything again for each merge, and against a real tokenizer."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import tokenizers
from tokenizers import models

from data_prep.tokenizer.pair_merges import Merge, learn_merges

LETTERS = "abcd"


class Names:
    """Ids by text, as the learners give them."""

    def __init__(self, forbidden: Sequence[str] = ()):
        self.texts = list(LETTERS)
        self.forbidden = set(forbidden)

    def __call__(self, left: int, right: int) -> int | None:
        text = self.texts[left] + self.texts[right]
        if text in self.forbidden:
            return None
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text)


def random_words(seed: int, count: int = 60, longest: int = 12) -> dict[str, int]:
    draw = random.Random(seed)
    return {
        "".join(draw.choices(LETTERS, (4, 3, 2, 1), k=draw.randint(1, longest))): draw.randint(1, 9)
        for _ in range(count)
    }


def join(word: list[int], merge: Merge) -> list[int]:
    result: list[int] = []
    at = 0
    while at < len(word):
        if word[at : at + 2] == [merge.left, merge.right]:
            result.append(merge.token)
            at += 2
        else:
            result.append(word[at])
            at += 1
    return result


def recount(words: dict[str, int], names: Names, num_tokens: int, min_count: int) -> list[Merge]:
    """The plain algorithm: count every pair anew, merge the most frequent, apply what was learned to the rest."""
    state = [([LETTERS.index(letter) for letter in word], count) for word, count in words.items()]
    merges: list[Merge] = []
    made: set[int] = set()
    while True:
        counts: Counter[tuple[int, int]] = Counter()
        for word, count in state:
            last: tuple[int, int, int] | None = None
            for at, pair in enumerate(itertools.pairwise(word)):
                if last == (*pair, at - 1) and pair[0] == pair[1]:
                    last = None  # the second of three equal ones belongs to the first pair
                    continue
                counts[pair] += count
                last = (*pair, at)
        pairs = sorted((-count, *pair) for pair, count in counts.items() if count >= min_count)
        chosen = next(((left, right) for _, left, right in pairs if names(left, right) is not None), None)
        if chosen is None:
            return merges
        token = names(*chosen)
        assert token is not None
        if token not in made and len(made) == num_tokens:
            return merges
        made.add(token)
        merges.append(Merge(*chosen, token))
        state = [(join(word, merges[-1]), count) for word, count in state]
        changed = True
        while changed:
            before = [word for word, _ in state]
            for merge in merges:
                state = [(join(word, merge), count) for word, count in state]
            changed = before != [word for word, _ in state]


@pytest.mark.parametrize("seed", range(30))
def test_merges_equal_those_of_counting_anew(seed: int) -> None:
    words = random_words(seed)
    forbidden = ["ab", "aa"] if seed % 3 == 0 else []
    sequences = [[LETTERS.index(letter) for letter in word] for word in words]
    merges, counts = learn_merges(sequences, list(words.values()), Names(forbidden), 25, 2)
    assert merges == recount(words, Names(forbidden), 25, 2)
    assert len({merge.token for merge in merges}) <= 25
    names = Names(forbidden)
    for merge in merges:
        assert names(merge.left, merge.right) == merge.token
    vocabulary = {text: index for index, text in enumerate(names.texts)}
    real = tokenizers.Tokenizer(
        models.BPE(vocabulary, [(names.texts[merge.left], names.texts[merge.right]) for merge in merges])
    )
    used: Counter[int] = Counter()
    for word, count in words.items():
        for index in real.encode(word).ids:
            used[index] += count
    assert counts == dict(used)


def test_what_is_closed_is_never_merged() -> None:
    merges, counts = learn_merges([[0, 1, -1, 0, 1], [-1], []], [5, 1, 7], Names(), 10)
    assert merges == [Merge(0, 1, 4)]
    assert counts == {4: 10}


def test_rare_pairs_are_left_alone() -> None:
    assert learn_merges([[0, 1]], [1], Names(), 10)[0] == []
    assert learn_merges([[0, 1]], [2], Names(), 10)[0] == [Merge(0, 1, 4)]
    assert learn_merges([], [], Names(), 10) == ([], {})
