"""Small decisions of the loop that need no ranks."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.config import RunConfig
from engine.setup import model_digest, resumed_progress
from engine.step import Progress, micro_batch_seed
from engine.tasks import TASKS
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


@pytest.mark.parametrize(
    ("mode", "values", "best_step", "since"),
    [
        ("max", [0.5, 0.55, 0.59, 0.58], 1, 3),  # each is better than the one before, none by more than a tenth
        ("max", [0.5, 0.61, 0.7, 0.72], 4, 0),  # compared with the best that counted, not with the one before
        ("min", [2.0, 1.95, 1.89, 1.85], 3, 1),
        ("max", [0.5, 0.5], 1, 1),
    ],
)
def test_a_change_must_be_large_enough_to_count(mode: Any, values: list[float], best_step: int, since: int) -> None:
    progress = Progress()
    for step, value in enumerate(values, start=1):
        progress.step = step
        update_best(progress, value, mode, least_change=0.1)
    assert (progress.best_step, progress.evaluations_without_improvement) == (best_step, since)
    assert progress.best_value == values[best_step - 1]


@pytest.mark.parametrize(("metric", "mode", "fits"), [
    ("accuracy", "max", True), ("accuracy", "min", False), ("loss", "min", True), ("loss", "max", False),
    (None, "min", False), (None, None, True),
])  # fmt: skip
def test_the_mode_must_be_that_of_the_metric(metric: str | None, mode: str | None, fits: bool) -> None:
    values = training(metric).config.model_dump(mode="json") | {"evaluation": {"metric": metric, "mode": mode}}
    if fits:
        assert RunConfig.model_validate(values).evaluation.mode == mode
        return
    with pytest.raises(ValueError, match=r"evaluation.mode: (accuracy|loss) is better the (lower|higher) it is"):
        RunConfig.model_validate(values)


@pytest.mark.parametrize(("key", "section", "owner"), [
    ("masking.fraction", {"masking": {"fraction": 0.3}}, "masked_lm"),
    ("evaluation.answers", {"evaluation": {"answers": {"language": "zh"}}}, "question_answering"),
    ("evaluation.out_of_scope_label", {"evaluation": {"out_of_scope_label": "oos"}}, "sequence_classification"),
])  # fmt: skip
def test_settings_of_other_tasks_are_refused(key: str, section: dict[str, Any], owner: str) -> None:
    values = training().config.model_dump(mode="json")
    for task in TASKS:
        if task == owner:
            RunConfig.model_validate(values | {"task": task} | section)
        else:
            with pytest.raises(ValueError, match=f"{key} has no meaning for task {task}: leave it out"):
                RunConfig.model_validate(values | {"task": task} | section)


@pytest.mark.parametrize(("before", "now", "is_kept"), [
    (None, "accuracy", True), ("accuracy", None, True), ("loss", "loss", True), (None, "loss", False), ("loss", None, False)
])  # fmt: skip
def test_the_best_by_another_metric_is_not_compared_with_new_evaluations(
    before: str | None, now: str | None, is_kept: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(step=9, best_value=0.9, best_step=6, evaluations_without_improvement=1)
    evaluation = training(before).config.model_dump(mode="json")
    state = {"progress": progress.as_json(), "circumstances": {"config": evaluation}}
    task = TASKS["sequence_classification"]
    found = resumed_progress(state, task, training(now).config.best_metric(task))
    assert found == (progress if is_kept else Progress(step=9))
    assert ("the best evaluation was that by" in capsys.readouterr().out) == (not is_kept)


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
