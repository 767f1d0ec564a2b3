"""The data preparation benchmark runs and gives every figure, or null where a peer is not installed. Times nothing."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from data_fixtures import SAMPLES
from repository import ROOT

RATIOS = {
    "text_vs_ceiling": ("tokenizers",),
    "chat_vs_trl": ("trl",),
    "chat_fast_vs_trl": ("trl", "gigatoken"),
    "text_fast_vs_ceiling": ("gigatoken",),
}
SECONDS = ("pack_1e7_8k_seconds", "pack_1e7_128k_seconds", "repack_1e6_seconds", "first_document_seconds",
           "gather_8192_microseconds", "seek_1e9_milliseconds")  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")
def test_every_figure_of_a_small_run(tmp_path: Path) -> None:
    record = tmp_path / "record.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "prepare.py"), "--quick", "--scale", "0.02", "--rounds", "1"]
    done = subprocess.run([*command, "--output", str(record)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    for name, packages in RATIOS.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            assert figures[name] is None
            assert all(f"{package} is not installed" in done.stderr for package in missing)
        else:  # so little input may not show beside start-up, and then it has to say so
            assert figures[name] is not None or "too little input" in done.stderr
            assert figures[name] is None or figures[name] > 0
    assert all(figures[name] >= 0 for name in SECONDS)
    assert 0.999 < figures["fill_8192"] <= 1
    assert 2.125 < figures["bytes_per_token"] < 2.25
    assert 0.5 < figures["peak_rss_ratio"] < 10
    assert figures["identical_bytes_1_2_5_workers"] is True
    assert figures["heavy_imports"] == []
    assert all(name in record.read_text(encoding="utf-8") for name in figures if name in done.stdout)
