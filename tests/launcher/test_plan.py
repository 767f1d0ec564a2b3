"""``--dry-run``: what it says about batches, nodes, memory and the command, and that it writes nothing."""

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from repository import ROOT
from safetensors.numpy import save_file

from engine.errors import ConfigError, MissingInputError
from engine.tasks import TASKS
from launcher.job.hosts import Node, filter_nodes, read_hostfile
from launcher.job.run_config import load_run
from launcher.start.dry_run import count_parameters, describe_plan
from launcher.start.start import plan_job

RECIPES = sorted((ROOT / "launcher" / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run_dir: {tmp_path}/run\ntask: causal_lm\n"
        f"data: {{store_dir: {tmp_path}/store, train: {tmp_path}/t.jsonl, tokenizer: {tmp_path}, row_tokens: 128}}\n"
        "model: {config: {model_type: llama}, init: random}\noptimizer: {learning_rate: 1e-3}\n"
        "batch: {global_rows: 8}\nduration: {steps: 10}\n"
    )
    return path


def plan(path: Path, overrides: list[str], **options: object) -> str:
    run = load_run(path, overrides)
    return describe_plan(run, plan_job(run, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("global_rows", "micro_rows", "ranks", "micro_batches", "empty_ranks"),
    [(8, 1, 2, 4, 0), (8, 4, 2, 1, 0), (7, 1, 2, 4, 1), (5, 2, 4, 1, 0), (1, 1, 4, 1, 3), (9, 2, 2, 3, 1)],
)
def test_batch_arithmetic(
    tmp_path: Path, global_rows: int, micro_rows: int, ranks: int, micro_batches: int, empty_ranks: int
) -> None:
    overrides = [f"batch.global_rows={global_rows}", f"batch.micro_rows={micro_rows}"]
    text = plan(run_file(tmp_path), overrides, ranks=ranks)
    assert f"= {ranks} ranks x {micro_rows} rows x {micro_batches} micro-batches" in text
    even = global_rows % (ranks * micro_rows) == 0
    assert ("uneven" in text) == (not even)
    assert (f"{empty_ranks} rank" in text.partition("duration")[0].partition("uneven")[2]) == (empty_ranks > 0)


def test_the_resolved_deepspeed_json_is_there(tmp_path: Path) -> None:
    text = plan(run_file(tmp_path), [], ranks=2)
    values = json.loads(text[text.index("\n{") : text.index("\n}") + 2])
    assert values["zero_optimization"]["stage"] == 3
    assert values["train_micro_batch_size_per_gpu"] == 1


def test_the_command_is_complete_and_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "it's here; $(touch canary)"
    folder.mkdir()
    text = plan(
        run_file(tmp_path), [f"run_dir='{str(folder).replace(chr(39), chr(39) * 2)}'"], ranks=3, master_port=29555
    )
    line = next(line for line in text.splitlines() if "--module engine" in line)
    words = shlex.split(line)
    assert Path(words[0]).name == "deepspeed"
    assert words[words.index("engine") + 1] == str(folder / "run.yaml")
    assert words[words.index("--num_gpus") + 1] == "3"
    assert words[words.index("--master_port") + 1] == "29555"
    assert "OMP_NUM_THREADS=" in text
    assert "TORCH_EXTENSIONS_DIR=" in text


def test_nodes_of_a_hostfile(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# two machines\nalpha slots=4\nbeta slots=2\n")
    text = plan(run_file(tmp_path), [], hostfile=hosts)
    assert "nodes: 2, ranks: 6" in text
    assert "alpha: ranks 0-3 on slots 0,1,2,3" in text
    assert "beta: ranks 4-5 on slots 0,1" in text
    text = plan(run_file(tmp_path), [], hostfile=hosts, exclude="alpha:0@beta")
    assert "alpha: ranks 0-2 on slots 1,2,3" in text
    assert "beta:" not in text
    assert "--exclude alpha:0@beta" in text


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import _parse_hostfile, parse_inclusion_exclusion

    hosts = tmp_path / "hosts"
    hosts.write_text("\n# comment\nw-0.cluster   slots=3\nw1 slots=2 # fast\n")
    nodes = read_hostfile(hosts)
    theirs = _parse_hostfile(hosts.read_text().splitlines())
    assert {node.name: len(node.slots) for node in nodes} == dict(theirs)
    for include, exclude in (("", ""), ("w1", ""), ("w-0.cluster:0,2@w1:1", ""), ("", "w1"), ("", "w-0.cluster:1")):
        ours = {node.name: list(node.slots) for node in filter_nodes(nodes, include or None, exclude or None)}
        assert ours == dict(parse_inclusion_exclusion(theirs, include, exclude))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "names no host"),
        ("a slots=0", ":1:"),
        ("a slots=two", ":1:"),
        ("a slots=1\na slots=1", "twice"),
        ("a;touch$IFS slots=1", ":1:"),
        ("-oProxyCommand=x slots=1", ":1:"),
        ("$(touch) slots=1", ":1:"),
    ],
)
def test_bad_hostfiles(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError, match=fault):
        read_hostfile(path)


def test_bad_choices(tmp_path: Path) -> None:
    nodes = [Node("a", (0, 1))]
    for include, exclude in (("b", None), ("a:2", None), (None, "a"), ("a:x", None), ("a", "a"), ("a;b", None)):
        with pytest.raises(ConfigError):
            filter_nodes(nodes, include, exclude)
    with pytest.raises(MissingInputError):
        read_hostfile(tmp_path / "nowhere")
    run = load_run(run_file(tmp_path), [])
    with pytest.raises(ConfigError, match="--hostfile"):
        plan_job(run, include="a")
    with pytest.raises(ConfigError, match="at least one"):
        plan_job(run, ranks=0)


def test_parameters_are_counted_from_headers(tmp_path: Path) -> None:
    shapes = [(3, 4), (5,), (2, 2, 2)]
    for number, shape in enumerate(shapes):
        save_file({f"t{number}": np.zeros(shape, np.float32)}, tmp_path / f"model-{number}.safetensors")
    assert count_parameters(str(tmp_path)) == sum(math.prod(shape) for shape in shapes) == 25
    assert count_parameters(None) is None
    assert count_parameters(str(tmp_path / "nowhere")) is None
    (tmp_path / "model-9.safetensors").write_bytes(b"\xff" * 20)
    assert count_parameters(str(tmp_path)) is None


def test_host_memory_follows_the_measured_rule(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"w": np.zeros((1 << 20, 8), np.uint8)}, model / "model.safetensors")
    path = run_file(tmp_path)
    text = path.read_text().replace("{config: {model_type: llama}, init: random}", f"{{path: {model}}}")
    path.write_text(text)
    expected = 2**23 * 22 / 2**30 + 2 * 0.4  # fp32 accumulation, full offload, both ranks on this node
    assert f"about {expected:.1f} GiB a node" in plan(path, [], ranks=2)
    assert "host memory" not in plan(path, ["deepspeed=zero3"], ranks=2)
    on_nvme = plan(path, ["deepspeed=zero3_offload_nvme", "nvme_path=/ssd"], ranks=2)
    assert f"optimizer states: about {2**23 * 12 / 2**30:.1f} GiB a node in /ssd, removed at the end" in on_nvme
    assert "host memory" not in on_nvme


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_a_valid_run_file(recipe: Path, tmp_path: Path) -> None:
    """And its dry run says what would happen and leaves the folder it stands in empty."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "train", str(recipe), "--dry-run", "--ranks", "2", "seed=3"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "batch: " in result.stdout
    assert "prepared first" in result.stdout
    assert str(tmp_path / "runs") in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_there_is_a_recipe_for_each_task() -> None:
    assert {path.stem for path in RECIPES} >= {"pretrain", "sft", "classify", "tag"}
    assert {load_run(path, []).config.task for path in RECIPES} == set(TASKS)
