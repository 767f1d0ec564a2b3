"""The benchmark of small encoders beside transformers' Trainer runs and gives every figure. Times nothing."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

pytestmark = [pytest.mark.ranks, pytest.mark.long]


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="the Trainer needs accelerate")
def test_every_figure_of_a_tiny_run(tmp_path: Path) -> None:
    record = tmp_path / "record.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "understanding.py"), "--tiny", "--work", str(tmp_path)]
    command += ["--configurations", "zero3", "--output", str(record)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    for data in ("sst2", "clinc"):
        assert figures[f"vs_trainer_{data}"] > 0
        assert figures[f"vs_trainer_{data}_zero3"] > 0
        assert figures[f"tokens_per_second_{data}_trainer"] > 0
    assert figures["padding_fraction"] == 0  # documents end to end
    assert figures["padding_fraction_trainer"] > 0.2
    assert all(name in record.read_text(encoding="utf-8") for name in figures if name.startswith("vs_"))
    assert list(tmp_path.iterdir()) == [record]  # all processes have ended, and their files are gone
