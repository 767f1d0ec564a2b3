"""The recipe for masked language modelling runs on one and on two ranks: as a plain loop computes it; its export fills masks."""

import json
import math
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
from repository import ROOT, WORKERS
from training_runs import metrics

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from data_prep.token_store import TokenStore, open_rows
from engine.config import RunConfig
from engine.model.build import decay_groups
from engine.row_stream import stream_rows
from engine.run_file import dump_yaml, load_run_file
from engine.tasks import TASKS
from engine.tasks.task import STILL, Draw

pytestmark = pytest.mark.ranks
STEPS, GLOBAL_ROWS, SEED, RATE, FRACTION, ROW_TOKENS = 6, 7, 3, 2e-3, 0.3, 32
TASK = TASKS["masked_lm"]


@dataclass(frozen=True)
class Runs:
    """The same run on one and on two ranks, and by a plain loop: its losses before each step, and its model."""

    folder: Path
    stores: dict[str, TokenStore]
    losses: list[float]
    model: Any


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("masked")
    tokenizer = bert_vocabulary(folder / "vocab.txt")
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "stage3_param_persistence_threshold": 100}
    (folder / "ds.json").write_text(json.dumps({"bf16": {"enabled": False}, "zero_optimization": zero}))
    paths = [run_file(folder, ranks, micro_rows, tokenizer) for ranks, micro_rows in ((1, GLOBAL_ROWS), (2, 2))]
    data = load_run_file(paths[0]).values["data"]
    folders = prepare(DataConfig.model_validate(data), data, "masked_lm", progress=False)
    stores = {split: TokenStore.open(path) for split, path in folders.items()}
    config = transformers.BertConfig(
        vocab_size=stores["train"].vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(5)
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(folder / "model")
    for ranks, path in enumerate(paths, 1):
        run_ranks(ranks, WORKERS / "runs_worker.py", path)
    losses, model = plain_training(folder / "model", stores["train"])
    return Runs(folder, stores, losses, model)


def run_file(folder: Path, ranks: int, micro_rows: int, tokenizer: Path) -> Path:
    """The recipe with small numbers."""
    texts = [{"text": text} for text in sentences(120)]
    values = load_run_file(ROOT / "launcher" / "recipes" / "masked.yaml").values
    values["data"] |= {
        "store_dir": str(folder / "stores"), "tokenizer": str(tokenizer), "row_tokens": ROW_TOKENS, "workers": 1,
        "train": str(write_jsonl(folder / "train.jsonl", texts)), "validation_fraction": 0.2,
    }  # fmt: skip
    values |= {
        "run_dir": str(folder / f"run-{ranks}"), "seed": SEED, "model": {"path": str(folder / "model")},
        "masking": {"fraction": FRACTION}, "duration": {"steps": STEPS}, "deepspeed": str(folder / "ds.json"),
        "optimizer": {"learning_rate": RATE, "weight_decay": 0.1, "gradient_clipping": 0.0, "schedule": "constant"},
        "batch": {"global_rows": GLOBAL_ROWS, "micro_rows": micro_rows},
        "evaluation": {"eval_every_steps": 3}, "checkpoint": {}, "export": {"at_end": True, "dtype": "float32"},
    }  # fmt: skip
    RunConfig.model_validate(values)
    path = folder / f"run-{ranks}.yaml"
    path.write_text(dump_yaml(values))
    return path


def masked(store: TokenStore, row: int, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (T,) of a document with masks, and its true ids (T,), -100 where no loss is."""
    batch = TASK.batch(store, open_rows(store, ROW_TOKENS), np.array([row]), row, draw)
    labels = torch.full_like(batch.input_ids[0], -100)
    labels[batch.target_positions] = batch.target_ids
    return batch.input_ids[0], labels


def loss_sum(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids[None]).logits[0], labels, ignore_index=-100, reduction="sum")


def plain_training(folder: Path, store: TokenStore) -> tuple[list[float], Any]:
    """The same steps with torch and transformers alone: a document at a time, mean over the step's masked tokens."""
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=RATE)
    losses = []
    for step in range(STEPS):
        used = stream_rows(step * GLOBAL_ROWS, GLOBAL_ROWS, open_rows(store, ROW_TOKENS).sources, SEED)
        examples = [masked(store, int(row), Draw(SEED, step + 1, FRACTION)) for row in used]
        total = sum((loss_sum(model, *example) for example in examples), torch.zeros(()))
        loss = total / sum(int((labels >= 0).sum()) for _, labels in examples)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses, model.eval()


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_are_those_of_a_plain_loop(runs: Runs, ranks: int) -> None:
    """The masked tokens of a step are counted on every rank for itself, and divide the sum over all ranks."""
    ours = metrics(runs.folder / f"run-{ranks}")
    assert [ours[step]["loss"] for step in range(1, STEPS + 1)] == pytest.approx(runs.losses, rel=1e-4)
    assert runs.losses[-1] < runs.losses[0]


def test_evaluations_have_the_same_masks_and_the_usual_share_of_them(runs: Runs) -> None:
    store = runs.stores["validation"]
    rows = range(open_rows(store, ROW_TOKENS).num_rows)
    examples = [masked(store, row, STILL) for row in rows]
    targets = sum(int((labels >= 0).sum()) for _, labels in examples)
    figures = [metrics(runs.folder / f"run-{ranks}", "evaluation") for ranks in (1, 2)]
    assert {one[step]["targets"] for one in figures for step in (0, 3, 6)} == {targets}
    assert 0.1 < targets / store.num_targets < 0.25
    with torch.no_grad():
        loss = sum(loss_sum(runs.model, *example).item() for example in examples) / targets
    for one in figures:
        assert one[STEPS]["loss"] == pytest.approx(loss, rel=1e-4) and one[STEPS]["loss"] < one[0]["loss"]
        assert one[STEPS]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)


def test_the_export_fills_masks(runs: Runs) -> None:
    folder = runs.folder / "run-2" / "export"
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids, _ = masked(runs.stores["validation"], 0, STILL)
    with torch.no_grad():
        torch.testing.assert_close(model(ids[None]).logits, runs.model(ids[None]).logits, rtol=1e-3, atol=1e-3)
    assert "pipeline_tag: fill-mask" in (folder / "README.md").read_text()
    fill = transformers.pipeline("fill-mask", model=str(folder), device="cpu", dtype=torch.float32)
    guesses = fill("the river [MASK] under a bridge", top_k=3)
    assert len(guesses) == 3 and guesses[0]["score"] >= guesses[1]["score"]
    with torch.no_grad():
        encoded = fill.tokenizer("the river [MASK] under a bridge", return_tensors="pt")
        place = int((encoded["input_ids"][0] == 4).nonzero())
        expected = runs.model(encoded["input_ids"]).logits[0, place].argmax()
    assert guesses[0]["token"] == int(expected)
