"""`fulltune doctor --measure`: real ranks measure, and figures are judged against what the device should give."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from doctor_cases import ROOT, make_setting

from launcher.doctor.measure import FIGURES, collect, compare, known_gpu, reference
from launcher.job.hosts import Node

H100 = {"name": "NVIDIA H100 80GB HBM3", "pcie.link.gen.max": "5", "pcie.link.width.max": "16"}


def facts(gpus: int = 0, infiniband_gbit: float = 0.0, ethernet_mbit: int | None = None) -> dict[str, Any]:
    machine = {
        "infiniband_gbit": {"mlx5_0/1": infiniband_gbit} if infiniband_gbit else {},
        "ethernet_mbit": ethernet_mbit,
    }
    return {"gpus": {"gpus": [H100] * gpus}, "machine": machine}


@pytest.mark.ranks
def test_two_ranks_measure_this_machine(tmp_path: Path) -> None:
    with ExitStack() as stack:
        make_setting(tmp_path, stack)
    command = [sys.executable, "-m", "launcher.cli", "doctor", "run.yaml", "--ranks", "2", "--measure", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout)
    measured = {figure["name"]: figure["value"] for figure in found["measurements"]}
    assert set(measured) == {
        "matrix product", "host memory", "CPU Adam", "all-gather in a node", "reduce-scatter in a node", "storage write",
    }  # fmt: skip
    assert all(0 < value < 1e5 for value in measured.values()), measured
    verdicts = {each["name"]: each for each in found["findings"]}
    assert "of" in verdicts["CPU Adam"]["found"]
    assert "no reference" in verdicts["matrix product"]["found"]
    left = [path.name for path in tmp_path.iterdir()]
    assert sorted(left) == ["records.jsonl", "run.yaml", "tokenizer"]


@pytest.mark.ranks
def test_ranks_that_fail_are_a_finding(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.cli", "doctor", "--ranks", "2", "--measure", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "none0"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    found = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    assert done.returncode == 78
    assert found["measurements"]["verdict"] == "error"
    assert "the ranks ended with code" in found["measurements"]["found"]


def rows(**figures: float) -> list[float | None]:
    return [figures.get(name.replace(" ", "_").replace("-", "_")) for name in FIGURES]


def test_figures_of_a_node_come_from_its_ranks() -> None:
    nodes = [Node("a", (0, 1)), Node("b", (0, 1))]
    measured = [
        rows(host_memory=10, CPU_Adam=100, matrix_product=5),
        rows(host_memory=14, CPU_Adam=80, matrix_product=4),
    ]
    found = collect([*measured, *measured], nodes, {"a": facts(), "b": facts()})
    assert {figure.name: figure.value for figure in found if figure.node == "b"} == {
        "host memory": 24, "CPU Adam": 180, "matrix product": 4,
    }  # fmt: skip
    (adam,) = [figure for figure in found if figure.name == "CPU Adam" and figure.node == "a"]
    assert adam.expected.value == pytest.approx(24e9 / 28 / 1e6)


@pytest.mark.parametrize(
    ("figure", "value", "verdict", "words"),
    [
        ("matrix_product", 650.0, "ok", "650 TFLOP/s, 66% of 989 (NVIDIA H100 80GB HBM3)"),
        ("matrix_product", 300.0, "warning", "30% of 989"),
        ("device_memory", 2000.0, "warning", "60% of 3,350"),
        ("to_device", 52.0, "ok", "of 63 (PCIe 5 x16)"),
        ("from_device", 12.0, "warning", "19% of 63"),
        ("all_gather_in_a_node", 330.0, "ok", "73% of 450 (NVLink)"),
        ("reduce_scatter_between_nodes", 40.0, "ok", "80% of 50 (InfiniBand, 400 Gbit/s)"),
        ("all_gather_between_nodes", 4.0, "warning", "8% of 50"),
        ("storage_write", 0.5, "ok", "no reference"),
    ],
)
def test_a_figure_is_held_against_what_the_device_should_give(
    figure: str, value: float, verdict: str, words: str
) -> None:
    found = collect([rows(**{figure: value})], [Node("a", (0,))], {"a": facts(gpus=1, infiniband_gbit=400)})
    (finding,) = compare(found)
    assert finding.verdict == verdict
    assert words in finding.found


def test_a_node_that_is_slower_than_the_others_is_named() -> None:
    nodes = [Node(name, (0,)) for name in "abc"]
    found = compare(
        collect([rows(host_memory=value) for value in (100, 60, 101)], nodes, dict.fromkeys("abc", facts()))
    )
    assert [finding.verdict for finding in found] == ["ok", "warning", "ok"]
    assert "median is 100" in found[1].to_do


def test_ethernet_is_shared_by_the_ranks_of_a_node() -> None:
    expected = reference("all-gather between nodes", facts(ethernet_mbit=100_000), 8, {})
    assert expected.value == pytest.approx(12.5 / 8)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H200", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA L4", 121), ("NVIDIA GB200", 2250)],
)  # fmt: skip
def test_gpus_are_known_by_name(name: str, tflops: float) -> None:
    gpu = known_gpu(name)
    assert gpu is not None
    assert gpu.bf16_tflops == tflops
    assert known_gpu("NVIDIA T1000") is None
