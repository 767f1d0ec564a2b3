"""A run that starts from a trained classifier whose labels have another order: its accuracy is there before step 1."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from data_fixtures import bert_vocabulary, sentences, write_jsonl
from ranks import run_ranks
from training_runs import metrics

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from data_prep.tokenizer.open import open_tokenizer
from engine.run_file import dump_yaml, load_run_file
from launcher.cli import main
from launcher.commands.export import export_run

NAMES = ("positive", "neutral", "negative")


def trained_classifier(folder: Path, vocab_size: int) -> Any:
    torch.manual_seed(2)
    names = dict(enumerate(NAMES))
    config = hf.BertConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5, id2label=names, label2id={name: number for number, name in names.items()},
    )  # fmt: skip
    model = hf.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


def labelled(model: Any, tokenizer: Any, texts: list[str]) -> tuple[list[dict[str, str]], float]:
    """Texts with the name of the label that the model gives them, and the model's mean loss on them."""
    records, loss = [], 0.0
    for text in texts:
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits
        number = int(logits.argmax())
        records.append({"text": text, "label": NAMES[number]})
        loss += F.cross_entropy(logits, torch.tensor([number])).item()
    return records, loss / len(texts)


@pytest.mark.ranks
def test_the_models_own_accuracy_is_there_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On two ranks, resumed on one, and exported with the model's labels in the model's order.

    `fulltune eval` of the run, and of its export in fp32, has the figures of its last evaluation to the last digit.
    """
    vocabulary = bert_vocabulary(tmp_path / "tokenizer")
    model = trained_classifier(tmp_path / "model", open_tokenizer(str(vocabulary)).vocab_size)
    tokenizer = hf.BertTokenizerFast(str(vocabulary))
    records, loss = labelled(model, tokenizer, sentences(60, seed=4, longest_words=9))
    assert {record["label"] for record in records} == {"negative", "positive"}, "else the order shows nothing"
    values = {
        "run_dir": str(tmp_path / "run"), "task": "sequence_classification", "deepspeed": str(tmp_path / "ds.json"),
        "data": {"store_dir": str(tmp_path / "store"), "train": str(write_jsonl(tmp_path / "t.jsonl", records)),
                 "validation": str(write_jsonl(tmp_path / "v.jsonl", records)), "tokenizer": str(vocabulary),
                 "row_tokens": 64, "workers": 1},
        "model": {"path": str(tmp_path / "model"), "activation_checkpointing": False},
        "optimizer": {"learning_rate": 1e-9, "schedule": "constant"}, "batch": {"global_rows": 8},
        "duration": {"steps": 1}, "evaluation": {"micro_rows": 4},
    }  # fmt: skip
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": true}')
    (tmp_path / "run.yaml").write_text(dump_yaml(values))
    data = load_run_file(tmp_path / "run.yaml").values["data"]
    prepare(DataConfig.model_validate(data), data, "sequence_classification", progress=False)

    said = run_ranks(2, "-m", "engine", tmp_path / "run.yaml")
    assert "the model's own labels and numbers are kept: 0 positive, 1 neutral, 2 negative" in said
    assert "no record has neutral" in said
    run_ranks(1, "-m", "engine", tmp_path / "run.yaml", "duration.steps=2")
    figures = metrics(tmp_path / "run", "evaluation")
    assert [figures[step]["accuracy"] for step in (0, 1, 2)] == [1.0, 1.0, 1.0]
    assert [figures[step]["macro_f1"] for step in (0, 1, 2)] == [1.0, 1.0, 1.0]
    assert [figures[step]["loss"] for step in (0, 1, 2)] == pytest.approx([loss] * 3, rel=1e-3)
    export_run(tmp_path / "run", tmp_path / "export", None, False, "float32", 5 * 10**9)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["id2label"] == {str(number): name for number, name in enumerate(NAMES)}
    assert config["label2id"] == {name: number for number, name in enumerate(NAMES)}
    last = {name: figures[2][name] for name in ("loss", "accuracy", "macro_f1", "targets")}
    files = ["--data", str(tmp_path / "v.jsonl"), "data.row_tokens=64", "--micro-rows", "4"]
    monkeypatch.setenv("OMP_NUM_THREADS", str(os.cpu_count() or 1))  # as the rank had: sums over threads differ
    for command in ([tmp_path / "run"], [tmp_path / "export", *files]):
        capfd.readouterr()
        assert main(["eval", *map(str, command), "--json"]) == 0
        again = json.loads(capfd.readouterr().out)
        assert {name: again[name] for name in last} == last
