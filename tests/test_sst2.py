"""The worked example of full-parameter fine-tuning: the shipped recipe on a thousand sentences of SST-2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_fixtures import SAMPLES
from ranks import rank_environment

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.ranks
@pytest.mark.skipif(not (SAMPLES / "classification" / "sst2").is_dir(), reason="no sample data here")
def test_a_small_bert_with_random_weights_learns_sst2(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "sst2.py"), "--seeds", "3", "--work", str(tmp_path)]
    environment = rank_environment(2) | {"FULLTUNE_SAMPLES": str(SAMPLES), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["scores"]) == 3
    assert result["mean"] >= 0.60
    assert 0.60 < result["bag_of_words"] < 0.80
