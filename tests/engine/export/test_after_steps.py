"""After two steps an export differs from its base as before step 1, in the weights, and in nothing else."""

from pathlib import Path

import pytest
import torch
from base_folders import FAMILIES, base_folder, check_export, run_of
from ranks import run_ranks
from repository import WORKERS
from safetensors.torch import load_file

from launcher.commands.export import export_run

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each family a folder with its base, and a run of two ranks that exported itself at its end."""
    folder = tmp_path_factory.mktemp("trained")
    runs = []
    for family in FAMILIES:
        runs.append(run_of(base_folder(folder / family / "base", family, older=True), folder / family / "data"))
        runs[-1].write_text(runs[-1].read_text() + "export: {at_end: true}\n")
    run_ranks(2, WORKERS / "runs_worker.py", *map(str, runs))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_change_weights_alone(trained: Path, family: str) -> None:
    base, data = trained / family / "base", trained / family / "data"
    start, end = trained / family / "start", data / "run" / "export"
    export_run(data / "run", start, 0, False, "bfloat16", 10**9)
    check_export(base, end, family, "bfloat16")
    before, after = files(start), files(end)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"README.md", "model.safetensors"}
    old, new, first = (load_file(folder / "model.safetensors") for folder in (start, end, base))
    assert old.keys() == new.keys() == first.keys()
    assert all(torch.equal(old[name], first[name].bfloat16()) for name in old)
    assert any(not torch.equal(old[name], new[name]) for name in old)


def test_a_checkpoint_exports_what_the_ranks_exported(trained: Path, tmp_path: Path) -> None:
    run = trained / "gpt_neox" / "data"
    export_run(run / "run.yaml", tmp_path / "out", None, False, "bfloat16", 10**9)
    there, here = files(tmp_path / "out"), files(run / "run" / "export")
    assert {name for name in there.keys() | here.keys() if there.get(name) != here.get(name)} <= {"README.md"}
