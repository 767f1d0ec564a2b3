"""The recipes for whole texts train for a few steps on records of the forms that they name, all in one start of a rank."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import bert_vocabulary, sentences, write_jsonl
from ranks import run_ranks
from repository import ROOT, WORKERS
from training_runs import metrics

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from engine.run_file import dump_yaml, load_run_file

RECIPES = ROOT / "launcher" / "recipes"
STEPS = 2


def texts() -> list[str]:
    return sentences(48, seed=5, longest_words=9)


def pairs() -> list[tuple[str, str]]:
    return list(zip(texts()[::2], texts()[1::2], strict=True))


#: Each run: its recipe, its records, what else its comments say to write, and the figure that it goes by.
RUNS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], str]] = {
    "labels": (
        "classify", [{"text": text, "label": ("negative", "positive")[len(text) % 2]} for text in texts()],
        {"loss": {"class_weights": "balanced"}}, "accuracy",
    ),
    "sets": (
        "classify", [{"text": text, "labels": ["phone", "urgent"][: len(text) % 3]} for text in texts()],
        {"evaluation": {"eval_every_steps": 32, "metric": "micro_f1", "micro_rows": 64}}, "micro_f1",
    ),
    "pairs": (
        "classify_pairs",
        [
            {"premise": one, "hypothesis": two, "label": ("entailment", "neutral", "contradiction", "-")[place % 4]}
            for place, (one, two) in enumerate(pairs())
        ],
        {}, "accuracy",
    ),
    "scores": (
        "similarity", [{"sentence1": one, "sentence2": two, "score": len(one) / 10} for one, two in pairs()],
        {}, "pearson",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished run of each recipe."""
    folder = tmp_path_factory.mktemp("recipes")
    vocabulary = str(bert_vocabulary(folder / "vocab.txt"))
    paths = []
    for name, (recipe, records, sections, _) in RUNS.items():
        path = str(write_jsonl(folder / f"{name}.jsonl", records))
        values = load_run_file(RECIPES / f"{recipe}.yaml").values | sections
        data = values["data"]
        given = {split: {**data[split], "path": path} if isinstance(data[split], dict) else path
                 for split in ("train", "validation")}  # fmt: skip
        data |= {**given, "tokenizer": vocabulary, "store_dir": str(folder / f"store-{name}"), "workers": 1}
        values |= {"run_dir": str(folder / name), "duration": {"steps": STEPS}, "batch": {"global_rows": 8}}
        prepare(DataConfig.model_validate(data), data, values["task"], progress=False)
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(dump_yaml(values))
    run_ranks(1, WORKERS / "runs_worker.py", *map(str, paths))
    return folder


@pytest.mark.ranks
@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_trains_and_goes_by_its_figure(runs: Path, name: str) -> None:
    metric = RUNS[name][3]
    assert sorted(metrics(runs / name)) == [1, 2]
    figures = metrics(runs / name, "evaluation")
    assert sorted(figures) == [0, STEPS] and metric in figures[STEPS]
    best = json.loads((runs / name / "checkpoints" / "best.json").read_text())
    assert (best["metric"], best["value"]) == (metric, figures[STEPS][metric])
    table = runs / name / "evaluation.txt"
    assert table.is_file() == (name != "scores")
    assert name != "pairs" or figures[STEPS]["targets"] == 18, "pairs without a gold label are left out"
