"""Gradients of real DeepSpeed ranks equal those of one plain-torch process.

Sentence 2 of the numerics: a step's gradient is the sum over targets of the global batch divided
by their number, however rows fall on ranks and micro-batches, with offload and activation
checkpointing on and off.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from equivalence_cases import GLOBAL_ROWS, cases, documents_a_row, reference_gradients, task_of
from memory_stores import memory_store
from ranks import run_ranks
from repository import WORKERS
from safetensors.torch import load_file

from engine.row_stream import stream_rows

WORKER = WORKERS / "equivalence_worker.py"


@cache
def reference(family: str, frozen: tuple[str, ...]):
    _, rows = memory_store(task_of(family), documents_a_row(family))
    used = stream_rows(0, GLOBAL_ROWS, rows.sources, seed=5)
    assert len(np.unique(used)) > 1
    return reference_gradients(family, used, frozen)


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_equal_one_plain_process(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, str(WORKER), str(tmp_path))
    compared = 0
    for case in cases(world_size):
        expected, losses = reference(case.family, case.freeze)
        gradients = load_file(tmp_path / f"{case.name}-{world_size}.safetensors")
        figures = json.loads((tmp_path / f"{case.name}-{world_size}.json").read_text())
        assert {name: figures[name] for name in losses} == pytest.approx(losses, rel=1e-5), case
        assert ("balancing_loss" in figures, "z_loss" in figures) == (case.family == "mixtral", case.family == "bamba")
        routers = [norm for name, norm in ((name, float(g.norm())) for name, g in expected.items()) if ".gate." in name]
        assert case.family != "mixtral" or min(routers) > 0
        assert gradients.keys() == expected.keys(), case
        # Some gradients are zero in exact arithmetic (a bias of attention keys): only rounding is left of
        # them, which is held against the size of the whole gradient.
        whole_norm = float(sum(gradient.norm() ** 2 for gradient in expected.values()) ** 0.5)
        assert figures["gradient_norm"] == pytest.approx(whole_norm, rel=1e-5), case
        if case.clipping:
            assert whole_norm > 2 * case.clipping
            expected = {name: gradient * case.clipping / whole_norm for name, gradient in expected.items()}
        floor = 1e-3 * whole_norm
        for name, gradient in gradients.items():
            error = float((gradient - expected[name]).norm() / expected[name].norm().clamp_min(floor))
            assert error <= 1e-5, f"{case} {name}: relative error {error:.2e}"
            compared += 1
    assert compared > 100
