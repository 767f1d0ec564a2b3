"""benchmarks/stopping.py measures what it says: one case with the long tests, all of it with the campaigns."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT, rank_environment

SCRIPT = ROOT / "benchmarks" / "stopping.py"


@pytest.mark.ranks
@pytest.mark.long
def test_a_stop_is_measured_from_the_signal_to_the_commit(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("stopping", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    stopping = importlib.util.module_from_spec(spec)
    sys.modules["stopping"] = stopping
    spec.loader.exec_module(stopping)
    stopping.make_inputs(tmp_path)
    figures = stopping.after_term(tmp_path, "term")
    assert 0 < figures["commit_after_term_s"] <= figures["end_after_term_s"]
    assert figures["start_s"] > 0
    assert not stopping.Job(None, tmp_path / "term", 0.0).processes()


@pytest.mark.faults
def test_all_cases_once(tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), "--quick", "--output", str(tmp_path / "figures.json")]
    done = subprocess.run(words, env=rank_environment(2), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "figures.json").read_text())
    assert all(value > 0 for value in figures.values())
    assert len(figures) == 9
