"""Room on the disk, what differs from the run before, and `fulltune verify`."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.checkpoint.format import STATE, describe, seal
from engine.checkpoint.schedule import check_space, checkpoint_bytes
from engine.errors import StorageError
from engine.sections import CheckpointSection
from engine.setup import changes, remaining_saves
from engine.tensor_files.reader import BLOCK_BYTES
from engine.tensor_files.writer import TensorSource, tensor_chunks, write_file, write_safetensors
from launcher.cli import main


def test_a_checkpoint_takes_twelve_bytes_a_trained_parameter() -> None:
    model = nn.Sequential(nn.Linear(1000, 999, bias=False), nn.Linear(100, 10, bias=False).bfloat16())
    model[1].weight.requires_grad_(False)
    exact = 999_000 * 12 + 1000 * 2 + 8
    needed = checkpoint_bytes(dict(model.named_parameters()), {"seen": torch.tensor(3)})
    assert exact < needed < exact + 1.1 * 2**20


def test_what_does_not_fit_is_told_before_it_is_begun(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    free = shutil.disk_usage(tmp_path).free
    check_space(folder, free // 4, 3)
    with pytest.raises(StorageError, match=r"3 checkpoints of .* GiB do not fit: .* GiB are free; make room"):
        check_space(folder, free // 2, 3)
    # Two that are there already are room for two: they go when newer ones come.
    for step in (1, 2):
        (folder / f"step-{step:08d}").mkdir(parents=True)
    check_space(folder, free // 2, 3)
    with pytest.raises(StorageError, match=r"1 checkpoint of"):
        check_space(folder, free * 2, 3)


def test_what_changed_is_named_by_its_key() -> None:
    before = {"config": {"optimizer": {"learning_rate": 1e-3, "betas": [0.9, 0.99]}, "seed": 1, "gone": 3}, "ranks": 2}
    now = {
        "config": {"optimizer": {"learning_rate": 2e-3, "betas": (0.9, 0.99)}, "seed": 1, "new": 5, "none": None},
        "ranks": 4,
    }
    assert changes(before, now) == [
        "optimizer.learning_rate: 0.001 -> 0.002", "new: not set -> 5", "ranks: 2 -> 4", "gone: 3 -> not set",
    ]  # fmt: skip
    assert changes(before, before) == []


@pytest.mark.parametrize(
    ("every", "step", "last", "expected"), [(4, 0, 9, 3), (4, 4, 9, 2), (4, 8, 9, 1), (4, 8, 8, 0), (None, 0, 9, 1)]
)
def test_saves_that_are_still_to_come(every: int | None, step: int, last: int, expected: int) -> None:
    class Config:
        checkpoint = CheckpointSection(save_every_steps=every)

    assert remaining_saves(Config, step, last) == expected  # type: ignore[arg-type]


def test_an_archive_that_nothing_falls_on_is_an_error() -> None:
    CheckpointSection(save_every_steps=50, archive_every_steps=100)
    for every in (30, None):
        with pytest.raises(ValueError, match=r"archive_every_steps 100 is not a multiple"):
            CheckpointSection(save_every_steps=every, archive_every_steps=100)


def write_checkpoint(run_dir: Path, step: int, run_id: str = "r") -> Path:
    """A sound checkpoint of one parameter, by the format's rules."""
    path = run_dir / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    values = torch.randn(BLOCK_BYTES // 4 + 5)
    file = "slices-00000-of-00001.safetensors"
    sources = [
        TensorSource(f"{kind}/w", torch.float32, (len(values),), lambda: tensor_chunks(values))
        for kind in ("master", "exp_avg", "exp_avg_sq")
    ]
    records = [write_safetensors(path / file, sources), write_file(path / STATE, b"{}")]
    fields = {
        "format": "fulltune-checkpoint-2", "step": step, "optimizer_steps": step, "run_id": run_id,
        "architecture": "Toy", "block_bytes": BLOCK_BYTES, "trained": {"w": describe(torch.float32, (len(values),))},
        "frozen": {}, "buffers": {}, "slices": {file: [["w", 0, len(values)]]},
        "files": {record.name: [record.size_bytes, record.blocks] for record in records},
    }  # fmt: skip
    (path / "manifest.json").write_text(seal(fields))
    return path


def test_verify_reads_everything_and_gives_a_verdict_on_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path)]) == 66
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    capsys.readouterr()
    assert main(["verify", str(tmp_path)]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        [f"step-{step:08d}", "sound"] for step in (1, 2, 3)
    ]
    victim = tmp_path / "checkpoints" / "step-00000002" / "slices-00000-of-00001.safetensors"
    with victim.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 128]))
    assert main(["verify", str(tmp_path)]) == 65
    output = capsys.readouterr()
    assert [line.split()[1] for line in output.out.splitlines()] == ["sound", "REFUSED", "sound"]
    assert str(victim) in output.out
    assert "1 of 3 cannot be used" in output.err
    write_checkpoint(tmp_path, 4, run_id="other")
    (tmp_path / "owner.json").write_text('{"run_id": "r"}')
    assert main(["verify", str(tmp_path)]) == 65
    assert "step-00000004: belongs to another run (other, this one is r)" in capsys.readouterr().out
