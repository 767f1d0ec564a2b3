"""Hangs as they are judged from the ranks' pages: found in time, the right rank named, and none where there is none."""

import os
import random
from pathlib import Path

import pytest

from engine.ranks import heartbeat
from engine.ranks.heartbeat import Beat, page_path, read_page
from launcher.job.records import RankStart
from launcher.supervision.hang import FIRST_STEPS_SECONDS, HangWatch, is_in_collective, limit_seconds

LOOK = 0.5


def after(count: int, step: int, seconds: float = 0.0, phase: str = "step") -> Beat:
    return Beat(1, count, step, seconds, phase, "")


def trained(watch: HangWatch, step_seconds: list[float]) -> None:
    """Let two ranks do steps of these lengths."""
    for step, seconds in enumerate(step_seconds, start=1):
        for rank in (0, 1):
            watch.take(rank, after(step, step, seconds), LOOK)


def silent_until_found(watch: HangWatch, beats: dict[int, Beat]) -> tuple[int, float]:
    """Nothing changes any more: which rank is found, and after how long."""
    for number in range(100_000):
        for rank, beat in beats.items():
            watch.take(rank, beat, LOOK if number else 0.0)
        if hang := watch.find_hang(set()):
            return hang.rank, number * LOOK
    raise AssertionError("never found")


@pytest.mark.parametrize(("step_seconds", "limit"), [(0.2, 15.0), (4.0, 15.0), (30.0, 90.0)])
def test_found_in_time_and_the_one_behind_is_named(tmp_path: Path, step_seconds: float, limit: float) -> None:
    watch = HangWatch(tmp_path)
    jitter = random.Random(5)
    trained(watch, [step_seconds * jitter.uniform(0.9, 1.0) for _ in range(200)])
    rank, seconds = silent_until_found(watch, {0: after(1002, 201), 1: after(1001, 201)})
    assert rank == 1
    assert seconds <= limit + LOOK


def test_many_ranks_do_not_make_few_steps_many(tmp_path: Path) -> None:
    watch = HangWatch(tmp_path)
    for step in (1, 2, 3):
        for rank in range(64):
            watch.take(rank, after(step, step, 1.0 + step / 100), LOOK)
    assert list(watch._step_seconds) == [1.02, 1.03]
    _, seconds = silent_until_found(watch, {rank: after(4, 4, 1.03) for rank in range(64)})
    assert seconds >= 60.0


def test_of_the_first_steps_nothing_is_known(tmp_path: Path) -> None:
    watch = HangWatch(tmp_path)
    _, seconds = silent_until_found(watch, {0: after(1, 1), 1: after(2, 1)})
    assert seconds == FIRST_STEPS_SECONDS
    assert limit_seconds("step", [0.1] * 5) == 60.0
    assert limit_seconds("step", [4.0] * 50) == 20.0
    assert limit_seconds("step", [0.1] * 500 + [6.0] * 6) == 18.0, "what happens more than once in a hundred is usual"


@pytest.mark.parametrize("base_seconds", [0.1, 1.0, 6.0, pytest.param(40.0, marks=pytest.mark.long)])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_no_false_alarm_when_steps_vary_tenfold_both_ways(tmp_path: Path, base_seconds: float, seed: int) -> None:
    """Three hours of steps at least, each between a tenth of the usual and ten times it, with one beat a step."""
    watch, jitter, passed, step = HangWatch(tmp_path), random.Random(seed), 0.0, 0
    while passed < 3 * 3600 or step < 1000:
        seconds = base_seconds * 10 ** jitter.uniform(-1, 1)
        for _ in range(int(seconds / LOOK)):
            for rank in (0, 1):
                watch.take(rank, after(step, step, watch.beats[rank].step_seconds if step else 0.0), LOOK)
            assert watch.find_hang(set()) is None, (step, seconds)
        step += 1
        for rank in (0, 1):
            watch.take(rank, after(step, step, seconds), LOOK)
        passed += seconds


def test_a_slow_save_is_no_hang_and_neither_is_waiting_for_it(tmp_path: Path) -> None:
    watch = HangWatch(tmp_path)
    trained(watch, [0.5 + number / 1e4 for number in range(200)])
    for _ in range(2 * 600):  # ten minutes
        watch.take(0, after(300, 201), LOOK)
        watch.take(1, after(299, 201, phase="save"), LOOK)
        assert watch.find_hang(set()) is None
    rank, seconds = silent_until_found(watch, {0: after(300, 201), 1: after(299, 201, phase="save")})
    assert rank == 1
    assert 600 < seconds < 7200 + 60


def test_time_in_which_nobody_looked_does_not_count(tmp_path: Path) -> None:
    """The whole machine was suspended, the supervisor with it."""
    (tmp_path / "ranks").mkdir()
    heartbeat.open_page(page_path(tmp_path, 0))
    try:
        heartbeat.enter("step", 3)
        starts = [RankStart(0, os.getpid(), "here")]
        watch = HangWatch(tmp_path, least_seconds=15.0)
        trained(watch, [0.5 + number / 1e4 for number in range(200)])
        for now in (0.0, 1e6, 2e6, 3e6):
            watch.look(starts, {}, now)
            assert watch.find_hang({1}) is None
        for now in range(20):
            watch.look(starts, {}, 3e6 + now)
        hang = watch.find_hang({1})
        assert hang is not None
        assert hang.beat.step == 3
    finally:
        heartbeat._page = None


def test_a_page_tells_what_was_published(tmp_path: Path) -> None:
    path = tmp_path / "beat"
    assert read_page(path) is None
    path.write_bytes(b"short")
    assert read_page(path) is None
    heartbeat.open_page(path)
    try:
        heartbeat.enter("evaluation", 7)
        heartbeat.beat("x" * 100)
        heartbeat.end_step(8, 1.5)
        beat = read_page(path)
        assert beat is not None
        assert (beat.pid, beat.step, beat.step_seconds, beat.phase) == (os.getpid(), 8, 1.5, "evaluation")
        heartbeat.beat("x" * 100)
        later = read_page(path)
        assert later is not None
        assert (later.count, later.activity) == (beat.count + 1, "x" * 64)
    finally:
        heartbeat._page = None


def test_who_waits_for_others_is_seen_in_the_stack() -> None:
    waits = 'Current thread 0x1 (most recent call first):\n  File "torch/distributed/distributed_c10d.py", line 1 in barrier\n'
    works = 'Current thread 0x1 (most recent call first):\n  File "engine/batches.py", line 9 in build_batch\n'
    assert is_in_collective(f"{works}\n{waits}")
    assert not is_in_collective(works)
