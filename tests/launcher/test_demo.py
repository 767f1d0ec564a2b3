"""The demo's corpus, and the whole way by the real command: corpus, training, export, generated text."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import free_port, rank_environment
from repository import ROOT

from engine.run_file import dump_yaml, load_run_file
from launcher.commands import demo
from launcher.job.records import read_starts

SOURCE = '''\
"""What module number {n} is for."""


def first(value):
    """Tell about number {n}.

    More that is not wanted.
    """
    return value + {n}


class Holder:
    def second(self): # one line of body
        """Second of {n}."""
        return {n}

    def without(self):
        return None


def nothing_but_words():
    """Only a docstring, so there is nothing to describe."""


def copied():
    """The same in every module."""
    return 0
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library, with a broken file, tests and installed packages in it."""
    root = tmp_path / "library"
    for number in range(60):
        path = root / ("package" if number % 2 else "") / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOURCE.replace("{n}", str(number)))
    for name in ("test", "site-packages"):
        (root / name).mkdir()
        (root / name / "not_this.py").write_text(SOURCE.replace("{n}", "999"))
    (root / "broken.py").write_text("def (:\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(root))
    return root


def read_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_corpus_holds_out_whole_files(library: Path, tmp_path: Path) -> None:
    assert demo.write_corpus(tmp_path / "corpus") == 60
    text, text_held_out, docstrings, docstrings_held_out = map(read_lines, demo.corpus_files(tmp_path / "corpus"))
    numbers = [
        {int(number) for line in lines for number in re.findall(r"number (\d+)|of (\d+)", json.dumps(line)) for number in number if number}
        for lines in (text, text_held_out, docstrings, docstrings_held_out)
    ]  # fmt: skip
    assert numbers[0] == numbers[2]
    assert numbers[1] == numbers[3]
    assert numbers[0] | numbers[1] == set(range(60))
    assert not numbers[0] & numbers[1]
    assert 1 <= len(numbers[1]) <= 20
    held_out_prompts = {line["prompt"] for line in docstrings_held_out}
    assert not held_out_prompts & {line["prompt"] for line in docstrings}, "copied functions are not held out"


def test_docstring_records_ask_without_telling(library: Path, tmp_path: Path) -> None:
    demo.write_corpus(tmp_path / "corpus")
    records = read_lines(demo.corpus_files(tmp_path / "corpus")[2])
    for record in records:
        source = record["prompt"].removesuffix(demo.ANSWER_HEADING)
        assert source != record["prompt"]
        function = ast.parse(source).body[0]
        assert isinstance(function, ast.FunctionDef)
        assert ast.get_docstring(function) is None
        assert record["response"] not in record["prompt"]
    answers = {record["response"] for record in records}
    assert any(re.fullmatch(r"Tell about number \d+\.", answer) for answer in answers), "the first paragraph alone"
    assert not any("Only a docstring" in answer for answer in answers)


def test_corpus_is_the_same_each_time(library: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        demo.write_corpus(tmp_path / name)
    for first, second in zip(demo.corpus_files(tmp_path / "a"), demo.corpus_files(tmp_path / "b"), strict=True):
        assert first.read_bytes() == second.read_bytes()
        assert first.stat().st_size > 0


def fulltune(*arguments: str) -> subprocess.Popen[str]:
    """The real command on 2 CPU ranks."""
    return subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", *arguments],
        cwd=ROOT, env=rank_environment(2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=900)
    finally:
        process.kill()
    return process.returncode, output


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demo with three steps a stage: the run files are written first, and the demo uses them as they are."""
    folder = tmp_path_factory.mktemp("demo")
    demo._write_run_files(folder)
    for path in folder.glob("*.yaml"):
        values = load_run_file(path, ["duration.steps=3", "data.row_tokens=128", "evaluation.micro_rows=32"]).values
        path.write_text(dump_yaml(values))
    code, output = finish(fulltune("demo", "--dir", str(folder), "--debug"))
    assert code == 0, output
    return folder, output


@pytest.mark.ranks
def test_demo_goes_all_the_way(small_demo: tuple[Path, str]) -> None:
    folder, output = small_demo
    assert "run files: done before, reused" in output
    assert output.count("says the model:") == 3
    assert "tensorboard --logdir" in output
    for stage in ("1-text", "2-docstrings"):
        lines = read_lines(folder / "runs" / stage / "metrics.jsonl")
        losses = [float(line["loss"]) for line in lines if line["kind"] == "evaluation"]
        assert len(losses) == 2
        for when, loss in zip(("before", "after"), losses, strict=True):
            assert re.search(rf"stage {stage} +{when} +{loss:.3f}", output), output
        assert (folder / "models" / stage / "model.safetensors").exists()
    entropies = [float(value) for value in re.findall(r"unigram entropy +([\d.]+)", output)]
    assert len(entropies) == 2
    assert all(3.0 < value < 7.6 for value in entropies), "between a few words and all 2000 alike"


@pytest.mark.ranks
def test_demo_again_reuses_everything(small_demo: tuple[Path, str]) -> None:
    folder, first = small_demo
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    code, output = finish(fulltune("demo", "--dir", str(folder)))
    assert code == 0, output
    steps = [line for line in output.splitlines() if line.startswith("== ")]
    assert len(steps) == 7
    assert all(line.endswith("done before, reused") for line in steps), output
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    figures = re.compile(r"^ +(?:stage|unigram).*$", re.MULTILINE)
    assert figures.findall(output) == figures.findall(first)


@pytest.mark.ranks
@pytest.mark.long
def test_killed_rank_then_stop_on_request_then_the_rest(small_demo: tuple[Path, str], tmp_path: Path) -> None:
    """The real engine under the real command: 76 and its reason, then 75 with a checkpoint, then 0 from there."""
    folder, _ = small_demo
    port = str(free_port())
    run_file = str(folder / "2-docstrings.yaml")
    run_dir = tmp_path / "killed"
    process = fulltune("train", run_file, "--master-port", port, f"run_dir={run_dir}", "duration.steps=500")
    wait_for_steps(process, run_dir, 2)
    pids = {start.rank: start.pid for start in read_starts(run_dir)}
    os.kill(pids[1], signal.SIGKILL)
    code, output = finish(process)
    assert code == 76, output
    assert "rank 1 was killed" in output, output
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())

    run_dir = tmp_path / "stopped"
    process = fulltune("train", run_file, "--master-port", port, f"run_dir={run_dir}", "duration.steps=500")
    wait_for_steps(process, run_dir, 2)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    checkpoints = sorted((run_dir / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 1
    stopped_at = int(checkpoints[0].name.partition("-")[2])

    code, output = finish(
        fulltune("train", run_file, "--master-port", port, f"run_dir={run_dir}", f"duration.steps={stopped_at + 1}")
    )
    assert code == 0, output
    assert f"resuming after step {stopped_at}" in output
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))


def wait_for_steps(process: subprocess.Popen[str], run_dir: Path, steps: int) -> None:
    """Wait until the run has logged so many steps of this start."""
    deadline = time.monotonic() + 600
    metrics = run_dir / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        text = metrics.read_text() if metrics.exists() else ""
        if text.count('"kind": "train"') >= steps and len(read_starts(run_dir)) == 2:
            return
        time.sleep(0.2)
    raise AssertionError(f"no {steps} steps: {finish(process)}")
