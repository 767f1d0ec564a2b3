"""What a rank notices by itself: a supervisor that is gone, a time limit that comes near."""

import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import SUPERVISOR_FIFO, ConfigError
from engine.ranks.liveness import _open_fifo
from engine.ranks.stop import StopSignal


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield StopSignal()
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def asked_at(stop: StopSignal, seconds: float, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether it stops when so many seconds have passed."""
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + seconds)
        stop.look_at_clock()
    return stop.asked


def test_a_save_begins_while_there_is_time_for_it(stop: StopSignal, monkeypatch: pytest.MonkeyPatch) -> None:
    stop.limit_time({"SLURM_JOB_END_TIME": str(int(time.time()) + 1000)})
    stop.plan_save(100.0, 10.0)
    assert not asked_at(stop, 1000 - 152, monkeypatch)
    stop.plan_save(40.0, 10.0)
    assert not asked_at(stop, 1000 - 92, monkeypatch), "it was measured again"
    assert asked_at(stop, 1000 - 89, monkeypatch)
    assert stop.reason == "the time limit, 90 s before it"


def test_every_start_gets_somewhere(stop: StopSignal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that is presumed to take longer than the whole job does not stop it before its first step."""
    stop.limit_time({"FULLTUNE_END_TIME": str(int(time.time()) + 1000)})
    stop.plan_save(4000.0, 0.0)
    assert not asked_at(stop, 490, monkeypatch)
    assert asked_at(stop, 510, monkeypatch)


def test_without_a_limit_the_clock_says_nothing(stop: StopSignal, monkeypatch: pytest.MonkeyPatch) -> None:
    stop.limit_time({})
    stop.plan_save(1e9, 0.0)
    assert not asked_at(stop, 1e9, monkeypatch)
    with pytest.raises(ConfigError, match="FULLTUNE_END_TIME=soon: write seconds since 1970"):
        stop.limit_time({"FULLTUNE_END_TIME": "soon"})


def test_a_supervisor_that_is_gone_is_noticed_also_by_who_comes_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    monkeypatch.setenv(SUPERVISOR_FIFO, str(fifo))
    supervisor = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    rank = _open_fifo()
    assert rank is not None
    poll = select.poll()
    poll.register(rank, 0)
    assert not poll.poll(0)
    os.close(supervisor)
    assert poll.poll(0)
    os.close(rank)
    assert _open_fifo() is None
