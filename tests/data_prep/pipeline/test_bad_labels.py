"""Labels and scores that cannot be learned: an error with file and line, or a stated rule and a count."""

from pathlib import Path
from typing import Any

import pytest
from data_fixtures import bert_vocabulary, section, write_jsonl

from data_prep.config import DataConfig
from data_prep.errors import BadDataError, UnusableError
from data_prep.prepare import prepare
from data_prep.token_store import TokenStore

NAMES = ["contradiction", "entailment", "neutral"]


def pairs(*labels: Any) -> list[dict[str, Any]]:
    return [
        {"premise": f"the river {place}", "hypothesis": "a stone", "label": label} for place, label in enumerate(labels)
    ]


def made(
    folder: Path,
    records: list[dict[str, Any]],
    task: str = "sequence_classification",
    progress: bool = False,
    **more: Any,
) -> TokenStore:
    path = write_jsonl(folder / "a.jsonl", records)
    values = section(folder, bert_vocabulary(folder / "vocab.txt"), path, **more)
    folders = prepare(DataConfig.model_validate(values), values, task, progress=progress)
    return TokenStore.open(folders["train"])


@pytest.mark.parametrize("unusable", ["error", "drop"])
def test_pairs_without_a_gold_label_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unusable: str
) -> None:
    """However many they are: half of these are, and `data.unusable` says nothing about them."""
    records = pairs(*NAMES * 8, *["-"] * 24)
    store = made(tmp_path, records, label_names=NAMES, unusable=unusable, progress=True)
    assert list(store.label_names) == NAMES and store.num_documents == 24
    assert store.manifest["ledger"]["total"]["dropped_at_encoding"] == {"no_gold_label": 24}
    assert "24 no_gold_label" in capsys.readouterr().out
    assert f"{tmp_path}/a.jsonl:25" in str(store.manifest["sources"][0]["unusable"][0])


def test_other_bad_records_beside_them_are_still_an_error(tmp_path: Path) -> None:
    records = [*pairs(*NAMES, "-"), {"premise": "the river", "hypothesis": 3, "label": "neutral"}]
    with pytest.raises(UnusableError, match=r"a\.jsonl:5: .*; 1 record cannot be used"):
        made(tmp_path, records, label_names=NAMES)


def test_where_every_label_is_held_back_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match=r"no_gold_label"):
        made(tmp_path, pairs(-1, -1, -1), label_names=NAMES)


def test_a_minus_is_a_label_where_it_is_named_as_one(tmp_path: Path) -> None:
    store = made(tmp_path, pairs("-", "+", "-"), label_names=["-", "+"])
    assert store.column("labels").tolist() == [0, 1, 0]


def test_a_tag_without_a_meaning_is_no_reason_to_lose_its_sentence(tmp_path: Path) -> None:
    records = [{"tokens": ["old", "river"], "tags": ["A", "B"]}, {"tokens": ["old", "river"], "tags": ["A", "-100"]}]
    with pytest.raises(UnusableError, match=r"a\.jsonl:2: no gold label: '-100'"):
        made(tmp_path, records, "token_classification", label_names=["A", "B"])


@pytest.mark.parametrize(
    ("score", "said"),
    [
        ("NaN", "must be a finite number, not the text 'NaN'"),
        ("inf", "must be a finite number, not the text 'inf'"),
        ("high", "must be a finite number, not the text 'high'"),
        (True, "must be a finite number, not"),
        ([1.0], "must be a finite number, not"),
        (None, "is null"),
        (1e39, "too large for a score in fp32"),
        (10**400, "must be a finite number"),
    ],
    ids=["nan", "inf", "word", "true", "list", "null", "large", "huge"],
)
def test_what_is_no_score_is_named_with_its_line(tmp_path: Path, score: Any, said: str) -> None:
    records = [{"text": "the river", "score": 1.5}, {"text": "a stone", "score": score}]
    with pytest.raises(BadDataError, match=rf"a\.jsonl:2: .*{said}"):
        made(tmp_path, records)


def test_scores_as_texts_of_numbers_are_read(tmp_path: Path) -> None:
    store = made(tmp_path, [{"text": "the river", "score": "2.50"}, {"text": "a stone", "score": -1}])
    assert store.column("scores").tolist() == [2.5, -1.0]


@pytest.mark.parametrize("label", [3, -2, 99])
def test_a_number_beyond_the_named_labels_is_refused(tmp_path: Path, label: int) -> None:
    with pytest.raises(BadDataError, match=rf"a\.jsonl:4: label {label} is no position in data\.label_names"):
        made(tmp_path, pairs(0, 1, 2, label), label_names=NAMES)


@pytest.mark.parametrize(
    "odd",
    [{"text": "a stone", "label": ["a"]}, {"text": "a stone", "score": 1.0}],
    ids=["a list among labels", "a score among labels"],
)
def test_kinds_are_not_mixed_in_one_source(tmp_path: Path, odd: dict[str, Any]) -> None:
    records = [{"text": "the river", "label": "a"}, {"text": "the river", "label": "b"}] * 60
    with pytest.raises(BadDataError, match=r"a\.jsonl:121: "):
        made(tmp_path, [*records, odd])


def test_sources_of_two_kinds_are_not_one_store(tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "b.jsonl", [{"text": "the river", "score": 1.0}])
    labels = write_jsonl(tmp_path / "c.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
    values = section(tmp_path, bert_vocabulary(tmp_path / "vocab.txt"), labels) | {"train": [str(labels), str(other)]}
    with pytest.raises(BadDataError, match="a store holds one kind of label"):
        prepare(DataConfig.model_validate(values), values, "sequence_classification", progress=False)
