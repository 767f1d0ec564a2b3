"""Before ranks start: the labels of the data held against those of a model that has a head."""

from pathlib import Path
from typing import Any

import pytest
from data_fixtures import bert_vocabulary, section, write_jsonl

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from engine.finding import Finding
from engine.fit.model_facts import ModelFacts
from engine.fit.stores import open_stores
from engine.run_file import dump_yaml
from launcher.job.run_config import load_run
from launcher.start.compare import compare

LABELS = [{"text": "the river", "label": "ham"}, {"text": "a stone", "label": "spam"}]
SCORES = [{"text": "the river", "score": 1.5}, {"text": "a stone", "score": 2.5}]


def findings(folder: Path, records: list[dict[str, Any]], overrides: list[str], **facts: Any) -> list[Finding]:
    """What is found about labels in a run on `records` with a model of such facts, before and after preparation."""
    data = section(folder, bert_vocabulary(folder / "vocab.txt"), write_jsonl(folder / "t.jsonl", records))
    if "label" in records[0]:
        data["label_names"] = ["ham", "spam"]
    values = {
        "run_dir": str(folder / "run"), "task": "sequence_classification", "data": data, "model": {"path": "m"},
        "optimizer": {"learning_rate": 1e-3}, "batch": {"global_rows": 2}, "duration": {"steps": 1},
    }  # fmt: skip
    (folder / "run.yaml").write_text(dump_yaml(values))
    prepare(DataConfig.model_validate(data), data, "sequence_classification", progress=False)
    run = load_run(folder / "run.yaml", overrides)
    model = ModelFacts("model.path m", 10**6, None, **facts)
    stores = open_stores(run.config, run.values["data"])
    found = [compare(run, model, given, 100) for given in (None, stores)]
    before, after = ([one for one in some if one.name == "label names"] for some in found)
    assert not before or before == after, "as far as it is known before"
    return after


def test_a_head_for_other_labels_ends_a_run_before_it_starts(tmp_path: Path) -> None:
    (found,) = findings(tmp_path, LABELS, [], label_names=("bad", "good"), has_head=True)
    assert found.verdict == "error" and "bad, good in the model, ham, spam in the data" in found.text
    assert "set model.new_head: true" in found.text


def test_a_new_head_that_is_asked_for_is_said(tmp_path: Path) -> None:
    (found,) = findings(tmp_path, LABELS, ["model.new_head=true"], label_names=("bad", "good"), has_head=True)
    assert found.verdict == "warning" and "made anew" in found.text


def test_scores_need_another_head_than_labels(tmp_path: Path) -> None:
    (found,) = findings(tmp_path, SCORES, [], label_names=("bad", "good"), has_head=True)
    assert found.verdict == "error" and "the data have scores" in found.text


@pytest.mark.parametrize("records", [LABELS, SCORES], ids=["labels", "scores"])
def test_a_model_without_a_head_has_nothing_to_compare(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    assert findings(tmp_path, records, [], label_names=("LABEL_0", "LABEL_1"), has_head=False) == []
