"""`batch.micro_rows: auto`: the largest size that fits is found without ever trying one that does not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from equivalence_cases import Case, case_config, memory_store

from engine.fit.stores import Stores
from engine.micro_rows import CPU_TOKENS, find_micro_rows, largest_that_fits, longest_rows
from engine.ranks.distributed import Ranks
from engine.setup import with_micro_rows
from engine.tasks.task import STILL, Draw


@dataclass
class Memory:
    """A device on which a batch of n rows takes `fixed` and n times `row` bytes."""

    fixed: int
    row: int
    held: int = 100

    def __post_init__(self) -> None:
        self.tried: list[int] = []

    def peak(self, size: int) -> int:
        self.tried.append(size)
        return self.held + (self.fixed + self.row * size if size else 0)


@pytest.mark.parametrize(
    ("memory", "most", "limit", "found", "tried"),
    [
        (Memory(0, 10), 16, 1000, 16, [0, 1, 2, 4, 8, 16]),
        (Memory(0, 10), 13, 1000, 13, [0, 1, 2, 4, 8, 13]),
        (Memory(0, 10), 64, 357, 25, [0, 1, 2, 4, 8, 16]),
        (Memory(50, 10), 64, 357, 20, [0, 1, 2, 4, 8, 16]),
        (Memory(0, 10), 64, 110, 1, [0, 1]),
        (Memory(0, 10), 64, 105, 1, [0, 1]),
        (Memory(0, 10), 64, 90, 1, [0]),
        (Memory(0, 0), 8, 100, 8, [0, 1, 2, 4, 8]),
        (Memory(0, 10), 1, 1000, 1, [0, 1]),
    ],
    ids=["share", "odd share", "between", "fixed part", "one", "not even one", "nothing", "free", "share of one"],
)
def test_the_largest_size_within_the_limit(memory: Memory, most: int, limit: int, found: int, tried: list[int]) -> None:
    assert largest_that_fits(memory.peak, most, limit) == found
    assert memory.tried == tried
    fits = [size for size in range(1, most + 1) if memory.held + memory.fixed + memory.row * size <= limit]
    assert found == max(fits, default=1)


def test_trials_take_the_dearest_rows() -> None:
    _, rows = memory_store("causal_lm")
    tokens = [int(rows.segments(row)[2].sum()) for row in range(rows.num_rows)]
    chosen = longest_rows(rows, rows.num_rows + 2)
    assert sorted(chosen[: rows.num_rows].tolist()) == list(range(rows.num_rows))
    assert tokens[chosen[0]] == max(tokens)
    assert chosen[rows.num_rows :].tolist() == chosen[:2].tolist()
    assert longest_rows(rows, 3).dtype == np.int64


def test_on_a_cpu_the_rank_takes_its_share_or_so_many_tokens() -> None:
    store, rows = memory_store("causal_lm")
    longest = max(int(rows.segments(row)[2].sum()) for row in range(rows.num_rows))
    ranks = Ranks(0, 2, torch.device("cpu"))
    found, why = find_micro_rows(None, store, rows, ranks, 9, STILL)  # type: ignore[arg-type]
    assert (found, why) == (5, "a rank's share of a step")
    found, why = find_micro_rows(None, store, rows, ranks, 10**6, STILL)  # type: ignore[arg-type]
    assert found == CPU_TOKENS // longest
    assert why == f"16,384 tokens of the longest rows, {longest} each"


@pytest.mark.parametrize(
    ("given", "state", "found", "why"),
    [
        ("auto", None, 4, "a rank's share of a step"),
        ("auto", {"ranks": 2, "config": {"batch": {"micro_rows": 3}}}, 3, "as in the checkpoint"),
        ("auto", {"ranks": 4, "config": {"batch": {"micro_rows": 3}}}, 4, "a rank's share of a step"),
        (
            "auto",
            {"ranks": 2, "config": {"batch": {"micro_rows": 1, "micro_tokens": 64}}},
            4,
            "a rank's share of a step",
        ),
        (2, {"ranks": 2, "config": {"batch": {"micro_rows": 3}}}, 2, ""),
    ],
    ids=["fresh", "resumed", "resumed on fewer ranks", "resumed with tokens before", "given"],
)
def test_a_run_has_the_number_of_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: Any, state: Any, found: int, why: str
) -> None:
    config = case_config(Case("auto"), tmp_path)
    batch = type(config.batch)(global_rows=8, micro_rows=given)
    config = config.model_copy(update={"batch": batch})
    stores = Stores(memory_store("causal_lm"), None, config.trained_task)
    state = state and {"circumstances": state}
    run = with_micro_rows(config, None, stores, Ranks(0, 2, torch.device("cpu")), state)  # type: ignore[arg-type]
    assert run.batch.micro_rows == run.batch.known_micro_rows == found
    assert run.model_dump(mode="json")["batch"]["micro_rows"] == found
    assert capsys.readouterr().out == (f"batch.micro_rows: auto is {found} ({why})\n" if why else "")
    assert config.batch.known_micro_rows == (1 if given == "auto" else given)


def test_trials_mask_as_many_words_as_steps_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of masked words are most of a step's memory: with fewer of them, more rows would seem to fit."""
    config = case_config(Case("auto"), tmp_path)
    config = config.model_copy(
        update={
            "batch": type(config.batch)(global_rows=8, micro_rows="auto"),
            "masking": type(config.masking)(fraction=0.5),
        }
    )
    for name in ("memory_reserved", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda _device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (10**9, 10**9))
    monkeypatch.setattr(Ranks, "gather", lambda _ranks, values: [values])
    draws: list[Draw] = []
    monkeypatch.setattr("engine.micro_rows.try_rows", lambda *arguments: draws.append(arguments[-1]))
    stores = Stores(memory_store("causal_lm"), None, config.trained_task)
    run = with_micro_rows(config, _Zero(), stores, Ranks(0, 2, torch.device("cuda")), None)  # type: ignore[arg-type]
    assert run.batch.micro_rows == 4 and draws == [Draw(0, 0, 0.5)] * 3


class _Zero:
    """What is looked at of a model on a device before it is tried."""

    moment_bytes_to_come = 0
