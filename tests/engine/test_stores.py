"""The stores of a run must have what its task trains on."""

from pathlib import Path
from typing import Any

import pytest
from data_fixtures import bert_vocabulary, prepared, section, write_jsonl

from engine.config import RunConfig
from engine.errors import ConfigError, DataError
from engine.fit.stores import Stores, open_stores
from engine.tasks.task import DocumentResult

ONE = [{"text": "the river", "label": "a"}, {"text": "a stone", "label": "b"}]
SEVERAL = [{"text": "the river", "labels": ["a", "b"]}, {"text": "a stone", "labels": []}]
SCORES = [{"text": "the river", "score": 2.5}, {"text": "a stone", "score": -1}]


def opened(folder: Path, train: list[Any], validation: list[Any] | None = None, **sections: Any) -> Stores:
    """The prepared stores of a run file with these sections."""
    (folder / "data").mkdir()
    data = section(folder, bert_vocabulary(folder / "vocab.txt"), write_jsonl(folder / "train.jsonl", train))
    if validation is not None:
        data["validation"] = str(write_jsonl(folder / "validation.jsonl", validation))
    prepared(data, "sequence_classification")
    values = {
        "run_dir": "r", "task": "sequence_classification", "data": data, "model": {"path": "m"},
        "optimizer": {"learning_rate": 1e-3}, "batch": {"global_rows": 4}, "duration": {"steps": 1}, **sections,
    }  # fmt: skip
    return open_stores(RunConfig.model_validate(values), data)


@pytest.mark.parametrize(
    ("train", "problem", "best"),
    [
        (ONE, "single_label_classification", "accuracy"),
        (SEVERAL, "multi_label_classification", "micro_f1"),
        (SCORES, "regression", "pearson"),
    ],
    ids=["labels", "label sets", "scores"],
)
def test_the_columns_decide_what_is_trained(tmp_path: Path, train: list[Any], problem: str, best: str) -> None:
    stores = opened(tmp_path, train, train)
    assert (stores.task.problem, stores.task.best) == (problem, best)
    assert stores.task.name == "sequence_classification" and not stores.task.kinds


@pytest.mark.parametrize(("train", "validation"), [(ONE, SCORES), (SCORES, ONE)], ids=["scores", "labels"])
def test_both_stores_hold_the_same_kind(tmp_path: Path, train: list[Any], validation: list[Any]) -> None:
    with pytest.raises(DataError, match=r"data.validation: other targets than data.train has: .*train-.* is for .*"):
        opened(tmp_path, train, validation)


@pytest.mark.parametrize(
    ("train", "sections", "said"),
    [
        (SCORES, {"loss": {"class_weights": "balanced"}}, "loss.class_weights has no meaning for regression"),
        (SCORES, {"loss": {"label_smoothing": 0.1}}, "loss.label_smoothing has no meaning for regression"),
        (SEVERAL, {"loss": {"class_weights": {"a": 2}}}, "loss.class_weights has no meaning for multi_label"),
        (SCORES, {"evaluation": {"metric": "accuracy"}}, "accuracy is not one of pearson, spearman, mse, loss"),
        (ONE, {"evaluation": {"metric": "pearson"}}, "pearson is not one of accuracy, macro_f1"),
        (ONE, {"evaluation": {"metric": "out_of_scope_recall"}}, "needs evaluation.out_of_scope_label"),
        (ONE, {"evaluation": {"out_of_scope_label": "aa"}}, "'aa' is not one of the 2 labels.*did you mean 'a'"),
        (SEVERAL, {"evaluation": {"out_of_scope_label": "a"}}, "out_of_scope_label has no meaning for multi_label"),
    ],
    ids=["weights", "smoothing", "weights of sets", "metric", "metric of scores", "no scope", "other label", "sets"],
)
def test_settings_without_a_meaning_on_the_data_are_refused(
    tmp_path: Path, train: list[Any], sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        opened(tmp_path, train, **sections)


def test_a_label_for_what_is_out_of_scope_adds_its_figures(tmp_path: Path) -> None:
    scope = {"out_of_scope_label": "b", "metric": "out_of_scope_recall"}
    stores = opened(tmp_path, ONE, ONE, evaluation=scope)
    details = [(0, 0), (0, 1), (1, 1), (1, 1), (1, 0)]
    results = [DocumentResult(0.0, 1, {"label": true, "predicted": guess}) for true, guess in details]
    figures = stores.task.figures(results, stores.training[0])
    assert figures["out_of_scope_recall"] == pytest.approx(2 / 3) and figures["in_scope_accuracy"] == 0.5
    assert figures["accuracy"] == pytest.approx(3 / 5)
