"""Exports written by all ranks from the live state: the same bytes as the export of a checkpoint, or nothing at all."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from export_worker import FAMILIES, SHARD_BYTES
from ranks import run_ranks, start_ranks
from repository import WORKERS
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaForCausalLM

from engine.export.from_checkpoint import export_checkpoint, resolve_checkpoint

WORKER = WORKERS / "export_worker.py"
pytestmark = pytest.mark.ranks


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_live_export_is_that_of_the_checkpoint_byte_for_byte(tmp_path: Path, world_size: int) -> None:
    """Tied weights, label names, a frozen parameter and a stored buffer are among the families."""
    run_ranks(world_size, WORKER, str(tmp_path), "same")
    for family in FAMILIES:
        run_dir = tmp_path / family
        for dtype in ("bfloat16", "float32"):
            out = run_dir / "offline" / dtype
            export_checkpoint(resolve_checkpoint(run_dir), run_dir / "model", None, out, dtype, SHARD_BYTES, "# card")
            ours, theirs = files(run_dir / "live" / dtype), files(out)
            assert ours.keys() == theirs.keys()
            assert len([name for name in ours if name.endswith(".safetensors")]) > 2
            for name in ours:
                assert ours[name] == theirs[name], (family, dtype, name)
            assert [path.name for path in (run_dir / "live").iterdir() if path.name.startswith(".")] == []
    names = {key for path in (tmp_path / "bart" / "live" / "float32").glob("*.safetensors") for key in load_file(path)}
    assert "final_logits_bias" in names
    assert AutoConfig.from_pretrained(tmp_path / "bert-classification/live/bfloat16").id2label == {0: "bad", 1: "good"}


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("failed")
    output = run_ranks(2, WORKER, str(folder), "fail")
    first, second = (json.loads((folder / f"fail-{rank}.json").read_text()) for rank in (0, 1))
    assert {key: value for key, value in first.items() if key != "said"} == {
        key: value for key, value in second.items() if key != "said"
    }
    assert "stored in another layout" in output
    return folder, first


@pytest.mark.parametrize("rank", [0, 1])
def test_a_flipped_bit_is_found_by_the_neighbour_and_nothing_is_published(
    failed: tuple[Path, dict[str, Any]], rank: int
) -> None:
    (kind, message, code), left = failed[1][f"bit of rank {rank}"]
    assert (kind, code) == ("StorageError", 74)
    assert "are not what was written" in message
    assert ".safetensors" in message
    assert left == []


def test_a_run_that_was_taken_over_publishes_nothing(failed: tuple[Path, dict[str, Any]]) -> None:
    (kind, _, code), left = failed[1]["taken over"]
    assert (kind, code, left) == ("CannotWriteError", 73, [])


def test_weights_alone_are_kept_as_asked_and_a_failed_save_is_only_said(failed: tuple[Path, dict[str, Any]]) -> None:
    _, outcomes = failed
    steps = {step: [int(name.removeprefix("step-")) for name in outcomes[f"weights {step}"]] for step in range(1, 9)}
    assert steps == {1: [], 2: [2], 3: [2], 4: [2], 5: [2], 6: [2, 6], 7: [2, 6], 8: [6, 8]}
    assert outcomes["weights 2 again"] == ["step-00000002", "step-00000006", "step-00000008"]
    warnings = [line for line in outcomes["said"] if line.startswith("warning")]
    assert len(warnings) == 1
    assert "no weights written after step 4" in warnings[0]
    assert any(line.startswith("weights after step 6 written to ") for line in outcomes["said"])


def test_the_last_export_replaces_an_older_one_or_leaves_it(failed: tuple[Path, dict[str, Any]]) -> None:
    folder, outcomes = failed
    assert outcomes["end"] == [[], ["export"]]
    (kind, message, code), left = outcomes["end without room"]
    assert (kind, code, left) == ("StorageError", 74, ["export"])
    assert "rank 1: " in message
    assert "File too large" in message
    assert outcomes["end again"] == [[], ["export"]]
    assert ", step 10\n" in (folder / "export" / "README.md").read_text()
    model = LlamaForCausalLM.from_pretrained(folder / "export")
    assert model.dtype == torch.bfloat16


def test_a_family_of_another_layout_is_left_to_the_checkpoint(failed: tuple[Path, dict[str, Any]]) -> None:
    folder, outcomes = failed
    assert outcomes["mixtral"] is False
    assert not (folder / "mixtral" / "export").exists()


def test_a_killed_export_is_not_there_and_a_later_one_is(tmp_path: Path) -> None:
    ranks = start_ranks(2, WORKER, tmp_path, "killed")
    output = ranks.wait()
    assert ranks.codes[1] == -signal.SIGKILL, output
    assert not (tmp_path / "export").exists()
    assert list(tmp_path.glob(".tmp-export-*"))
    run_ranks(2, WORKER, str(tmp_path), "later")
    LlamaForCausalLM.from_pretrained(tmp_path / "export")
    assert not list(tmp_path.glob(".tmp-*"))
