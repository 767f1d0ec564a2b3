"""MiniLM's real weights through two steps on two ranks: read to the last bit, trained, and exported."""

from pathlib import Path

import pytest
import torch
import transformers
from data_fixtures import write_jsonl
from ranks import run_ranks
from safetensors.torch import load_file
from training_runs import metrics

from engine.run_file import dump_yaml, load_run_file
from launcher.commands.export import export_run
from launcher.job.run_config import load_run
from launcher.start.start import prepare_store

TEXTS = ("a gripping film", "an hour too long", "nobody laughed", "warm , funny and wise")


@pytest.mark.ranks
def test_two_steps_move_what_the_texts_use_and_nothing_else(minilm: Path, tmp_path: Path) -> None:
    """An embedding whose token is in no text has no gradient, so it is the file's own after AdamW's steps, bit for bit."""
    records = [{"text": text, "label": ("good", "bad")[number % 2]} for number, text in enumerate(TEXTS)]
    values = {
        "run_dir": str(tmp_path / "run"), "task": "sequence_classification",
        "data": {
            "store_dir": str(tmp_path / "stores"), "train": str(write_jsonl(tmp_path / "train.jsonl", records)),
            "tokenizer": str(minilm), "row_tokens": 32, "workers": 1,
        },
        "model": {"path": str(minilm), "activation_checkpointing": False},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "batch": {"global_rows": 4, "micro_rows": 2}, "duration": {"steps": 2}, "log": {"tensorboard": False},
    }  # fmt: skip
    run_file = tmp_path / "run.yaml"
    run_file.write_text(dump_yaml(values))
    prepare_store(load_run(run_file, []))
    run_ranks(2, "-m", "engine", str(run_file))
    losses = [line["loss"] for line in metrics(tmp_path / "run").values()]
    assert len(losses) == 2 and losses[0] == pytest.approx(0.6931, abs=0.1)  # an untrained head: ln 2
    export_run(tmp_path / "run", tmp_path / "model", None, False, "float32", 5 * 10**9)

    before, after = load_file(minilm / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    words = "embeddings.word_embeddings.weight"
    moved = (after[f"bert.{words}"] != before[words]).any(1).nonzero().flatten().tolist()
    used = {
        token for ids in transformers.AutoTokenizer.from_pretrained(minilm)(list(TEXTS))["input_ids"] for token in ids
    }
    assert set(moved) == used
    rest = [name for name in before if name != words and f"bert.{name}" in after]
    assert len(rest) > 90
    for name in rest:
        change = (after[f"bert.{name}"] - before[name]).abs().max()
        assert change <= 2.1e-3, name  # AdamW: about the learning rate a step
    assert load_run_file(tmp_path / "run" / "run.yaml").values["model"]["path"] == str(minilm)
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert opened.dtype == torch.float32 and set(opened.config.label2id) == {"good", "bad"}
