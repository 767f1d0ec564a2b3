"""Checkpoints of real ranks: what is saved comes back bit by bit, wherever it is loaded, or is refused.

Each world size is started once a phase (see checkpoint_worker.py); the tests below read what the
ranks wrote. Whole tensors there are gathered by DeepSpeed, independently of the code under test.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_worker import LAST_STEP, SAVED_STEP, SETTINGS, SmallModel
from ranks import run_ranks
from repository import WORKERS
from safetensors.torch import load_file

from engine.arithmetic import list_checkpoints
from engine.checkpoint.format import best_checkpoint, read_manifest, seal, verify_checkpoint
from engine.checkpoint.reader import CheckpointReader
from engine.checkpoint.restore import find_checkpoint
from engine.checkpoint.schedule import mark_best, prune_checkpoints
from engine.errors import DataError

WORKER = WORKERS / "checkpoint_worker.py"
STATE = ("master/", "exp_avg/", "exp_avg_sq/", "buffer/")
pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 2 ranks saved, 3 and 1 loaded and saved again, and 2 went on from."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(2, WORKER, str(folder), "write", "fail", "saves", "damage")
    run_ranks(3, WORKER, str(folder), "load")
    run_ranks(1, WORKER, str(folder), "load")
    run_ranks(2, WORKER, str(folder), "resume", "load")
    return folder


def tensors(folder: Path, name: str, *prefixes: str) -> dict[str, torch.Tensor]:
    state = load_file(folder / f"{name}.safetensors")
    state.pop("buffer/not_saved", None)
    return {key: value for key, value in state.items() if not prefixes or key.startswith(prefixes)}


def facts(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert len(left) > 5
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("setting", SETTINGS)
def test_masters_start_from_fp32_and_weights_are_their_rounding(folder: Path, setting: str) -> None:
    start = tensors(folder, f"{setting}-start")
    for name, parameter in SmallModel(1).named_parameters():
        if parameter.requires_grad:
            assert torch.equal(start[name], parameter), name
    saved = tensors(folder, f"{setting}-saved")
    weights = {name.removeprefix("weight/"): value for name, value in saved.items() if name.startswith("weight/")}
    for name, weight in weights.items():
        master = saved.get(f"master/{name}")
        assert weight.dtype == (torch.float32 if setting.endswith("fp32") else torch.bfloat16)
        assert master is None or torch.equal(master.to(weight.dtype), weight), name
    assert sum(f"master/{name}" in saved for name in weights) == 6


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_resumed_run_equals_the_uninterrupted_one(folder: Path, setting: str) -> None:
    """Losses, gradient norms, masters, moments, weights: bit by bit, in another process."""
    assert_same(tensors(folder, f"{setting}-resumed"), tensors(folder, f"{setting}-last"))
    assert facts(folder, f"{setting}-resumed") == facts(folder, f"{setting}-last")
    assert facts(folder, f"{setting}-last")["optimizer_steps"] == LAST_STEP
    changed = tensors(folder, f"{setting}-saved", "master/")
    assert not any(torch.equal(changed[name], value) for name, value in tensors(folder, f"{setting}-last").items()
                   if name in changed)  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("setting", SETTINGS)
def test_any_world_size_and_setting_loads_any_checkpoint(folder: Path, setting: str, world_size: int) -> None:
    """Five settings rotate over five checkpoints, so each is loaded by three settings that did not write it."""
    name = f"{setting}-loaded-{world_size}"
    assert_same(tensors(folder, name, *STATE), tensors(folder, f"{setting}-saved", *STATE))
    loader, state = facts(folder, name)["facts"]
    assert loader != setting
    assert state == {"step": SAVED_STEP, "note": setting}
    assert facts(folder, name)["optimizer_steps"] == SAVED_STEP
    frozen = tensors(folder, name, "weight/frozen")
    assert len(frozen) == 3
    for key, value in frozen.items():  # saved in the type that was computed with
        expected = tensors(folder, f"{setting}-saved")[key]
        assert torch.equal(value.to(torch.bfloat16), expected.to(torch.bfloat16)), key


@pytest.mark.parametrize("name", ["from-3-loaded-1", "from-3-loaded-2", "from-1-loaded-2"])
def test_a_checkpoint_loaded_elsewhere_and_saved_again_is_still_the_same(folder: Path, name: str) -> None:
    assert_same(tensors(folder, name, *STATE), tensors(folder, "zero3-offload-saved", *STATE))


def test_the_folder_holds_plain_slices_of_every_element_once(folder: Path) -> None:
    """The format, read with the ordinary library alone: no padding, nothing but fp32 slices and JSON."""
    path = folder / "from-3" / "checkpoints" / f"step-{SAVED_STEP:08d}"
    names = {file.name for file in path.iterdir()}
    slices = [f"slices-{rank:05d}-of-00003.safetensors" for rank in range(3)]
    assert names == {"manifest.json", "state.json", *slices}
    manifest = json.loads((path / "manifest.json").read_text())
    saved = tensors(folder, "zero3-offload-saved")
    whole = {
        name.replace("weight/frozen", "frozen/frozen"): value
        for name, value in saved.items()
        if name.startswith(STATE) or name.startswith("weight/frozen")
    }
    found = {name: torch.full((value.numel(),), 99, dtype=value.dtype) for name, value in whole.items()}
    stored = 0
    for file in slices:
        values = load_file(path / file)
        ranges = {name: slice(start, stop) for name, start, stop in manifest["slices"][file]}
        for key, stored_slice in values.items():
            found[key][ranges[key.partition("/")[2]]] = stored_slice
            stored += stored_slice.numel()
    assert_same({name: value.view_as(whole[name]) for name, value in found.items()}, whole)
    assert stored == sum(value.numel() for value in whole.values())
    assert sum(name.startswith("frozen/") for name in whole) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_save_is_one_error_on_all_ranks_and_leaves_the_others(folder: Path, rank: int) -> None:
    outcomes = json.loads((folder / f"fail-{rank}.json").read_text())
    for failing, limit, file in ((0, 4096, "slices-00000-of-00002"), (1, 4096, "slices-00001-of-00002")):
        kind, message, code = outcomes[f"rank {failing} has {limit}"]
        assert (kind, code) == ("StorageError", 74)
        assert message.startswith(f"rank {failing}: ")
        assert f"/{file}.safetensors: File too large" in message
        assert outcomes[f"left by {failing} with {limit}"] == ["latest", "step-00000001", "step-00000002"]
    assert outcomes["stale owner"] == ["CannotWriteError", "taken over by a newer job", 73]
    assert outcomes["untouched"]
    assert outcomes["found"] == "step-00000002"
    assert outcomes["found after damage"] == "step-00000001"
    assert outcomes["found after repair"] == "step-00000002"
    assert outcomes["after pruning"] == ["latest", "step-00000002"]


def test_saves_keep_what_they_should_and_a_failure_does_not_end_the_run(folder: Path) -> None:
    written = json.loads((folder / "saves.json").read_text())
    events = {name: ([entry for entry in there if not entry.startswith(".tmp")], said)
              for name, (there, said) in written["events"].items()}  # fmt: skip
    assert events["begun 1"] == ([], None), "nothing is published before the next update"
    assert events["begun 2"] == (["1"], None)
    # Step 1 went when step 2 had been read back, before step 3 was begun; keep_checkpoints is 1.
    assert events["begun 3"] == (["2"], None)
    assert events["published 3"] == (["2", "3"], None)
    assert events["closed"] == (["2", "3"], None), "step 2 is archived"
    assert events["failed 4"] == (["2", "3"], [])
    assert events["failed 5"] == (["2", "3"], [])
    there, (kind, message, code) = events["failed 6"]
    assert (there, kind, code) == (["2", "3"], "StorageError", 74)
    assert message.startswith("rank 1: ")
    assert "File too large" in message
    assert events["saved 7"] == (["2", "3", "7"], None)
    # What the disk did not keep as written is removed; the one before had not been removed yet.
    assert events["damaged 8"] == (["2", "7"], None)
    assert events["taken over"][1] == ["CannotWriteError", "taken over by a newer job", 73]
    assert [line.split()[1] for line in written["said"]] == [f"step-{step:08d}" for step in (1, 2, 3, 7, 8)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_of_another_run_is_refused_on_all_ranks(folder: Path, rank: int) -> None:
    outcomes = json.loads((folder / f"restored-{rank}.json").read_text())
    assert outcomes["saves"] == []
    kind, message, code = outcomes["another"]
    assert (kind, code) == ("DataError", 65)
    assert "step-00000007: belongs to another run (saves, this one is another)" in message


@pytest.mark.parametrize("rank", [0, 1])
def test_damage_is_found_by_all_ranks_before_a_weight_changes(folder: Path, rank: int) -> None:
    outcomes = json.loads((folder / f"damage-{rank}.json").read_text())
    assert outcomes.pop("clean") == [None, True, 2, True]
    assert len(outcomes) == 4 * 3
    for name, (error, weights_unchanged, step, right) in outcomes.items():
        assert error is not None, name
        assert error[0] == "DataError", name
        assert name.partition(" ")[0] in error[1], error
        assert weights_unchanged, name
        assert (step, right) == (1, True), name


# What follows needs no ranks: copies of a real run folder, spoiled in one place each.


@pytest.fixture
def run_dir(folder: Path, tmp_path: Path) -> Path:
    """Two sound checkpoints: steps 7 and 9 with the same content."""
    source = folder / "zero3-offload" / "checkpoints" / "step-00000007"
    for step in (7, 9):
        target = tmp_path / "checkpoints" / f"step-{step:08d}"
        shutil.copytree(source, target)
        rewrite_manifest(target, lambda fields, step=step: fields.update(step=step))
    return tmp_path


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and seal it anew, as somebody with bad intentions would."""
    fields = json.loads((path / "manifest.json").read_text())
    del fields["xxh3_128"]
    change(fields)
    (path / "manifest.json").write_text(seal(fields))


def flip(path: Path, position: float) -> None:
    data = bytearray(path.read_bytes())
    data[min(len(data) - 1, int(len(data) * position))] ^= 0x10
    path.write_bytes(data)


FILES = ["slices-00000-of-00002.safetensors", "slices-00001-of-00002.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("position", [0.0, 0.37, 0.9999])
def test_a_flipped_bit_anywhere_refuses_the_checkpoint(
    run_dir: Path, file: str, position: float, caplog: pytest.LogCaptureFixture
) -> None:
    newest = run_dir / "checkpoints" / "step-00000009"
    assert find_checkpoint(run_dir) == newest
    flip(newest / file, position)
    found = find_checkpoint(run_dir)
    assert found is not None
    assert found.name == "step-00000007"
    assert file in caplog.text
    assert "using the older checkpoint" in caplog.text


@pytest.mark.parametrize("file", FILES)
def test_truncated_missing_and_stale_files_refuse_the_checkpoint(run_dir: Path, file: str) -> None:
    newest, older = (run_dir / "checkpoints" / name for name in ("step-00000009", "step-00000007"))
    path = newest / file
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert find_checkpoint(run_dir) == older
    path.write_bytes(data + b"\n")
    assert find_checkpoint(run_dir) == older
    path.unlink()
    assert find_checkpoint(run_dir) == older
    path.symlink_to(older / file)
    assert find_checkpoint(run_dir) == older
    path.unlink()
    path.write_bytes(data)
    assert find_checkpoint(run_dir) == newest
    (newest / "slices-00002-of-00002.safetensors").write_bytes(b"")
    assert find_checkpoint(run_dir) == older


def test_swapped_files_and_renamed_checkpoints_are_refused(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    first, second = (folder / "step-00000009" / file for file in FILES[:2])
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    with pytest.raises(DataError, match=r"slices-0000.-of-00002"):
        verify_checkpoint(folder / "step-00000009")
    (folder / "step-00000007").rename(folder / "step-00000011")
    with pytest.raises(DataError, match="belongs to step 7"):
        verify_checkpoint(folder / "step-00000011")


def test_when_all_are_refused_the_run_does_not_start_over(run_dir: Path) -> None:
    for path in list_checkpoints(run_dir):
        flip(path / FILES[0], 0.5)
    with pytest.raises(DataError, match=r"no checkpoint can be used .*step-00000009.*step-00000007.*--fresh"):
        find_checkpoint(run_dir)


def test_unfinished_folders_are_not_checkpoints(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "checkpoints" / "step-00000009").rename(run_dir / "checkpoints" / ".tmp-step-00000009-abcd")
    found = find_checkpoint(run_dir)
    assert found is not None
    assert found.name == "step-00000007"
    assert find_checkpoint(tmp_path / "another run") is None


def test_a_replacement_cut_short_is_undone_or_finished(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    newest = folder / "step-00000009"
    newest.rename(folder / ".replaced-step-00000009")
    assert find_checkpoint(run_dir) == newest
    shutil.copytree(newest, folder / ".replaced-step-00000009")
    assert find_checkpoint(run_dir) == newest
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000007", "step-00000009"]


def test_manifests_that_lie_under_a_good_seal_are_refused(run_dir: Path) -> None:
    path = run_dir / "checkpoints" / "step-00000009"
    pristine = (path / "manifest.json").read_text()
    slices = FILES[0]
    lies: dict[str, Callable[[dict[str, Any]], Any]] = {
        "a slice less": lambda fields: fields["slices"][slices].pop(),
        "a slice twice": lambda fields: fields["slices"][slices].append(fields["slices"][slices][0]),
        "a slice shifted": lambda fields: fields["slices"][slices][0].__setitem__(1, 1),
        "a larger parameter": lambda fields: fields["trained"]["scale"][1].append(2),
        "another format": lambda fields: fields.update(format="other"),
        "a file less": lambda fields: fields["files"].pop("state.json"),
        "a file outside": lambda fields: fields["files"].update({"../x.json": [0, []]}),
        "fewer hashes": lambda fields: fields["files"][slices][1].clear(),
        "no step": lambda fields: fields.pop("step"),
        "text for a number": lambda fields: fields["slices"][slices][0].__setitem__(1, "0"),
    }
    for name, lie in lies.items():
        rewrite_manifest(path, lie)
        with pytest.raises(DataError, match="manifest"):
            read_manifest(path)
            pytest.fail(name)
        (path / "manifest.json").write_text(pristine)
    assert read_manifest(path).step == 9


def test_a_file_that_is_not_what_the_index_says_is_refused_by_the_reader(run_dir: Path) -> None:
    path = run_dir / "checkpoints" / "step-00000009"
    rows = json.loads((path / "manifest.json").read_text())["slices"]
    names = {file: [row[0] for row in rows[file]] for file in rows}
    assert names[FILES[0]] != names[FILES[1]]  # the single element belongs to one rank only

    def exchange(fields: dict[str, Any]) -> None:
        slices, files = fields["slices"], fields["files"]
        slices[FILES[0]], slices[FILES[1]] = slices[FILES[1]], slices[FILES[0]]
        assert files

    rewrite_manifest(path, exchange)
    with pytest.raises(DataError, match="is not the slice that the manifest names"):
        CheckpointReader(path)


def test_pruning_keeps_the_newest_the_protected_and_the_best(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    for step in (1, 2, 3, 20):
        shutil.copytree(folder / "step-00000007", folder / f"step-{step:08d}")
    (folder / "latest").write_text("step-00000009\n")
    mark_best(run_dir, folder / "step-00000001", "accuracy", 0.5)
    mark_best(run_dir, folder / "step-00000002", "accuracy", 0.75)
    assert best_checkpoint(run_dir) == folder / "step-00000002"
    prune_checkpoints(run_dir, 1, protect=[folder / "step-00000003"])
    # Step 20 is newer than the last commit: it was refused when this run resumed, and counts for nothing.
    assert [path.name for path in list_checkpoints(run_dir)] == [
        "step-00000002", "step-00000003", "step-00000009", "step-00000020",
    ]  # fmt: skip
    (folder / "best.json").write_text('{"checkpoint": "../../etc"}')
    assert best_checkpoint(run_dir) is None
