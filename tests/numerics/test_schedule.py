"""Learning rates against the closed form of each schedule."""

import math

import pytest

from engine.fit.schedule import learning_rate
from engine.sections import OptimizerSection


def section(schedule: str, **values: float) -> OptimizerSection:
    return OptimizerSection.model_validate({"learning_rate": 2.0, "schedule": schedule, **values})


def rates(total: int, made: OptimizerSection) -> list[float]:
    return [learning_rate(step, total, made) for step in range(total)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "warmup_stable_decay"])
def test_warm_up_is_linear_and_never_zero(schedule: str) -> None:
    made = section(schedule, warmup_steps=4)
    assert rates(100, made)[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "warmup_stable_decay"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("total", [1, 2, 5])
def test_short_runs_are_no_special_case(schedule: str, warmup: int, total: int) -> None:
    made = section(schedule, warmup_steps=warmup, final_fraction=0.1)
    assert all(0 < rate <= 2.0 for rate in rates(total, made))


def test_constant_stays() -> None:
    assert set(rates(50, section("constant"))) == {2.0}


def test_linear_falls_evenly_to_the_final_share() -> None:
    made = section("linear", final_fraction=0.25)
    assert rates(10, made) == pytest.approx([2.0 * (1 - 0.75 * k / 10) for k in range(10)])
    assert learning_rate(10, 10, made) == pytest.approx(0.5)


def test_cosine_is_half_way_in_the_middle() -> None:
    made = section("cosine", warmup_steps=10, final_fraction=0.2)
    assert learning_rate(60, 110, made) == pytest.approx((2.0 + 0.4) / 2)
    assert learning_rate(35, 110, made) == pytest.approx(0.4 + 1.6 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(110, 110, made) == pytest.approx(0.4)


def test_warmup_stable_decay_is_flat_then_linear() -> None:
    made = section("warmup_stable_decay", warmup_steps=5, decay_fraction=0.2)
    values = rates(100, made)
    assert set(values[5:80]) == {2.0}
    assert values[80:] == pytest.approx([2.0 * (1 - k / 20) for k in range(20)])


def test_after_the_end_the_rate_stays_at_its_last_value() -> None:
    assert learning_rate(500, 100, section("linear", final_fraction=0.1)) == pytest.approx(0.2)
