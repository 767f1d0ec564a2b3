"""After two steps an export differs from its base as before step 1, in the weights, and in nothing else."""

import json
from pathlib import Path

import pytest
import torch
from base_folders import base_folder, run_of
from ranks import run_ranks
from safetensors.torch import load_file

from launcher.commands.export import export_run

pytestmark = pytest.mark.ranks


def test_two_steps_change_weights_alone(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "llama", older=True)
    run_file = run_of(base, tmp_path / "data")
    export_run(run_file, tmp_path / "before", None, False, "bfloat16", 10**9)
    run_ranks(1, "-m", "engine", str(run_file))
    for name, step in (("after", None), ("start", 0)):
        export_run(tmp_path / "data" / "run", tmp_path / name, step, False, "bfloat16", 10**9)
    before, after, start = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("before", "after", "start")
    )
    assert before == start
    assert {str(name) for name in before if before[name] != after[name]} == {"README.md", "model.safetensors"}
    assert before.keys() == after.keys()
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert any(not torch.equal(old[name], new[name]) for name in old)
    assert json.loads((tmp_path / "after" / "config.json").read_text())["rope_theta"] == 500000.0
