"""OCNLI as it comes: pairs whose annotators did not agree are left out by rule, and nothing else is to be set."""

from pathlib import Path

import pytest
from data_fixtures import SAMPLES

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from data_prep.token_store import TokenStore

OCNLI, VOCABULARY = SAMPLES / "understanding" / "ocnli", SAMPLES / "tokenizers" / "bert_zh" / "google_zh_vocab.txt"


@pytest.mark.skipif(not OCNLI.is_dir(), reason="no sample data here")
def test_ocnli_needs_its_three_labels_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "store_dir": str(tmp_path), "tokenizer": str(VOCABULARY), "row_tokens": 128, "overlong": "truncate",
        "train": str(OCNLI / "train.3k.json"), "validation": str(OCNLI / "dev.json"),
        "label_names": ["entailment", "neutral", "contradiction"], "workers": 1,
    }  # fmt: skip
    folders = prepare(DataConfig.model_validate(values), values, "sequence_classification", progress=True)
    said = capsys.readouterr().out
    for split, left_out in (("train", 6), ("validation", 50)):
        store = TokenStore.open(folders[split])
        assert list(store.label_names) == ["entailment", "neutral", "contradiction"]
        assert store.num_documents == 3000 - left_out
        assert store.manifest["ledger"]["total"]["dropped_at_encoding"] == {"no_gold_label": left_out}
        assert f"unusable: {left_out} no_gold_label" in said
        assert int(store.column("pair_starts").min()) > 0
