"""The stores of a run must have what its task trains on."""

from pathlib import Path
from typing import Any

import pytest
from data_fixtures import bert_vocabulary, prepared, section, write_jsonl

from engine.config import RunConfig
from engine.errors import DataError
from engine.fit.stores import open_stores

CASES: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "labels": ([{"text": "the river", "label": "a"}, {"text": "a stone", "label": "b"}], True),
    "scores": ([{"text": "the river", "score": 2.5}], False),
    "several labels": ([{"text": "the river", "labels": ["a", "b"]}], False),
}


@pytest.mark.parametrize("name", CASES)
def test_classification_takes_one_label_a_text(tmp_path: Path, name: str) -> None:
    given, is_trained = CASES[name]
    records = write_jsonl(tmp_path / "records.jsonl", given)
    data = section(tmp_path, bert_vocabulary(tmp_path / "vocab.txt"), records)
    store, _ = prepared(data, "sequence_classification")
    config = RunConfig.model_validate(
        {
            "run_dir": "r", "task": "sequence_classification", "data": data, "model": {"path": "m"},
            "optimizer": {"learning_rate": 1e-3}, "batch": {"global_rows": 4}, "duration": {"steps": 1},
        }
    )  # fmt: skip
    if is_trained:
        assert open_stores(config, data).training[0].digest == store.digest
    else:
        with pytest.raises(DataError, match="holds scores or several labels a text; one label each can be trained yet"):
            open_stores(config, data)
