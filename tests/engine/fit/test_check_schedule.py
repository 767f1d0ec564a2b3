"""Settings that contradict one another or the size of the data are said, with both numbers; sound ones are not."""

from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from engine.config import RunConfig
from engine.fit.schedule import check_schedule, learning_rate
from engine.run_file import load_run_file


def config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "run_dir": "run", "task": "causal_lm", "data": {"store_dir": "store", "row_tokens": 64},
        "model": {"path": "model"}, "optimizer": {"learning_rate": 1e-3}, "batch": {"global_rows": 64},
        "duration": {"steps": 100},
    }  # fmt: skip
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        values[section] = values.get(section, {}) | {key: value}
    return RunConfig.model_validate(values)


WSD = {"optimizer__schedule": "warmup_stable_decay"}
CASES = [
    ({"optimizer__warmup_steps": 100, "duration__steps": 3}, "reaches 2.97e-05, 3 % of 0.001"),
    ({"optimizer__warmup_steps": 100}, "warmup_steps is 100 and the run has 100 steps"),
    ({"optimizer__warmup_steps": 60}, "60 % of the run's 100 steps"),
    ({"optimizer__warmup_steps": 5, "duration": {"epochs": 1.0}}, "the run has 2 steps"),
    (WSD | {"optimizer__warmup_steps": 40, "optimizer__decay_fraction": 0.7}, "warm-up (40 steps) and decay (70)"),
    (WSD | {"duration__steps": 4}, "decay_fraction 0.1 of 4 steps is no step"),
    ({"optimizer__decay_fraction": 0.3}, "decay_fraction has no effect with schedule cosine"),
    ({"optimizer__final_fraction": 0.1, "optimizer__schedule": "constant"}, "final_fraction has no effect"),
    ({"batch__global_rows": 640, "duration__steps": 1}, "each step uses the data 5 times"),
    ({"duration__steps": 300}, "300 steps of 64 rows are 150 epochs of 128 rows"),
    ({"checkpoint__save_every_steps": 500}, "save_every_steps is 500 and the run has 100 steps"),
    ({"evaluation__eval_every_steps": 500}, "eval_every_steps is 500 and the run has 100 steps"),
    ({"export__every_steps": 101}, "no weights are written"),
    ({"evaluation__patience": 3, "evaluation__eval_every_steps": 40}, "patience 3 never ends the run, which has 3"),
    ({"evaluation__patience": 1}, "patience 1 never ends the run, which has 1"),
]


@pytest.mark.parametrize(("changes", "said"), CASES, ids=[said for _, said in CASES])
def test_what_contradicts_the_run_or_the_data_is_said(changes: dict[str, Any], said: str) -> None:
    given = dict(changes)
    duration = given.pop("duration", None)
    chosen = config(**given)
    if duration is not None:
        chosen = RunConfig.model_validate(chosen.model_dump() | {"duration": duration})
    findings = check_schedule(chosen, 128, has_validation=True)
    assert any(said in finding.text for finding in findings), findings
    assert all(finding.verdict == "warning" for finding in findings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"evaluation__patience": 2, "checkpoint__save_best": True},
            "patience and checkpoint.save_best have no effect",
        ),
        ({"evaluation__eval_every_steps": 10}, "evaluation.eval_every_steps has no effect without held-out records"),
    ],
)
def test_evaluation_without_held_out_records_is_said(changes: dict[str, Any], said: str) -> None:
    (finding,) = check_schedule(config(**changes), None, has_validation=False)
    assert said in finding.text


def test_a_sound_run_has_nothing_to_say() -> None:
    sound = config(optimizer__warmup_steps=10, evaluation__patience=2, evaluation__eval_every_steps=10)
    assert check_schedule(sound, 10_000, has_validation=True) == []
    assert check_schedule(sound, None, has_validation=True) == []


@pytest.mark.parametrize("recipe", sorted((ROOT / "launcher" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_have_nothing_to_say(recipe: Path) -> None:
    assert check_schedule(load_run_file(recipe).parse(RunConfig), 10**7, has_validation=True) == []


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "warmup_stable_decay"])
def test_the_rate_that_is_named_is_the_highest_of_the_run(schedule: str) -> None:
    chosen = config(optimizer__warmup_steps=30, optimizer__schedule=schedule, duration__steps=7)
    highest = max(learning_rate(step, 7, chosen.optimizer) for step in range(7))
    assert f"reaches {highest:.3g}," in check_schedule(chosen, 10**6, has_validation=False)[0].text
