"""``--dry-run``: what it says about batches, nodes, memory and the command, and that it writes nothing."""

import json
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
from engine.sections import ModelSection
from engine.tasks import TASKS
from launcher.job.hostfile import read_hostfile
from launcher.job.hosts import Node, filter_nodes, local_gpus
from launcher.job.run_config import load_run
from launcher.start.dry_run import describe_plan
from launcher.start.start import plan_job
from launcher.start.weights import Weights, count_weights

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


def test_micro_rows_that_are_found_at_the_start(tmp_path: Path) -> None:
    text = plan(run_file(tmp_path), ["batch.global_rows=7", "batch.micro_rows=auto"], ranks=2)
    assert "batch: a step takes 7 rows over 2 ranks, in micro-batches of as many rows as fit, up to 4" in text
    assert "uneven" not in text


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
    ("text", "hosts"),
    [
        ("# my hosts\n\nlocalhost\tslots=2   # this one\r\n\r\n", {"localhost": 2}),
        ("a slots=1\r\nb slots=2\r\n", {"a": 1, "b": 2}),
        ("  a   slots=1", {"a": 1}),
        ("a slots=4 max_slots=8\nb slots=4 max-slots=8 # eight cores", {"a": 4, "b": 4}),
        ("10.0.0.1 slots=8\nnode_2.local slots=08#x", {"10.0.0.1": 8, "node_2.local": 8}),
        ("\t# a comment behind a tab\n \t \na\u00a0slots=3", {"a": 3}),
    ],
)  # fmt: skip
def test_hostfiles_as_people_write_them(tmp_path: Path, text: str, hosts: dict[str, int]) -> None:
    from deepspeed.launcher.runner import _parse_hostfile

    path = tmp_path / "hosts"
    path.write_bytes(text.encode())
    assert {node.name: len(node.slots) for node in read_hostfile(path)} == hosts
    with path.open() as file:
        assert dict(_parse_hostfile(file.readlines())) == hosts


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("", "names no host"),
        ("# nobody\n", "names no host"),
        ("a slots=0", ":1: .*0 slots are no rank: leave the line out"),
        ("a slots=two", ":1: .*write `a slots=N`, a whole number"),
        ("a slots=-2", "write `a slots=N`, a whole number"),
        ("a slots=2.5", "write `a slots=N`, a whole number"),
        ("a slots=1\na slots=1", ":2: host a is given twice"),
        ("a;touch$IFS slots=1", ":1: .*is no host name"),
        ("-oProxyCommand=x slots=1", ":1: .*is no host name"),
        ("$(touch) slots=1", ":1: .*is no host name"),
        ("näme slots=3", "is no host name: use letters, digits, `.` and `-`, as in `worker-0 slots=3`"),
        ("a\u200b slots=1", r"`a\\u200b` is no host name"),
        ("alice@localhost slots=2", "write `localhost slots=2`, and in ~/.ssh/config the lines `Host localhost` and `User alice`"),
        ("root@192.168.1.7", "write `192.168.1.7 slots=N`, and in ~/.ssh/config .*`User root`"),
        ("localhost", "write `localhost slots=N`, where N is the number of its ranks"),
        ("fe80::1 slots=2", "write a name, `node1 slots=2`, and in ~/.ssh/config the lines `Host node1` and `HostName fe80::1`"),
        ("[2001:db8::7]:22 slots=4", "`HostName 2001:db8::7`"),
        ("fe80::1%eth0 slots=4", "`HostName fe80::1%eth0`"),
        ("localhost lots=8", "write `localhost slots=8`"),
        ("a slot=8", "write `a slots=8`"),
        ("a Slots=8", "write `a slots=8`"),
        ("a slots = 8", "write `a slots=8`"),
        ("a slots= 8", "write `a slots=8`"),
        ("a slots: 8", "write `a slots=8`"),
        ("a 8", "write `a slots=8`"),
        ("a gpus=8", "write `a slots=8`"),
        ("a:4", "write `a slots=4`"),
        ("a:2222 slots=4", "write `a slots=4`, and in ~/.ssh/config the lines `Host a` and `Port 2222`"),
        ("a:2222", "write `a slots=N`, and in ~/.ssh/config .*`Port 2222`"),
        ("node[01-04] slots=8", r"a line for each host, the first `node01 slots=8`; `scontrol show hostnames node\[01-04\]`"),
        ("a,b slots=8", "a line for each host, the first `a slots=8`"),
        ("slots=8 a", "write `a slots=8`"),
        ("slots=8", "the host's name goes first"),
        ("node1. slots=2", "write `node1 slots=2`"),
        ("a slots=2 port=22", "nothing but a comment .* may follow, and `port=22` does"),
        ("; a comment", "a comment begins with #"),
        ("\ufeffa slots=2", "begins with a byte-order mark.*: save it as UTF-8 without one"),
    ],
)  # fmt: skip
def test_bad_hostfiles(tmp_path: Path, text: str, advice: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError, match=advice) as caught:
        read_hostfile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_bad_lines_of_a_hostfile_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("alice@a slots=2\nb slots=1\n\n# c\nc\nb slots=1\n")
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == [f"{path}:{n}:" for n in (1, 5, 6)]
    path.write_text("".join(f"node{n}\n" for n in range(50)))
    with pytest.raises(ConfigError, match="and 30 more such lines"):
        read_hostfile(path)
    path.write_bytes("a slots=2".encode("utf-16"))
    with pytest.raises(ConfigError, match="save it as UTF-8"):
        read_hostfile(path)


NVIDIA_SMI = """#!/bin/sh
[ "$1" = -L ] || { printf '0\\n1\\n2\\n'; exit; }
echo 'GPU 0: NVIDIA H200 (UUID: GPU-11111111-aaaa-0000)'
echo 'GPU 1: NVIDIA H200 (UUID: GPU-22222222-bbbb-0000)'
echo '  MIG 1g.18gb     Device  0: (UUID: MIG-33333333-cccc-0000)'
echo '  MIG 1g.18gb     Device  1: (UUID: MIG-44444444-dddd-0000)'
echo 'GPU 2: NVIDIA H200 (UUID: GPU-22225555-eeee-0000)'
"""


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, (0, 1, 2)),
        ("2,0", (2, 0)),
        ("", ()),
        ("-1", ()),
        ("1,-1,0", (1,)),
        ("NoDevFiles", ()),
        ("0, 5", (0,)),
        ("GPU-11111111-aaaa-0000", "write CUDA_VISIBLE_DEVICES=0"),
        ("GPU-22225555-eeee-0000,GPU-11111111-aaaa-0000", "write CUDA_VISIBLE_DEVICES=2,0"),
        ("gpu-11,2", "write CUDA_VISIBLE_DEVICES=0,2"),
        ("GPU-2222", "no device GPU-2222 .*GPU-22222222-bbbb-0000 is 1"),
        ("MIG-44444444-dddd-0000", r"write CUDA_VISIBLE_DEVICES=1 \(the GPUs that hold these MIG parts\)"),
        ("MIG-33333333-cccc-0000,MIG-44444444-dddd-0000", "write CUDA_VISIBLE_DEVICES=1 "),
        ("GPU-99999999", "no device GPU-99999999 .*GPU-11111111-aaaa-0000 is 0"),
        ("cuda:0", "no device cuda:0"),
    ],
)  # fmt: skip
def test_device_names_are_answered_with_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, found: tuple[int, ...] | str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if isinstance(found, tuple):
        assert local_gpus() == found
    else:
        with pytest.raises(ConfigError, match=found):
            local_gpus()


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


def test_weights_are_counted_from_headers(tmp_path: Path) -> None:
    shapes = {"model.tower.w": (3, 4), "model.tower.b": (5,), "model.head": (2, 2, 2)}
    for number, (name, shape) in enumerate(shapes.items()):
        save_file(
            {name: np.zeros(shape, np.float32 if number else np.float16)}, tmp_path / f"model-{number}.safetensors"
        )

    def count(path: Path, *freeze: str) -> Weights | None:
        return count_weights(ModelSection(path=str(path), freeze=list(freeze)))

    assert count(tmp_path) == Weights(trained=25)
    assert count(tmp_path, "tower.*") == count(tmp_path, "model.tower") == Weights(trained=8, frozen=17, wide=5)
    frozen = count(tmp_path, "tower.*")
    assert frozen is not None
    assert (frozen.checkpoint_bytes, frozen.frozen_bytes) == (8 * 12 + 12 * 2 + 5 * 4, 12 * 2 + 5 * 6)
    assert count_weights(ModelSection(init="random", config={"model_type": "llama"})) is None
    assert count(tmp_path / "nowhere") is None
    (tmp_path / "model-9.safetensors").write_bytes(b"\xff" * 20)
    assert count(tmp_path) is None


def test_frozen_weights_have_no_optimizer_states(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    million = np.zeros((1 << 10, 1 << 10), np.float16)
    save_file({"tower.w": million, "layers.w": million}, model / "model.safetensors")
    path = run_file(tmp_path)
    path.write_text(
        path.read_text().replace("{config: {model_type: llama}, init: random}", f"{{path: {model}, freeze: [tower]}}")
    )
    expected = (2**20 * 22 + 2**20 * 2) / 2**30 + 2 * 0.4
    assert f"about {expected:.1f} GiB a node ((1,048,576 parameters x 22 bytes + 0.0 GiB frozen) x 2/2 ranks" in plan(
        path, [], ranks=2
    )


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
    assert {path.stem for path in RECIPES} >= {"pretrain", "sft", "classify", "tag", "roles", "answer"}
    assert {load_run(path, []).config.task for path in RECIPES} == set(TASKS)
