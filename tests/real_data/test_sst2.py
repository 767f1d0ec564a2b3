"""The worked example of full-parameter fine-tuning: the shipped recipe on a thousand sentences of SST-2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_fixtures import SAMPLES
from ranks import rank_environment
from repository import ROOT
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from launcher.commands.export import export_run


@pytest.mark.ranks
@pytest.mark.long
@pytest.mark.skipif(not (SAMPLES / "classification" / "sst2").is_dir(), reason="no sample data here")
def test_a_small_bert_with_random_weights_learns_sst2(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "sst2.py"), "--seeds", "3", "--work", str(tmp_path)]
    environment = rank_environment(2) | {"FULLTUNE_SAMPLES": str(SAMPLES), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["scores"]) == 3
    assert result["mean"] >= 0.60
    assert 0.60 < result["bag_of_words"] < 0.80
    for seed, score in enumerate(result["scores"], start=1):
        assert_stopped_early_and_kept_the_best(tmp_path / f"run-{seed}", score)
    # The best one is an ordinary classifier for anybody.
    export_run(tmp_path / "run-1", tmp_path / "model", None, True, "float32", 5 * 10**9)
    best = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert best.config.id2label == {0: "negative", 1: "positive"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    records = [json.loads(line) for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    texts = tokenizer(
        [record["text"] for record in records], padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    with torch.no_grad():
        predicted = best(**texts).logits.argmax(-1).tolist()
    hits = sum(best.config.id2label[index] == record["label"] for index, record in zip(predicted, records, strict=True))
    assert hits / len(records) == pytest.approx(result["scores"][0], abs=0.01)  # fp32 here, bf16 there


def assert_stopped_early_and_kept_the_best(run_dir: Path, score: float) -> None:
    """The recipe's patience is 4; of equal scores the first counts."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["kind"] == "evaluation" and line["step"]]
    best = next(number for number, line in enumerate(evaluations) if line["accuracy"] == score)
    last = lines[-1]["step"]
    assert len(evaluations) == best + 1 + 4 or last == 625, "20 epochs of 1000 records, 32 a step"
    kept = json.loads((run_dir / "checkpoints" / "best.json").read_text())
    assert (kept["checkpoint"], kept["value"]) == (f"step-{evaluations[best]['step']:08d}", score)
    assert (run_dir / "checkpoints" / kept["checkpoint"] / "manifest.json").is_file()
