"""Names that data has for its own label numbers, as `datasets` writes them, and the stores that they make."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_fixtures import bert_vocabulary, byte_level_folder, section, write_jsonl
from preparations import run

from data_prep.config import SourceConfig
from data_prep.errors import DataConfigError
from data_prep.sources.class_names import class_names
from data_prep.sources.scan import find_sources
from data_prep.token_store import TokenStore

NAMES = ("negative", "neutral", "positive")
ROWS = {"text": ["bad film", "fine film", "good film", "good"], "label": [0, 1, 2, 2]}
FEATURES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(NAMES))})


def names_of(path: object, field: str = "label", **more: Any) -> tuple[str, ...] | None:
    config = SourceConfig.model_validate({"path": str(path), **more})
    ((source, *_),) = find_sources((config,), "data.train", Path(str(path)).parent / "cache")
    return class_names(source, field)


def made() -> datasets.Dataset:
    return datasets.Dataset.from_dict(ROWS, features=FEATURES)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "json", "gz"])
def test_names_in_what_datasets_writes(tmp_path: Path, kind: str) -> None:
    import gzip

    path = tmp_path / f"train.{kind}"
    match kind:
        case "parquet":
            made().to_parquet(path)
        case "arrow":
            made().save_to_disk(tmp_path / "saved")
            path = tmp_path / "saved"
        case "json":
            write_jsonl(path, [{"text": "a", "label": 0}])
            assert names_of(path) is None
            (tmp_path / "dataset_info.json").write_text(json.dumps({"features": FEATURES.to_dict()}))
        case "gz":
            made().to_parquet(tmp_path / "a.parquet")
            path = tmp_path / "train.parquet.gz"
            path.write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert names_of(path) == NAMES
    assert names_of(path, "text") is None and names_of(path, "none.such") is None


def test_lists_and_nested_fields(tmp_path: Path) -> None:
    tag = datasets.ClassLabel(names=["O", "B-X"])
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(tag), "inner": {"label": tag}}
    )
    rows = {"tokens": [["a"]], "tags": [[1]], "inner": [{"label": 0}]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    assert names_of(tmp_path / "a.parquet", "tags") == ("O", "B-X")
    assert names_of(tmp_path / "a.parquet", "inner.label") == ("O", "B-X")


CARDS = [
    "dataset_info:\n  features:\n  - name: label\n    dtype:\n      class_label:\n        names:\n          '0': a\n          '1': b\n",
    "dataset_info:\n  features:\n  - name: label\n    dtype:\n      class_label:\n        names:\n          '1': b\n          '0': a\n",
    "dataset_info:\n  features:\n  - name: label\n    sequence:\n      class_label:\n        names: [a, b]\n",
    "dataset_info:\n  features:\n  - name: label\n    list:\n      class_label:\n        names: {'0': a, '1': b}\n",
    "dataset_info:\n- config_name: x\n  features:\n  - {name: label, dtype: {class_label: {names: [a, b]}}}\n"
    "- config_name: y\n  features:\n  - {name: text, dtype: string}\n",
]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("place", ["train.jsonl", "data/train.jsonl"])
def test_names_in_the_card_of_a_folder(tmp_path: Path, card: str, place: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{card}---\n# A data set\n")
    assert names_of(write_jsonl(tmp_path / place, [{"text": "a", "label": 0}])) == ("a", "b")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", "# no header\n"),
        ("README.md", "---\n: : {\n---\n"),
        ("README.md", "---\ndataset_info: text\n---\n"),
        ("README.md", "---\ndataset_info:\n- features: [{name: label, dtype: {class_label: {names: [a, b]}}}]\n"
         "- features: [{name: label, dtype: {class_label: {names: [c, d]}}}]\n---\n"),
        ("dataset_info.json", "{broken"),
        ("dataset_info.json", '{"features": {"label": {"names": ["a", "a"]}}}'),
        ("dataset_info.json", '{"features": {"label": {"names": {"x": "a"}}}}'),
        ("dataset_infos.json", "[]"),
    ],
)  # fmt: skip
def test_descriptions_that_say_nothing(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert names_of(write_jsonl(tmp_path / "train.jsonl", [{"text": "a", "label": 0}])) is None


def test_names_in_the_description_of_all_configurations(tmp_path: Path) -> None:
    (tmp_path / "dataset_infos.json").write_text(json.dumps({"default": {"features": FEATURES.to_dict()}}))
    assert names_of(write_jsonl(tmp_path / "train.jsonl", [{"text": "a", "label": 0}])) == NAMES


def store_of(tmp_path: Path, train: Any, **more: Any) -> tuple[TokenStore, list[int]]:
    tokenizer = bert_vocabulary(tmp_path / "vocab.txt")
    folders = run(section(tmp_path, tokenizer, train, **more), "sequence_classification")
    store = TokenStore.open(folders["train"])
    return store, store.column("labels").tolist()


def test_a_store_has_the_names_in_their_order(tmp_path: Path) -> None:
    made().to_parquet(tmp_path / "train.parquet")
    store, labels = store_of(tmp_path, str(tmp_path / "train.parquet"))
    assert (tuple(store.label_names), labels) == (NAMES, [0, 1, 2, 2])
    order = ["positive", "negative", "neutral"]
    store, labels = store_of(tmp_path, str(tmp_path / "train.parquet"), label_names=order)
    assert (list(store.label_names), labels) == (order, [1, 2, 0, 0])
    renamed = {"negative": "bad", "neutral": "fine", "positive": "good"}
    store, labels = store_of(tmp_path, str(tmp_path / "train.parquet"), label_map=renamed)
    assert (list(store.label_names), labels) == (["bad", "fine", "good"], [0, 1, 2, 2])
    with pytest.raises(DataConfigError, match=r"data\.label_names lacks neutral"):
        store_of(tmp_path, str(tmp_path / "train.parquet"), label_names=["negative", "positive"])


def test_names_of_a_data_set_that_is_spooled(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    made().to_parquet(folder / "train.parquet")
    for _ in range(2):  # the second time from the spool
        store, labels = store_of(tmp_path, {"hub": str(folder)})
        assert (tuple(store.label_names), labels) == (NAMES, [0, 1, 2, 2])


def test_names_stay_with_a_spool_whose_writing_broke_off(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    card = "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype:\n"
    card += "      class_label:\n        names: {'0': low, '1': high}\n---\n"
    write_jsonl(folder / "train.jsonl", [{"text": "good film", "label": number % 2} for number in range(9)])
    (folder / "README.md").write_text(card)
    (spool,) = (files[0] for files in find_sources((SourceConfig(hub=str(folder)),), "data.train", tmp_path / "c"))
    names, records = Path(spool.path).with_suffix(".names"), Path(spool.path)
    assert class_names(spool, "label") == ("low", "high")
    assert names.stat().st_mtime_ns <= records.stat().st_mtime_ns, "records that are there are never spooled again"


def test_another_order_in_the_description_makes_another_store(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "d" / "train.jsonl", [{"text": "good film", "label": name} for name in NAMES]))
    found = []
    for order in (list(NAMES), list(NAMES[::-1])):
        features = {"text": {"dtype": "string"}, "label": {"names": order, "_type": "ClassLabel"}}
        (tmp_path / "d" / "dataset_info.json").write_text(json.dumps({"features": features}))
        store, labels = store_of(tmp_path, path)
        assert (list(store.label_names), labels) == (order, [order.index(name) for name in NAMES])
        found.append(store.path)
    assert found[0] != found[1]


def test_positions_and_maps_reach_the_store(tmp_path: Path) -> None:
    rows = [{"text": "good film", "label": number % 3} for number in range(6)]
    path = str(write_jsonl(tmp_path / "train.jsonl", rows))
    store, labels = store_of(tmp_path, path, label_names=["c", "b", "a"])
    assert (list(store.label_names), labels) == (["c", "b", "a"], [0, 1, 2, 0, 1, 2])
    store, labels = store_of(tmp_path, path, label_map={2: "a", 1: "b", 0: "a"})
    assert (list(store.label_names), labels) == (["a", "b"], [0, 1, 0, 0, 1, 0])
    again, labels = store_of(tmp_path, path, label_map={2: "b", 1: "b", 0: "a"})
    assert labels == [0, 1, 1, 0, 1, 1] and again.path != store.path


def test_validation_is_numbered_as_train(tmp_path: Path) -> None:
    made().to_parquet(tmp_path / "train.parquet")
    held_out = write_jsonl(tmp_path / "v" / "validation.jsonl", [{"text": "good film", "label": "positive"}])
    tokenizer = bert_vocabulary(tmp_path / "vocab.txt")
    values = section(tmp_path, tokenizer, str(tmp_path / "train.parquet"), validation=str(held_out))
    store = TokenStore.open(run(values, "sequence_classification")["validation"])
    assert (tuple(store.label_names), store.column("labels").tolist()) == (NAMES, [2])


def test_folders_are_labels_in_a_store(tmp_path: Path) -> None:
    for name in ("pos", "neg"):  # the same content in both: a part is known by its content and its label
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "1.txt").write_text("good film\n")
    source = {"path": str(tmp_path / "train"), "label_from": "folder", "document": "file"}
    store, labels = store_of(tmp_path, source)
    assert (list(store.label_names), labels) == (["neg", "pos"], [0, 1])
    store, labels = store_of(tmp_path, source, label_names=["pos", "neg"])
    assert (list(store.label_names), labels) == (["pos", "neg"], [1, 0])
    parts = [{**source, "path": f"{tmp_path}/train/{name}/*.txt"} for name in ("pos", "neg")]
    assert store_of(tmp_path, parts)[1] == [1, 0]


def test_a_class_that_marks_missing_labels_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": "good film", "label": label} for label in ("a", "b", "-")])
    values = section(tmp_path, bert_vocabulary(tmp_path / "vocab.txt"), str(path))
    run(values, "sequence_classification", progress=True)
    assert "label '-' is a class of its own here; where it marks records without" in capsys.readouterr().out
    store = TokenStore.open(
        run({**values, "label_names": ["a", "b"]}, "sequence_classification", progress=True)["train"]
    )
    assert list(store.label_names) == ["a", "b"] and store.num_documents == 2
    said = capsys.readouterr().out
    assert "unusable: 1 no_gold_label" in said and f"{path}:3" in said


def test_label_map_is_for_labels(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": "good film"}])
    values = section(tmp_path, byte_level_folder(tmp_path / "tokenizer"), str(path), label_map={"a": "b"})
    with pytest.raises(DataConfigError, match=r"data\.label_map belongs to classification, not to task causal_lm"):
        run(values)
    with pytest.raises(ValueError, match=r"data\.label_map gives c, which data\.label_names does not have"):
        run({**values, "label_map": {1: "c"}, "label_names": ["a", "b"]})
