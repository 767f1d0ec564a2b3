"""Small decisions of the loop that need no ranks."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.config import RunConfig
from engine.setup import model_digest
from engine.step import Progress, micro_batch_seed
from engine.train import is_finished, update_best


def training(metric: str | None = None, patience: int | None = None) -> Any:
    config = RunConfig.model_validate(
        {
            "run_dir": "r", "task": "sequence_classification", "data": {"store_dir": "s", "row_tokens": 8},
            "model": {"path": "m"}, "optimizer": {"learning_rate": 1e-3}, "batch": {"global_rows": 4},
            "duration": {"steps": 100}, "evaluation": {"metric": metric, "patience": patience},
        }
    )  # fmt: skip
    return SimpleNamespace(config=config, total_steps=100)


@pytest.mark.parametrize(
    ("metric", "values", "best_step", "since"),
    [("accuracy", [0.5, 0.7, 0.6, 0.7], 2, 2), ("loss", [3.0, 2.0, 2.5, 1.9], 4, 0), (None, [0.2, 0.1], 1, 1)],
)
def test_the_best_evaluation_is_the_first_of_the_best(
    metric: str | None, values: list[float], best_step: int, since: int
) -> None:
    progress, config = Progress(), training(metric).config
    for step, value in enumerate(values, start=1):
        progress.step = step
        update_best(progress, value, config.trained_task.metrics[config.best_metric(config.trained_task)])
    assert (progress.best_step, progress.evaluations_without_improvement) == (best_step, since)


def test_a_run_that_stopped_early_stays_stopped() -> None:
    progress = Progress(step=40, evaluations_without_improvement=3)
    assert is_finished(training(patience=3), progress)
    assert not is_finished(training(patience=4), progress)
    assert not is_finished(training(), progress)
    assert is_finished(training(), Progress(step=100))


def test_progress_is_kept_under_the_names_of_the_format() -> None:
    """Checkpoints of earlier versions hold these names, in this order."""
    progress = Progress(step=4, tokens=90, evaluation_pending=True)
    values = progress.as_json()
    assert list(values) == [
        "step", "row_position", "tokens", "targets", "best_value", "best_step", "evaluations_without_improvement",
        "owes_evaluation",
    ]  # fmt: skip
    assert values["owes_evaluation"] is True
    assert Progress.of(values) == progress


def test_seeds_of_micro_batches_differ_in_everything() -> None:
    seeds = {micro_batch_seed(s, t, m, r) for s in range(4) for t in range(4) for m in range(4) for r in range(4)}
    assert len(seeds) == 256
    assert max(seeds) < np.iinfo(np.int64).max


def test_the_model_digest_ignores_where_and_sees_what() -> None:
    import transformers

    def digest(**values: Any) -> str:
        config = transformers.LlamaConfig(hidden_size=32, num_attention_heads=4, **values)
        return model_digest(SimpleNamespace(config=config))

    moved = transformers.LlamaConfig(hidden_size=32, num_attention_heads=4)
    moved._name_or_path = "elsewhere"
    assert digest() == model_digest(SimpleNamespace(config=moved))
    assert digest() != digest(rms_norm_eps=1e-5)
