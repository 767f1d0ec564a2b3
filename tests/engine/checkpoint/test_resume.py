"""A run that was killed goes on exactly where it was, at the same and at another number of ranks.

Everything real: prepared stores, ``python -m engine`` on DeepSpeed ranks, ZeRO-3 with optimizer and
parameters offloaded, DeepSpeedCPUAdam, bf16, activation checkpointing, accumulation, dropout on.
"""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import byte_level_folder
from ranks import ROOT, free_port, kill_ranks, rank_environment, run_ranks, start_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import SAVE_EVERY, STEPS, metrics, run_file, state_bytes, wait_for_step
from transformers import AutoModelForCausalLM

from engine.config import RunConfig
from engine.row_stream import stream_rows
from engine.run_file import load_run_file
from launcher.cli import main

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    """The run nobody disturbed, started as the README says: `deepspeed` alone, no command line of ours."""
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(port),
        "--module", "engine", str(run_file(folder, "straight")),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=rank_environment(2), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    output = done.stdout
    assert done.returncode == 0, done.stderr[-4000:]
    assert "checkpoint step-00000009 committed" in output
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))
    return folder / "straight"


def test_killed_at_any_moment_and_started_again_is_bit_equal(folder: Path, straight: Path) -> None:
    path = run_file(folder, "killed", export={"at_end": True, "every_steps": SAVE_EVERY, "keep": 1})
    ranks = start_ranks(2, "-m", "engine", path)
    wait_for_step(folder / "killed", 6)
    kill_ranks(folder / "killed", signal.SIGKILL)
    ranks.wait(120)
    assert ranks.codes == [-signal.SIGKILL] * 2
    # What a kill between writing a hint and renaming it leaves; it must not be in the way of the next save.
    (folder / "killed" / "checkpoints" / ".tmp-latest-0badcafe").write_text("step-00000004")
    output = run_ranks(2, "-m", "engine", str(path))
    assert "resuming after step " in output
    expected, got = metrics(straight), metrics(folder / "killed")
    assert sorted(got) == sorted(expected) == list(range(1, STEPS + 1))
    for step in expected:
        for figure in ("loss", "gradient_norm", "learning_rate", "tokens", "epoch"):
            assert got[step][figure] == expected[step][figure], (step, figure)
    loss = "loss"
    assert metrics(folder / "killed", "evaluation")[STEPS][loss] == metrics(straight, "evaluation")[STEPS][loss]
    assert state_bytes(folder / "killed", STEPS) == state_bytes(straight, STEPS)
    check_exports(folder / "killed", output)


def check_exports(run_dir: Path, output: str) -> None:
    """What the run wrote on its way and at its end is what `fulltune export` makes of its checkpoints."""
    assert [path.name for path in (run_dir / "weights").iterdir()] == ["step-00000008"]
    for step, written in ((8, run_dir / "weights" / "step-00000008"), (STEPS, run_dir / "export")):
        assert f"weights after step {step} written to {written} in " in output
        out = run_dir / f"exported-{step}"
        assert main(["export", str(run_dir), str(out), "--step", str(step)]) == 0
        ours, theirs = ({path.name: path.read_bytes() for path in place.iterdir()} for place in (written, out))
        card = ours["README.md"].decode()
        assert ours == theirs
        assert f"\n# killed, step {step}\n" in card
        assert "pipeline_tag: text-generation" in card
        assert f"| steps | {step} |" in card
        assert re.search(r"\| \S+ \| 270 \| 270 \| ", card), card
        assert f"| tokens | {metrics(run_dir)[step]['tokens']:,.0f} |" in card
        shown = metrics(run_dir, "evaluation")[5 if step == 8 else STEPS]["loss"]
        assert f"| loss | {shown:.4f} |" in card
        assert str(run_dir.parent) not in card
        AutoModelForCausalLM.from_pretrained(out)


def test_stopping_commits_and_another_number_of_ranks_goes_on(folder: Path, straight: Path) -> None:
    """SIGTERM to one rank only: all stop together with 75. Then one rank takes over from two."""
    path = run_file(folder, "moved", evaluation={"eval_every_steps": 1})
    ranks = start_ranks(2, "-m", "engine", path)
    wait_for_step(folder / "moved", 2)
    records = sorted((folder / "moved" / "ranks").glob("rank-*.json"))
    (folder / "moved" / "ranks" / records[0].name).rename(folder / "rank-0-record.json")
    kill_ranks(folder / "moved", signal.SIGTERM)
    ranks.wait(120)
    assert ranks.codes == [75, 75]
    exits = [json.loads(file.read_text()) for file in (folder / "moved" / "ranks").glob("exit-*.json")]
    assert {record["code"] for record in exits} == {75}
    assert len(exits) == 2
    (stopped,) = (folder / "moved" / "checkpoints").glob("step-*")
    stopped_step = int(stopped.name.removeprefix("step-"))
    assert 2 <= stopped_step < STEPS
    output = run_ranks(1, "-m", "engine", str(path))
    assert f"resuming after step {stopped_step}" in output
    assert "changed since the checkpoint: ranks: 2 -> 1" in output
    expected, got = metrics(straight), metrics(folder / "moved")
    # The evaluation that fell on the stop was made up for, and judged.
    assert sorted(metrics(folder / "moved", "evaluation")) == list(range(STEPS + 1))
    losses = {step: line["loss"] for step, line in metrics(folder / "moved", "evaluation").items() if step}
    best = json.loads((folder / "moved" / "checkpoints" / "best.json").read_text())
    assert best["value"] == min(losses.values())
    # Until the stop the same bits; after it the same rows and rates, other rounding and other dropout.
    for step in range(1, STEPS + 1):
        assert got[step]["tokens"] == expected[step]["tokens"], "other rows were used"
        assert got[step]["learning_rate"] == expected[step]["learning_rate"]
        if step <= stopped_step:
            assert got[step]["loss"] == expected[step]["loss"]
        else:
            assert got[step]["loss"] == pytest.approx(expected[step]["loss"], rel=0.02)


def test_a_run_goes_on_without_the_weights_it_started_from(folder: Path) -> None:
    """Its checkpoint has replaced them: they are neither read nor needed."""
    import transformers

    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256}
    model = folder / "starting-model"
    tokens = len(json.loads((byte_level_folder(folder / "tokenizer") / "tokenizer.json").read_text())["model"]["vocab"])
    config = transformers.GPT2Config(**sizes, vocab_size=tokens + 8, bos_token_id=1, eos_token_id=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(model)
    changes: dict[str, Any] = {"model": {"path": str(model)}, "evaluation__eval_every_steps": 9}
    output = run_ranks(2, "-m", "engine", run_file(folder, "pretrained", duration={"steps": 2}, **changes))
    assert re.findall(r"weights: read ([\d.]+) GB of ([\d.]+) GB on this rank", output)
    assert "resuming" not in output
    (model / "model.safetensors").unlink()
    output = run_ranks(2, "-m", "engine", run_file(folder, "pretrained", duration={"steps": 4}, **changes))
    assert "resuming after step 2" in output
    assert "weights: read" not in output
    assert sorted(metrics(folder / "pretrained")) == [1, 2, 3, 4]


def test_a_finished_run_has_nothing_to_do_and_a_changed_seed_is_refused(folder: Path, straight: Path) -> None:
    before = (straight / "metrics.jsonl").read_text()
    run_yaml = (straight / "run.yaml").read_text()
    changed = run_file(folder, "straight", seed=4)
    output = run_ranks(1, "-m", "engine", str(changed), expected_codes=(65,))
    assert "seed was 3 and is 4 now" in output
    assert (straight / "run.yaml").read_text() == run_yaml
    assert (straight / "metrics.jsonl").read_text() == before
    output = run_ranks(1, "-m", "engine", str(run_file(folder, "straight")))
    assert "resuming after step 9" in output
    assert (
        output.count("changed since the checkpoint") == output.count("changed since the checkpoint: ranks: 2 -> 1") == 1
    )
    assert (straight / "metrics.jsonl").read_text() == before


def test_fresh_starts_over_and_keeps_what_was(folder: Path, straight: Path) -> None:
    copy = folder / "again"
    shutil.copytree(straight, copy)
    path = run_file(folder, "again", duration={"steps": 1})  # and another length: the rate's schedule is new
    output = run_ranks(1, "-m", "engine", str(path), "--fresh")
    assert "starting:" in output
    assert sorted(metrics(copy)) == [1]
    (aside,) = copy.glob("before-*")
    assert (aside / "checkpoints" / "step-00000009" / "manifest.json").is_file()


def fulltune_train(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.cli", "train", *map(str, arguments)]
    return subprocess.run(
        command, env=rank_environment(2), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )


def test_a_real_run_goes_on_through_a_hostfile(folder: Path, straight: Path) -> None:
    """`fulltune train --hostfile` and the `deepspeed --hostfile` under it, with localhost as the only host."""
    shutil.copytree(straight, folder / "hosts")
    hostfile = folder / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    port = free_port()
    options = ("--hostfile", hostfile, "--master-port", str(port), f"duration.steps={STEPS + 1}")
    done = fulltune_train(run_file(folder, "hosts"), *options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"resuming after step {STEPS}" in done.stdout
    told = [line for line in done.stdout.splitlines() if line.startswith("changed since the checkpoint: ")]
    assert told[1:] == [f"changed since the checkpoint: duration.steps: {STEPS} -> {STEPS + 1}"]
    assert told[0].startswith("changed since the checkpoint: run_dir: ")
    assert sorted(metrics(folder / "hosts")) == list(range(1, STEPS + 2))
    manifest = json.loads((folder / f"hosts/checkpoints/step-{STEPS + 1:08d}/manifest.json").read_text())
    assert manifest["written_by"]["world_size"] == 2
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))


def test_what_the_ranks_refuse_is_told_in_one_line(folder: Path) -> None:
    done = fulltune_train(run_file(folder, "refused"), "model.config.vocab_size=7")
    assert done.returncode == 65
    assert done.stderr.count("\n") == 1, done.stderr
    assert "model.config: vocabulary mismatch: the store's tokenizer has " in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (folder / "refused" / "checkpoints").exists()


def test_the_run_folder_tells_what_was_run(straight: Path) -> None:
    """The resolved run file and DeepSpeed JSON, versions and digests, and every figure of a step."""
    assert json.loads((straight / "ds_config.json").read_text())["zero_optimization"]["stage"] == 3
    versions = json.loads((straight / "versions.json").read_text())
    assert {"torch", "deepspeed", "transformers", "store_digest", "rows_digest"} <= versions.keys()
    assert RunConfig.model_validate(load_run_file(straight / "run.yaml").values).seed == 3
    events = EventAccumulator(str(straight / "tensorboard")).Reload()
    for figure in (
        "loss", "learning_rate", "gradient_norm", "tokens_per_second", "targets_per_second", "step_seconds",
        "data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds", "host_gib", "host_peak_gib",
        "padding_fraction", "epoch", "save_stall_seconds",
    ):  # fmt: skip
        values = [line[figure] for line in metrics(straight).values()]
        assert [event.value for event in events.Scalars(f"train/{figure}")] == pytest.approx(values, rel=1e-6), figure
    parts = ("data", "forward", "backward", "optimizer")
    for line in metrics(straight).values():
        assert sum(line[f"{part}_seconds"] for part in parts) == pytest.approx(line["step_seconds"])
    evaluations = metrics(straight, "evaluation")
    assert sorted(evaluations) == [0, 5, STEPS], "before the first step, each eval_every_steps, and at the end"
    assert all(line["perplexity"] == pytest.approx(math.exp(line["loss"])) for line in evaluations.values())


def test_the_order_of_rows_is_the_designed_one(straight: Path, folder: Path) -> None:
    """Tokens used per step, recomputed from the store and the seed."""
    from data_prep.token_store import TokenStore, open_rows, resolve_store
    from engine.batches import row_lengths

    store = TokenStore.open(resolve_store(folder / "stores", "train"))
    rows = open_rows(store, 256)
    used = 0
    for step, figures in sorted(metrics(straight).items()):
        used += int(row_lengths(rows, stream_rows((step - 1) * 6, 6, rows.sources, 3)).sum())
        assert figures["tokens"] == used
