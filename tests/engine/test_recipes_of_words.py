"""The recipes for tags and for roles train for a few steps on two ranks, and their figures are those of one rank."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fixtures import WORDS, bert_vocabulary, write_jsonl
from ranks import run_ranks
from repository import ROOT
from training_runs import metrics

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from engine.config import RunConfig
from engine.run_file import dump_yaml, load_run_file

pytestmark = pytest.mark.ranks
STEPS = 3
NAMES = ("O", "B-boat", "I-boat", "B-bird")


def sentences(task: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Some of them longer than a row; the tag or role of a word follows from its length."""
    draw = np.random.default_rng(seed)
    made: list[dict[str, Any]] = []
    for _ in range(count):
        tokens = draw.choice(WORDS, draw.integers(2, 50)).tolist()
        verb = int(draw.integers(len(tokens)))
        if task == "token_classification":
            made.append({"tokens": tokens, "tags": [NAMES[len(word) % 4] for word in tokens]})
        else:
            roles = [("O", "ARG0", "ARG1")[len(word) % 3] for word in tokens]
            roles[verb] = "V"
            made.append({"tokens": tokens, "roles": roles, "predicate": verb})
    return made


def run_file(folder: Path, recipe: str, name: str) -> Path:
    """The recipe's own run file, but for the data, the sizes and the number of steps."""
    task = "token_classification" if recipe == "tag" else "semantic_roles"
    files = {
        split: write_jsonl(folder / f"{split}.jsonl", sentences(task, count, seed))
        for split, count, seed in (("train", 40, 1), ("validation", 14, 2))
    }
    overrides = [
        f"run_dir={folder / name}", f"data.store_dir={folder / 'stores'}", f"data.train={files['train']}",
        f"data.validation={files['validation']}", f"data.tokenizer={bert_vocabulary(folder / 'vocab.txt')}",
        "data.row_tokens=32", "data.stride_tokens=6", "data.tag_pieces=every", "data.workers=1",
        "batch.global_rows=6", "batch.micro_rows=2", "optimizer.learning_rate=1e-9", "optimizer.warmup_steps=0",
        "duration={steps: 3}", "evaluation.eval_every_steps=3", "model.config.hidden_dropout_prob=0.0",
        "model.config.attention_probs_dropout_prob=0.0", "log.tensorboard=false",
    ]  # fmt: skip
    if recipe == "tag":
        overrides.append("evaluation.metric=strict_f1")
    values = load_run_file(ROOT / "launcher" / "recipes" / f"{recipe}.yaml", overrides).values
    RunConfig.model_validate(values)
    prepare(DataConfig.model_validate(values["data"]), values["data"], task, progress=False)
    path = folder / f"{name}.yaml"
    path.write_text(dump_yaml(values))
    return path


@pytest.mark.parametrize("recipe", ["tag", "roles"])
def test_a_recipe_trains_and_scores_alike_on_one_and_two_ranks(recipe: str, tmp_path: Path) -> None:
    figures = []
    for ranks in (1, 2):
        name = f"run{ranks}"
        run_ranks(ranks, "-m", "engine", str(run_file(tmp_path, recipe, name)))
        assert len(metrics(tmp_path / name)) == STEPS
        figures.append(metrics(tmp_path / name, "evaluation")[STEPS])
    first, second = ({key: one[key] for key in one if key not in ("seconds", "loss")} for one in figures)
    assert first == second
    assert {"f1", "accuracy", "targets"} <= set(first)
    assert ("strict_f1" in first) == (recipe == "tag") and ("arguments" in first) == (recipe == "roles")
