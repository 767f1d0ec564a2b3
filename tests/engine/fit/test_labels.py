"""Labels of a store and of a model that has a head: names decide about numbers, and what is not expected is said."""

import pytest

from engine.fit.labels import check_labels, fit_labels, match_labels, names_of

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
    finding = check_labels(labels, True)
    assert (finding is None) == (said is None)
    assert finding is None or (finding.verdict == "warning" and str(said) in finding.text)
    # A model that was trained so says the same of itself again.
    again = match_labels(labels.names, store)
    assert (again.names, again.numbers) == (names, numbers)


@pytest.mark.parametrize(
    ("model", "store", "advice"),
    [
        (("negative", "positive"), ("ham", "spam"), ""),
        (
            ("negative", "positive"),
            ("negative", "neutral", "positive"),
            "only in the data: neutral; only in the model: none",
        ),
        (NLI, ("ham", "spam"), ""),
        (("negative", "positive"), ("negative", "postive"), "only in the data: postive; only in the model: positive"),
        (("Yes", "yes"), ("YES", "no"), ""),
        (("a", "b"), ("0", "7"), ""),
    ],
)
def test_other_labels_are_an_error_that_names_both_sets(
    model: tuple[str, ...], store: tuple[str, ...], advice: str
) -> None:
    labels = match_labels(model, store)
    assert (labels.names, labels.numbers, labels.keeps_head) == (store, tuple(range(len(store))), False)
    finding = check_labels(labels, True)
    assert finding is not None and finding.verdict == "error"
    assert (
        ", ".join(model) in finding.text and ", ".join(store) in finding.text and "model.new_head: true" in finding.text
    )
    assert advice in finding.text
    assert check_labels(labels, False) is None, "there is no head to speak of"


@pytest.mark.parametrize("model", [("negative", "positive"), NLI, ("LABEL_0", "LABEL_1"), ("ham", "spam"), ()])
def test_a_new_head_that_was_asked_for_has_the_datas_labels_in_their_order(model: tuple[str, ...]) -> None:
    labels = match_labels(model, ("spam", "ham"), new_head=True)
    assert (labels.names, labels.numbers, labels.keeps_head) == (("spam", "ham"), (0, 1), False)
    finding = check_labels(labels, True)
    assert finding is not None and finding.verdict == "warning" and "made anew for spam, ham" in finding.text


def test_long_sets_of_labels_are_told_by_their_differences() -> None:
    model = tuple(f"intent {number:03d}" for number in range(150))
    finding = check_labels(match_labels(model, (*model[:-2], "other", "more")), True)
    assert finding is not None and finding.verdict == "error" and len(finding.text) < 1200
    assert "only in the data: other, more; only in the model: intent 148, intent 149" in finding.text


def test_a_head_without_names_takes_the_datas_and_says_so() -> None:
    labels = match_labels(("LABEL_0", "LABEL_1"), ("ham", "spam"))
    assert (labels.names, labels.numbers, labels.keeps_head) == (("ham", "spam"), (0, 1), True)
    assert "0 ham, 1 spam" in str(check_labels(labels, True))
    assert check_labels(labels, False) is None
    more = match_labels(("LABEL_0", "LABEL_1"), ("a", "b", "c"))
    assert (more.names, more.numbers, more.keeps_head) == (("a", "b", "c"), (0, 1, 2), False)
    finding = check_labels(more, True)
    assert finding is not None and finding.verdict == "warning" and "a new head for a, b, c" in finding.text


@pytest.mark.parametrize(
    ("model", "new_head", "names", "keeps_head", "verdict"),
    [
        (("LABEL_0",), False, ("LABEL_0",), True, None),
        (("similarity",), False, ("similarity",), True, None),
        (("LABEL_0",), True, ("LABEL_0",), False, "warning"),
        (("LABEL_0", "LABEL_1"), False, ("LABEL_0",), False, "error"),
        (NLI, False, ("LABEL_0",), False, "error"),
        (NLI, True, ("LABEL_0",), False, "warning"),
        ((), False, ("LABEL_0",), True, None),
    ],
)
def test_scores_need_a_head_of_one_output(
    model: tuple[str, ...], new_head: bool, names: tuple[str, ...], keeps_head: bool, verdict: str | None
) -> None:
    labels = fit_labels(model, (), "regression", new_head)
    assert labels is not None and (labels.names, labels.numbers, labels.keeps_head) == (names, (0,), keeps_head)
    finding = check_labels(labels, True)
    assert (finding.verdict if finding else None) == verdict
    assert check_labels(labels, False) is None


def test_a_store_without_labels_or_scores_leaves_the_models_labels() -> None:
    assert fit_labels(NLI, (), None) is None and check_labels(None, True) is None


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
