"""Labels of a store and of a model that has a head: names decide about numbers, and what is not expected is said."""

import pytest

from engine.fit.labels import check_labels, match_labels, names_of

NLI = ("entailment", "neutral", "contradiction")
TAGS = ("O", "B-PER", "I-PER")


@pytest.mark.parametrize(
    ("model", "store", "names", "numbers", "said"),
    [
        (("no", "yes"), ("no", "yes"), ("no", "yes"), (0, 1), None),
        (("positive", "negative"), ("negative", "positive"), ("positive", "negative"), (1, 0), "in another order"),
        (NLI, ("contradiction", "entailment", "neutral"), NLI, (2, 0, 1), "0 entailment, 1 neutral, 2 contradiction"),
        (NLI, ("contradiction", "entailment"), NLI, (2, 0), "no record has neutral"),
        (TAGS, ("B-PER", "I-PER", "O"), TAGS, (1, 2, 0), "in another order"),
        (("POSITIVE", "NEGATIVE"), ("negative", "positive"), ("POSITIVE", "NEGATIVE"), (1, 0), "in other letters"),
        (("Joy", "Anger", "Fear"), ("anger", "fear", "joy"), ("Joy", "Anger", "Fear"), (1, 2, 0), "in other letters"),
        (("LABEL_0", "LABEL_1"), ("LABEL_1", "LABEL_0"), ("LABEL_0", "LABEL_1"), (1, 0), "in another order"),
        (("negative", "positive"), ("0", "1"), ("negative", "positive"), (0, 1), "are numbers"),
        (tuple("abcdefghijkl"), tuple(map(str, sorted(range(12), key=str))), tuple("abcdefghijkl"),
         tuple(sorted(range(12), key=str)), "are numbers"),
        (("1 star", "2 stars"), ("2 stars", "1 star"), ("1 star", "2 stars"), (1, 0), "in another order"),
    ],
)  # fmt: skip
def test_labels_with_the_models_names_get_its_numbers(
    model: tuple[str, ...], store: tuple[str, ...], names: tuple[str, ...], numbers: tuple[int, ...], said: str | None
) -> None:
    labels = match_labels(model, store)
    assert (labels.names, labels.numbers, labels.keeps_head) == (names, numbers, True)
    finding = check_labels(model, True, store)
    assert (finding is None) == (said is None)
    assert finding is None or (finding.verdict == "warning" and str(said) in finding.text)
    # A model that was trained so says the same of itself again.
    again = match_labels(labels.names, store)
    assert (again.names, again.numbers) == (names, numbers)


@pytest.mark.parametrize(
    ("model", "store", "advice"),
    [
        (("negative", "positive"), ("ham", "spam"), ""),
        (("negative", "positive"), ("negative", "neutral", "positive"), "the model has no neutral"),
        (NLI, ("ham", "spam"), ""),
        (("LABEL_0", "LABEL_1"), ("a", "b", "c"), ""),
        (("negative", "positive"), ("negative", "postive"), "the model has no postive"),
        (("Yes", "yes"), ("YES", "no"), ""),
        (("a", "b"), ("0", "7"), ""),
    ],
)
def test_other_labels_get_a_new_head_and_both_sets_are_named(
    model: tuple[str, ...], store: tuple[str, ...], advice: str
) -> None:
    labels = match_labels(model, store)
    assert (labels.names, labels.numbers, labels.keeps_head) == (store, tuple(range(len(store))), False)
    finding = check_labels(model, True, store)
    assert finding is not None and finding.verdict == "warning"
    assert ", ".join(model) in finding.text and ", ".join(store) in finding.text and "a new head" in finding.text
    assert advice in finding.text
    assert check_labels(model, False, store) is None, "there is no head to speak of"


def test_a_head_without_names_takes_the_datas_and_says_so() -> None:
    labels = match_labels(("LABEL_0", "LABEL_1"), ("ham", "spam"))
    assert (labels.names, labels.numbers, labels.keeps_head) == (("ham", "spam"), (0, 1), True)
    assert "0 ham, 1 spam" in str(check_labels(("LABEL_0", "LABEL_1"), True, ("ham", "spam")))
    assert check_labels(("LABEL_0", "LABEL_1"), False, ("ham", "spam")) is None


@pytest.mark.parametrize(
    ("id2label", "names"),
    [
        ({0: "a", 1: "b"}, ("a", "b")),
        ({1: "b", 0: "a"}, ("a", "b")),
        ({0: "a", 2: "b"}, ()),
        ({0: "a", 1: "a"}, ()),
        (None, ()),
        ({}, ()),
    ],
)
def test_a_configuration_names_each_number_once_or_none(
    id2label: dict[int, str] | None, names: tuple[str, ...]
) -> None:
    assert names_of(id2label) == names
    assert match_labels(names, ("x", "y")).names == ("x", "y")
