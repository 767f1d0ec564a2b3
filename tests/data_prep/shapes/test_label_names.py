"""Labels in records become names: by position, by a map, or by what the data says itself; nothing is guessed."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from shape_fixtures import recognised, records

from data_prep.errors import BadDataError, DataConfigError, PreparationError
from data_prep.shapes.examples import LabelledExample, TaggedExample
from data_prep.shapes.find_label_names import label_order, with_label_names
from data_prep.shapes.shape import Shape, to_example

EMOTIONS = ("neutral", "happy", "sad", "angry", "afraid", "disgusted")


def values(labels: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"text": "a", "label": label} for label in labels]


def named(
    labels: Sequence[Any],
    given: Sequence[str] | None = None,
    label_map: Mapping[str, str] | None = None,
    own: tuple[str, ...] | None = None,
) -> Shape:
    found = values(labels)
    return with_label_names(recognised(found, "sequence_classification"), records(found), given, label_map, own)


def read(shape: Shape, labels: Sequence[Any]) -> list[str]:
    examples = [to_example(shape, record) for record in records(values(labels))]
    return [",".join(one.labels) for one in examples if isinstance(one, LabelledExample)]


READ: list[tuple[list[Any], dict[str, Any], list[str], str]] = [
    ([0, 5, 1], {"given": EMOTIONS}, ["neutral", "disgusted", "happy"], "positions in data.label_names: 0 = neutral"),
    (["0", "1"], {"given": ["no", "yes"]}, ["no", "yes"], "0 = no, 1 = yes"),
    ([1], {"given": ["no", "yes"]}, ["yes"], "0 = no, 1 = yes"),
    ([1, 2], {"given": EMOTIONS}, ["happy", "sad"], "no 0 among those seen, which are 1, 2"),
    (["yes", "no"], {"given": ["no", "yes"]}, ["yes", "no"], "agree"),
    (["1", "2"], {"given": ["2", "1"]}, ["1", "2"], "agree"),
    ([[0, 2], []], {"given": EMOTIONS}, ["neutral,sad", ""], "0 = neutral"),
    (
        [1, -1],
        {"label_map": {"1": "entailment", "-1": "contradiction"}},
        ["entailment", "contradiction"],
        "1 = entailment",
    ),
    (
        [1, 2],
        {"label_map": {"1": "World", "2": "Sports"}, "given": ["Sports", "World"]},
        ["World", "Sports"],
        "renamed",
    ),
    (["pos", "neg"], {"label_map": {"pos": "positive", "neg": "negative"}}, ["positive", "negative"], "renamed"),
    (["pos", "negative"], {"label_map": {"pos": "positive", "neg": "negative"}}, ["positive", "negative"], "renamed"),
    ([True, False], {"label_map": {"true": "yes", "false": "no"}}, ["yes", "no"], "renamed"),
    ([1, 2, 3], {"label_map": {"1": "bad", "2": "bad", "3": "good"}}, ["bad", "bad", "good"], "renamed"),
    ([0, 1], {"own": ("neg", "pos")}, ["neg", "pos"], "named by the data: 0 = neg, 1 = pos"),
    ([0, 1], {"own": ("neg", "pos"), "given": ["pos", "neg"]}, ["neg", "pos"], "data.label_names gives their order"),
    ([0, 1], {"own": ("neg", "pos"), "given": ["neg", "pos", "other"]}, ["neg", "pos"], "named by the data"),
    ([0, 1], {"own": ("neg", "pos"), "label_map": {"neg": "bad", "pos": "good"}}, ["bad", "good"], "renamed"),
    ([0, 1], {"own": ("neg", "pos"), "label_map": {"0": "bad"}}, ["bad", "pos"], "renamed"),
    (["pos", "neg"], {"own": ("neg", "pos")}, ["pos", "neg"], "named by the data"),
    (["1", "3"], {"own": ("1", "2", "3")}, ["1", "3"], "named by the data"),
    ([0, 2], {"own": ("1", "2", "3")}, ["1", "3"], "named by the data"),
]


@pytest.mark.parametrize(("labels", "settings", "wanted", "words"), READ)
def test_labels_become_names(labels: list[Any], settings: dict[str, Any], wanted: list[str], words: str) -> None:
    shape = named(labels, **settings)
    assert read(shape, labels) == wanted
    assert words in shape.describe() and shape.describe().endswith(")")


@pytest.mark.parametrize(
    ("labels", "settings", "error", "words"),
    [
        ([1, 2, 4, 3], {"given": list("abcd")}, BadDataError, "data.jsonl:3: label 4 is no position in data.label_names, whose 4 names are 0 to 3; say which number is which with `data.label_map: {1: a, 2: b, 3: c, 4: d}`"),
        ([0, 1, 2], {"given": ["a", "b"]}, BadDataError, "`data.label_map: {0: a, 1: b, 2: ...}`"),
        ([0, 7], {"given": ["a", "b"]}, BadDataError, "label 7 is no position"),
        ([-1, 0, 1], {"given": ["negative", "neutral", "positive"]}, BadDataError, "data.jsonl:1: label -1 is no position in data.label_names, whose 3 names are 0 to 2; say which number is which with `data.label_map: {-1: negative, 0: neutral, 1: positive}`"),
        ([-2, 2], {"given": ["a", "b"]}, BadDataError, "label -2, 2 is no position"),
        ([0, "happy"], {"given": EMOTIONS}, BadDataError, "data.jsonl:2: labels are numbers and names at once (0; happy)"),
        (["happy", 3], {"given": EMOTIONS}, BadDataError, "data.jsonl:2: labels are numbers and names at once (3; happy)"),
        ([1, 2, 3], {"label_map": {"1": "a"}}, BadDataError, "data.jsonl:2: data.label_map has no name for 2, 3; add 2: ..., 3: ..."),
        (["x", "y"], {"label_map": {"z": "a"}}, BadDataError, "has no name for x, y"),
        ([0, 1], {"own": ("neg", "pos"), "given": ["bad", "good"]}, DataConfigError, "data.label_names lacks neg, pos: the data says itself that its label numbers are 0 = neg, 1 = pos; name these, or rename them with `data.label_map: {neg: ..., pos: ...}`"),
        ([0, 1], {"own": ("neg", "pos"), "given": ["bad", "pos"], "label_map": {"pos": "pos"}}, BadDataError, "has no name for neg"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_meant(
    labels: list[Any], settings: dict[str, Any], error: type[PreparationError], words: str
) -> None:
    with pytest.raises(error) as caught:
        named(labels, **settings)
    assert words in str(caught.value)


@pytest.mark.parametrize("mark", [-1, "-1", "-", -100])
@pytest.mark.parametrize(
    "settings",
    [
        {"given": ["a", "b"]},
        {"given": ["0", "1"]},
        {"own": ("a", "b")},
        {"label_map": {"0": "a", "1": "b"}},
    ],
)
def test_a_missing_gold_label_is_no_class(mark: Any, settings: dict[str, Any]) -> None:
    shape = named([0, 1], **settings)
    with pytest.raises(BadDataError, match=r"data\.jsonl:2: no gold label: '-1?0*' stands in its place"):
        read(shape, [0, mark])
    assert len(read(named([mark, 1], **settings), [1])) == 1


def test_a_mark_that_is_named_is_a_class() -> None:
    assert read(named([-1, 1], ["-1", "1"]), [-1, 1]) == ["-1", "1"]
    assert read(named(["-", "x"], ["x", "-"]), ["-"]) == ["-"]
    assert read(named([-1, 1], label_map={"-1": "no", "1": "yes"}), [-1]) == ["no"]
    assert named([-1, 1]).labels is None


def test_a_name_among_later_numbers_is_an_error_and_other_numbers_stay_unknown() -> None:
    shape = named([0, 1], EMOTIONS)
    with pytest.raises(BadDataError, match=r"data\.jsonl:2: label 'happy' is a name, while the first records"):
        read(shape, [0, "happy"])
    assert read(shape, [17]) == ["17"]


def test_tags_have_names_too() -> None:
    found = [{"tokens": ["a", "b"], "ner_tags": [0, 2]}, {"tokens": ["c"], "ner_tags": [1]}]
    shape = recognised(found, "token_classification")
    own = with_label_names(shape, records(found), None, None, ("O", "B-X", "I-X"))
    assert to_example(own, records(found)[0]) == TaggedExample(("a", "b"), ("O", "I-X"))
    given = with_label_names(shape, records(found), ["O", "B-Y", "I-Y"], None, None)
    assert to_example(given, records(found)[1]) == TaggedExample(("c",), ("B-Y",))
    with pytest.raises(BadDataError, match="no gold label: '-100'"):
        to_example(own, records([{"tokens": ["a"], "ner_tags": [-100]}])[0])


def test_names_change_the_key_of_a_shape_only_where_they_change_labels() -> None:
    plain = named(["x", "y"])
    assert plain.key() == named(["x", "y"], ["x", "y"]).key()
    keys = [named([0, 1], own=names).key() for names in (None, ("a", "b"), ("b", "a"))]
    assert len({str(key) for key in keys}) == 3


@pytest.mark.parametrize(
    ("given", "label_map", "own", "wanted"),
    [
        (None, None, [], None),
        (None, None, [None, None], None),
        (["b", "a"], {"1": "a"}, [("x", "y")], ("b", "a")),
        (None, None, [None, ("x", "y"), ("x", "y")], ("x", "y")),
        (None, {"1": "b", "-1": "a", "0": "c"}, [], ("a", "c", "b")),
        (None, {"pos": "b", "neg": "a"}, [], ("a", "b")),
        (None, {"10": "z", "9": "y"}, [], ("y", "z")),
        (None, {"neg": "bad", "pos": "good"}, [("pos", "neg")], ("good", "bad")),
        (None, {"1": "b", "2": "b", "0": "a"}, [], ("a", "b")),
    ],
)
def test_the_order_of_labels(
    given: Sequence[str] | None, label_map: Mapping[str, str] | None, own: Any, wanted: tuple[str, ...] | None
) -> None:
    assert label_order(given, label_map, own) == wanted


def test_sources_that_number_labels_differently() -> None:
    with pytest.raises(
        DataConfigError, match=r"number their labels differently, \(a, b\) and \(b, a\); give data\.label_n"
    ):
        label_order(None, None, [("a", "b"), ("b", "a")])
