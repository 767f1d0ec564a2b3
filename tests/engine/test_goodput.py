"""Where the time of a run went, over crashes, requeues and stops, second by second on a clock of the test's own."""

import json
import time
from pathlib import Path

import pytest

from engine.goodput import CAUSES, Goodput, useful_seconds

STEP = {"step_seconds": 10.0, "data_seconds": 1.0, "save_stall_seconds": 0.5}


def test_every_second_has_one_cause(tmp_path: Path) -> None:
    goodput = Goodput(tmp_path / "time.json", now=105, process_began=100)
    goodput.started(4, 0, now=120)
    goodput.evaluation(2, now=122)
    for now in (133, 144, 155):
        totals = goodput.step(STEP, now=now)
    assert totals == {
        "useful_fraction": 27 / 55, "useful_seconds": 27, "start_seconds": 16, "load_seconds": 4, "data_wait_seconds": 3,
        "save_stall_seconds": 1.5, "evaluation_seconds": 2, "lost_work_seconds": 0, "restart_seconds": 0,
        "requeue_seconds": 0, "other_seconds": 1.5,
    }  # fmt: skip
    assert list(totals) == ["useful_fraction", "useful_seconds", *(f"{cause}_seconds" for cause in CAUSES)]


@pytest.mark.parametrize(("count", "cause"), [("", "restart"), ("0", "restart"), ("2", "requeue")])
def test_a_crash_costs_the_gap_and_the_steps_since_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: str, cause: str
) -> None:
    first = Goodput(tmp_path / "time.json", process_began=0)
    first.started(0, 0, now=10)
    for step in (1, 2, 3):
        first.step(STEP, now=10 + 11 * step)
    monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    second = Goodput(tmp_path / "time.json", process_began=100)
    second.started(3, lost_seconds=2 * useful_seconds(STEP), now=110)
    totals = second.step(STEP, now=121)
    assert totals["useful_seconds"] == 9 + 9
    assert totals["lost_work_seconds"] == 9 + 9
    assert totals[f"{cause}_seconds"] == 100 - 43
    assert totals["start_seconds"] == 10 + 7
    assert totals["load_seconds"] == 3
    assert sum(seconds for name, seconds in totals.items() if name.endswith("_seconds")) == pytest.approx(121)
    assert totals["useful_fraction"] == pytest.approx(18 / 121)


def test_time_after_a_requested_stop_does_not_count(tmp_path: Path) -> None:
    first = Goodput(tmp_path / "time.json", process_began=0)
    first.started(0, 0, now=10)
    first.step(STEP, now=21)
    first.ended(now=22)
    second = Goodput(tmp_path / "time.json", process_began=1000)
    second.started(0, 0, now=1010)
    totals = second.step(STEP, now=1021)
    assert totals["restart_seconds"] == totals["lost_work_seconds"] == 0
    assert totals["useful_fraction"] == pytest.approx(18 / 43)


def test_a_damaged_record_starts_anew_and_the_process_knows_when_it_began(tmp_path: Path) -> None:
    (tmp_path / "time.json").write_text("[1, 2")
    began = time.time()
    goodput = Goodput(tmp_path / "time.json")
    goodput.started(0, 0)
    written = json.loads((tmp_path / "time.json").read_text())
    assert 0 < written["seconds"]["start"] < 3600
    assert began - 1 <= written["last_seen"] <= time.time()
