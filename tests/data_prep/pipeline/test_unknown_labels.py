"""Held-out labels that train has not: listed all at once, before train is tokenised where it can be, or kept as wrong."""

from pathlib import Path
from typing import Any

import pytest
from data_fixtures import bert_vocabulary, section, write_jsonl

from data_prep.config import DataConfig
from data_prep.errors import BadDataError, UnusableError
from data_prep.prepare import prepare
from data_prep.token_store import TokenStore

NAMES = [f"kind {number:02d}" for number in range(12)]
TRAIN = [{"text": "warm light", "label": name} for name in NAMES]
HELD_OUT = [TRAIN[3], {"text": "a", "label": "odd"}, {"text": "a", "label": "new"}, {"text": "b", "label": "odd"}]


def made(values: dict[str, Any], task: str) -> dict[str, TokenStore]:
    folders = prepare(DataConfig.model_validate(values), values, task, progress=False)
    return {split: TokenStore.open(folder) for split, folder in folders.items()}


def values_of(folder: Path, train: list[Any], held_out: list[Any], **more: Any) -> dict[str, Any]:
    path = write_jsonl(folder / "a.jsonl", train)
    held = write_jsonl(folder / "v.jsonl", held_out)
    return section(folder, bert_vocabulary(folder / "vocab.txt"), path, validation=str(held), **more)


@pytest.mark.parametrize("names", [None, NAMES])
def test_all_unknown_labels_come_together_with_all_known_ones(tmp_path: Path, names: list[str] | None) -> None:
    values = values_of(tmp_path, TRAIN, HELD_OUT, label_names=names)
    with pytest.raises(UnusableError) as caught:
        made(values, "sequence_classification")
    text = str(caught.value)
    assert (
        text.startswith(f"{tmp_path}/v.jsonl:2: label 'odd' is not one of {', '.join(NAMES)} (") and "2 times" in text
    )
    assert f"{tmp_path}/v.jsonl:3: label 'new' (once)" in text and "data.unknown_labels=count_wrong" in text
    tokenised = list(Path(values["store_dir"]).glob(".*.work/records/*.part"))
    assert len(tokenised) == (1 if names else 2), "with label_names, held-out labels are looked at before train"


@pytest.mark.parametrize("named", [{"label_names": ["a", "b", "c"]}, {"label_map": {0: "a", 1: "b", 2: "c"}}])
@pytest.mark.parametrize("unknown", [[7], [0, 7]])
def test_numbers_without_a_name_count_as_wrong_too(tmp_path: Path, named: dict[str, Any], unknown: list[int]) -> None:
    train, held_out = ([{"text": "warm", "label": number} for number in some] for some in ([0, 1, 2], unknown))
    values = values_of(tmp_path, train, held_out, unknown_labels="count_wrong", **named)
    store = made(values, "sequence_classification")["validation"]
    assert store.column("labels").tolist() == [-1 if number == 7 else number for number in unknown]
    with pytest.raises(BadDataError, match="7"):
        made({**values, "unknown_labels": "error"}, "sequence_classification")
    from_one = values_of(tmp_path / "1", train, [{"text": "a", "label": 3}], unknown_labels="count_wrong", **named)
    if "label_names" in named:  # numbers that begin with 1 are no unknown label
        with pytest.raises(BadDataError, match="label 3 is no position"):
            made(from_one, "sequence_classification")


def test_a_mark_of_no_gold_label_never_counts_as_wrong(tmp_path: Path) -> None:
    """Where train's labels are found, `-` is unknown and named; where they are given, such records are left out."""
    held_out = [TRAIN[3], {"text": "a", "label": "-"}, {"text": "a", "label": "odd"}]
    values = values_of(tmp_path, TRAIN, held_out, unknown_labels="count_wrong")
    with pytest.raises(
        UnusableError, match=r"v\.jsonl:2: label '-' is not one of(.|\n)*data\.label_names names the others"
    ):
        made(values, "sequence_classification")
    store = made({**values, "label_names": NAMES}, "sequence_classification")["validation"]
    assert store.column("labels").tolist() == [3, -1]


def test_more_labels_than_lines_are_named_without_their_places(tmp_path: Path) -> None:
    held_out = [{"text": "a", "label": f"new {number}"} for number in range(23)]
    with pytest.raises(UnusableError) as caught:
        made(values_of(tmp_path, TRAIN, held_out), "sequence_classification")
    assert caught.value.lines[19:21] == (
        f"{tmp_path}/v.jsonl:20: label 'new 19' (once)",
        "and 3 more labels: new 20, new 21, new 22",
    )


def test_many_known_labels_are_counted_not_listed(tmp_path: Path) -> None:
    train = [{"text": "warm light", "label": str(number)} for number in range(150)]
    with pytest.raises(
        UnusableError, match=r"is not one of the 150 labels that are listed in .*train-.*manifest\.json"
    ):
        made(values_of(tmp_path, train, [{"text": "a", "label": "x"}]), "sequence_classification")


def test_they_stay_with_no_number_where_they_count_as_wrong_and_the_error_comes_back(tmp_path: Path) -> None:
    values = values_of(tmp_path, TRAIN, HELD_OUT, unknown_labels="count_wrong")
    stores = made(values, "sequence_classification")
    assert stores["validation"].column("labels").tolist() == [3, -1, -1, -1]
    assert list(stores["validation"].label_names) == list(stores["train"].label_names) == NAMES
    counts = {name: count for name, (count, _) in stores["validation"].manifest["unknown_labels"].items()}
    assert counts == {"odd": 2, "new": 1}
    with pytest.raises(UnusableError, match="label 'odd'"):
        made({**values, "unknown_labels": "error"}, "sequence_classification")


def test_tags_too_and_a_training_label_is_never_let_go(tmp_path: Path) -> None:
    tagged = [{"tokens": ["old", "river"], "tags": ["A", "B"]}] * 3
    held_out = [{"tokens": ["old", "river"], "tags": ["A", "X"]}]
    values = values_of(tmp_path, tagged, held_out, unknown_labels="count_wrong")
    store = made(values, "token_classification")["validation"]
    marked = store.targets(0)
    assert store.token_column("tags", 0)[marked].tolist() == [0, -1] and store.num_targets == 2
    more = values_of(tmp_path / "2", [*TRAIN, {"text": "a", "label": "odd"}], HELD_OUT[:1], label_names=NAMES)
    with pytest.raises(UnusableError, match=r"a\.jsonl:13: label 'odd'"):
        made({**more, "unknown_labels": "count_wrong", "unusable": "drop"}, "sequence_classification")


def test_a_tag_is_named_by_its_own_line(tmp_path: Path) -> None:
    for name, tag in (("a", "A"), ("v", "X")):
        (tmp_path / f"{name}.conll").write_text(f"# one\nold\tA\nriver\tB\n\nold\tA\nriver\t{tag}\n")
    values = values_of(tmp_path, [], [])
    values |= {"train": [str(tmp_path / "a.conll")], "validation": str(tmp_path / "v.conll")}
    with pytest.raises(UnusableError, match=r"v\.conll:6: label 'X' is not one of A, B"):
        made(values, "token_classification")
