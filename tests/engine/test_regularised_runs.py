"""Layer-wise learning rates, a head trained alone, dropout and early stopping, on two real ranks.

What a plain loop computes is the measure; the resumed run ends bit by bit where the undisturbed one does.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from data_fixtures import bert_vocabulary, sentences, write_jsonl
from ranks import run_ranks
from repository import WORKERS
from safetensors.torch import load_file
from training_runs import metrics, state_bytes

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from data_prep.token_store import TokenStore, open_rows
from engine.config import RunConfig
from engine.model.build import decay_groups
from engine.model.frozen import freeze
from engine.row_stream import stream_rows
from engine.run_file import dump_yaml
from launcher.commands.export import export_run

pytestmark = pytest.mark.ranks
STEPS, GLOBAL_ROWS, SEED, RATE, DECAY = 6, 7, 3, 2e-3, 0.5
NEVER = 10.0  # no accuracy improves by so much


@dataclass(frozen=True)
class Runs:
    """The folder of all runs, what the ranks said, and the store."""

    folder: Path
    said: str
    store: TokenStore


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("regularised")
    for stage in (2, 3):
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 100} if stage == 3 else {})
        (folder / f"zero{stage}.json").write_text(json.dumps({"bf16": {"enabled": False}, "zero_optimization": zero}))
    data = data_section(folder)
    prepared = prepare(DataConfig.model_validate(data), data, "sequence_classification", progress=False)
    store = TokenStore.open(prepared["train"])
    config = transformers.BertConfig(
        vocab_size=store.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
        id2label=dict(enumerate(store.label_names)), label2id={n: i for i, n in enumerate(store.label_names)},
    )  # fmt: skip
    torch.manual_seed(5)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "model")
    layered: dict[str, Any] = {"optimizer__layer_decay": DECAY}
    head: dict[str, Any] = {"model__train": "head"}
    stops: dict[str, Any] = {
        "model__dropout": 0.3, "evaluation__eval_every_steps": 1, "evaluation__patience": 2, "evaluation__mode": "max",
        "evaluation__metric": "accuracy", "evaluation__least_change": NEVER, "checkpoint__save_best": True,
        "checkpoint__keep_checkpoints": 1, "duration__steps": 20,
    }  # fmt: skip
    paths = [
        run_file(folder, "layered", **layered),
        run_file(folder, "layered2", 2, **layered),
        run_file(folder, "resumed", file="first", **layered, duration__steps=3),
        run_file(folder, "head", **head),
        run_file(folder, "head2", 2, **head),
        run_file(folder, "stopped", **stops),
    ]
    said = run_ranks(2, WORKERS / "runs_worker.py", *paths)
    # A run folder belongs to a process until it ends.
    said += run_ranks(2, WORKERS / "runs_worker.py", run_file(folder, "resumed", file="second", **layered))
    return Runs(folder, said, store)


def data_section(folder: Path) -> dict[str, Any]:
    texts = sentences(60, longest_words=9)
    records = [{"text": text, "label": ("long", "middle", "short")[len(text) % 3]} for text in texts]
    return {
        "store_dir": str(folder / "stores"), "tokenizer": str(bert_vocabulary(folder / "vocab.txt")), "row_tokens": 64,
        "workers": 1, "overlong": "truncate", "train": str(write_jsonl(folder / "train.jsonl", records)),
        "validation": str(write_jsonl(folder / "validation.jsonl", records[:20])),
    }  # fmt: skip


def run_file(folder: Path, name: str, stage: int = 3, file: str = "", **changes: Any) -> Path:
    values: dict[str, Any] = {
        "run_dir": str(folder / name), "task": "sequence_classification", "seed": SEED, "data": data_section(folder),
        "model": {"path": str(folder / "model"), "activation_checkpointing": False},
        "optimizer": {"learning_rate": RATE, "weight_decay": 0.1, "gradient_clipping": 0.0, "schedule": "constant"},
        "batch": {"global_rows": GLOBAL_ROWS, "micro_rows": 2}, "duration": {"steps": STEPS}, "evaluation": {},
        "checkpoint": {}, "deepspeed": str(folder / f"zero{stage}.json"),
    }  # fmt: skip
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        values[section][key] = value
    RunConfig.model_validate(values)
    path = folder / f"{file or name}.yaml"
    path.write_text(dump_yaml(values))
    return path


def plain_training(runs: Runs, layer_decay: float, frozen: tuple[str, ...]) -> tuple[list[float], Any]:
    """The same steps with torch and transformers alone: a text at a time, torch's AdamW, a rate for each parameter."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(runs.folder / "model").train()
    freeze(model, frozen)
    groups = [
        {"params": [parameter], "lr": RATE * share_of(name, layer_decay), "weight_decay": 0.1 * (parameter.ndim >= 2)}
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    optimizer = torch.optim.AdamW(groups)
    rows, losses = open_rows(runs.store, 64), []
    for step in range(STEPS):
        used = stream_rows(step * GLOBAL_ROWS, GLOBAL_ROWS, rows.sources, SEED)
        total = torch.zeros(())
        for document in (int(rows.segments(int(row))[0][0]) for row in used):
            ids = torch.from_numpy(runs.store.tokens(document).astype(np.int64))[None]
            label = torch.tensor([int(runs.store.column("labels")[document])])
            total = total + F.cross_entropy(model(ids).logits, label)
        optimizer.zero_grad()
        (total / GLOBAL_ROWS).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(total.item() / GLOBAL_ROWS)
    return losses, model


def share_of(name: str, decay: float) -> float:
    """The rule, written out for a BERT of two layers."""
    if layer := re.match(r"bert\.encoder\.layer\.(\d)", name):
        return decay ** (2 - int(layer[1]))
    return decay**3 if name.startswith("bert.embeddings") else 1.0


def weights_of(runs: Runs, name: str, **which: Any) -> dict[str, torch.Tensor]:
    """The weights that `fulltune export` makes of a run."""
    out = runs.folder / f"export-{name}-{'-'.join(f'{key}{value}' for key, value in which.items())}"
    export_run(runs.folder / name, out, which.get("step"), which.get("best", False), "float32", 5 * 10**9)
    return load_file(out / "model.safetensors")


def assert_same_training(runs: Runs, name: str, layer_decay: float, frozen: tuple[str, ...]) -> dict[str, torch.Tensor]:
    losses, model = plain_training(runs, layer_decay, frozen)
    ours = metrics(runs.folder / name)
    assert [ours[step]["loss"] for step in range(1, STEPS + 1)] == pytest.approx(losses, rel=1e-4)
    weights = weights_of(runs, name)
    base = load_file(runs.folder / "model" / "model.safetensors")
    for key, parameter in model.named_parameters():
        moved, expected = weights[key] - base[key], parameter.detach() - base[key]
        if "key.bias" not in key:  # its gradient is only rounding, of which AdamW makes a step in any direction
            assert float((moved - expected).norm()) <= 1e-2 * float(expected.norm()), key
    return weights


@pytest.mark.parametrize("name", ["layered", "layered2"])
def test_each_layer_learns_at_its_rate(runs: Runs, name: str) -> None:
    """Under ZeRO-3 and ZeRO-2; the rate that is logged is the head's."""
    assert_same_training(runs, name, DECAY, ())
    assert {figures["learning_rate"] for figures in metrics(runs.folder / name).values()} == {RATE}


def test_a_resumed_run_has_the_same_bits(runs: Runs) -> None:
    assert state_bytes(runs.folder / "resumed", 6) == state_bytes(runs.folder / "layered", 6)
    assert "resuming after step 3" in runs.said


@pytest.mark.parametrize("name", ["head", "head2"])
def test_the_head_is_trained_alone(runs: Runs, name: str) -> None:
    weights = assert_same_training(runs, name, 1.0, ("embeddings", "encoder"))
    base = load_file(runs.folder / "model" / "model.safetensors")
    moved = {key for key, value in weights.items() if not torch.equal(value, base[key])}
    assert moved == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    num_trained = sum(base[key].numel() for key in moved)
    assert f"({num_trained:,} trained, " in runs.said


def test_a_run_ends_when_nothing_improves_by_enough_and_its_best_is_exported(runs: Runs) -> None:
    """The first evaluation of a step is the best so far; the two after it improve by too little."""
    evaluations = metrics(runs.folder / "stopped", "evaluation")
    assert sorted(evaluations) == [0, 1, 2, 3]
    assert "no better accuracy in 2 evaluations: done; best" in runs.said
    best, last = weights_of(runs, "stopped", best=True), weights_of(runs, "stopped")
    assert any(not torch.equal(best[key], last[key]) for key in best)
    out = next(runs.folder.glob("export-stopped-best*"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    store = TokenStore.open(next((runs.folder / "stores").glob("validation-*")))
    hits = []
    for document in range(store.num_documents):
        ids = torch.from_numpy(store.tokens(document).astype(np.int64))[None]
        with torch.no_grad():
            hits.append(int(model(ids).logits.argmax()) == int(store.column("labels")[document]))
    assert np.mean(hits) == pytest.approx(evaluations[1]["accuracy"])


def test_dropout_acts_in_training_and_the_export_says_what_the_base_said(runs: Runs) -> None:
    without, with_dropout = metrics(runs.folder / "layered"), metrics(runs.folder / "stopped")
    assert abs(with_dropout[1]["loss"] - without[1]["loss"]) > 1e-3  # the same weights and rows
    assert (
        metrics(runs.folder / "stopped", "evaluation")[0]["loss"]
        == metrics(runs.folder / "layered", "evaluation")[0]["loss"]
    )
    config = json.loads((runs.folder / "stopped" / "model" / "config.json").read_text())
    assert (config["hidden_dropout_prob"], config["attention_probs_dropout_prob"]) == (0.0, 0.0)
    assert "model.dropout: 0.3 in place of hidden_dropout_prob 0, attention_probs_dropout_prob 0" in runs.said


def test_the_groups_of_a_plain_optimizer_are_the_same(runs: Runs) -> None:
    """What a checkpoint says of the optimizer: a group for each layer, with its share of the rate."""
    newest = sorted((runs.folder / "layered" / "checkpoints").glob("step-*"))[-1]
    groups = json.loads((newest / "manifest.json").read_text())["written_by"]["groups"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(runs.folder / "model")
    expected = [(group["lr_scale"], group["weight_decay"]) for group in decay_groups(model, 0.1, DECAY)]
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == expected
    assert [group["lr"] for group in groups] == [RATE * scale for scale, _ in expected]
