"""The benchmark of loading, saving, resuming and exporting runs and gives every figure. Times nothing."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

pytestmark = [pytest.mark.ranks, pytest.mark.long]
NAMED = ("read_fraction", "load_vs_transformers", "load_extra_mb", "stall_s", "stall_vs_deepspeed",
         "bytes_per_parameter", "export_extra_mb", "export_vs_zero_to_fp32")  # fmt: skip


def test_every_figure_of_a_tiny_run(tmp_path: Path) -> None:
    record = tmp_path / "record.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "state.py"), "--tiny", "--work", str(tmp_path)]
    done = subprocess.run([*command, "--output", str(record)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    without_peer = importlib.util.find_spec("accelerate") is None
    assert (figures["load_vs_transformers"] is None) == without_peer
    assert (figures["ready_vs_transformers"] is None) == without_peer
    assert ("accelerate is not installed" in done.stderr) == without_peer
    assert all(figures[name] > 0 for name in NAMED if figures[name] is not None)
    assert 1 <= figures["read_fraction"] < 1.05  # of so small a model, its headers are a part
    assert 1 <= figures["loader_fraction_2"] < 1.001
    assert 12 < figures["bytes_per_parameter"] < 12.1
    assert figures["load_extra_mb"] < 1000
    assert figures["export_extra_mb"] < 1000
    assert figures["seek_1e9_s"] < 60
    assert all(name in record.read_text(encoding="utf-8") for name in figures)
    assert list(tmp_path.iterdir()) == [record]  # models and checkpoints are gone
