"""What a run writes for people and for TensorBoard."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.goodput import Stopwatch
from engine.run_log import RunLog, memory_gib
from engine.sections import LogSection

FIGURES = {"loss": 2.5, "learning_rate": 1e-3, "gradient_norm": 0.5, "tokens_per_second": 1000.0}


def log_steps(run_dir: Path, first: int, last: int, total: int = 6) -> None:
    log = RunLog(run_dir, 0, first - 1, total, LogSection(log_every_steps=2))
    for step in range(first, last + 1):
        log.train(step, FIGURES | {"loss": float(step)})
    log.evaluation(last, {"loss": 1.0, "seconds": 0.1})
    log.close()


def test_figures_reach_metrics_and_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_steps(tmp_path, 1, 4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"], line["loss"]) for line in lines] == [
        ("train", 1, 1.0), ("train", 2, 2.0), ("train", 3, 3.0), ("train", 4, 4.0), ("evaluation", 4, 1.0),
    ]  # fmt: skip
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert {"train/learning_rate", "train/gradient_norm", "evaluation/loss"} <= set(events.Tags()["scalars"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("step 2/6  loss 2.0000  lr 1.00e-03  grad 0.500  1,000 tok/s  left ")
    assert printed[1].startswith("step 4/6 ")
    assert printed[2] == "evaluation after step 4: loss 1.0000"
    assert len(printed) == 3


def test_a_terminal_gets_one_line_that_moves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    log_steps(tmp_path, 3, 5)  # resumed after step 2
    shown = capsys.readouterr()
    last = shown.err.split("\r")[-1]
    assert "5/6 [" in last, shown.err
    assert "loss 5.0000" in last
    assert "<" in last, "the remaining time"
    assert shown.err.count("\n") <= 1
    assert shown.out == "evaluation after step 5: loss 1.0000\n"


def test_a_resumed_run_replaces_what_was_lost(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, 5)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "st')  # cut short by a crash
    log_steps(tmp_path, 4, 6)  # resuming after step 3
    steps = [line["step"] for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, 1, 0, 3, LogSection())
    log.train(1, FIGURES)
    log.evaluation(1, {"loss": 1.0})
    log.say("hello")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_phases_add_up_to_the_whole() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for phase in ("data", "forward", "data"):
        torch.ones(300, 300) @ torch.ones(300, 300)
        watch.mark(phase)
    seconds = watch.seconds()
    assert set(seconds) == {"data", "forward"}
    assert all(value > 0 for value in seconds.values())


def test_memory_is_plausible() -> None:
    figures = memory_gib()
    assert 0 < figures["host_gib"] <= figures["host_peak_gib"] * 1.01 < 1000


def test_a_full_disk_delays_figures_and_ends_nothing(tmp_path: Path) -> None:
    """Real refusals of the system: for two steps no file may grow."""
    program = f"""
import resource
from pathlib import Path
from engine.sections import LogSection
from engine.run_log import RunLog
log = RunLog(Path({str(tmp_path)!r}), 0, 0, 4, LogSection(log_every_steps=9))
figures = {FIGURES!r} | {{"rows_hash": 1.0}}
log.train(1, figures)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
log.train(2, figures)
log.train(3, figures)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.train(4, figures)
log.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("metrics.jsonl cannot be written (File too large)") == 2, done.stderr
    assert done.stderr.count("TensorBoard files cannot be written") == 1, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert "train/loss" in tags
    assert "train/rows_hash" not in tags


def test_tables_and_pictures_of_an_evaluation_reach_a_file_and_tensorboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    log = RunLog(tmp_path, 0, 0, 6, LogSection())
    for step in (0, 3):
        log.report(step, {"labels": f"label    f1\nspam   0.{step}", "confusion": picture})
    log.close()
    assert (tmp_path / "evaluation.txt").read_text() == "evaluation after step 3\n\nlabels\n\nlabel    f1\nspam   0.3\n"
    assert capsys.readouterr().out == f"figures by label of the newest evaluation: {tmp_path}/evaluation.txt\n"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (image,) = [event for event in events.Images("evaluation/confusion") if event.step == 3]
    assert (image.height, image.width) == (4, 6)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), picture)
    text = events.Tensors("evaluation/labels/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert text == "    label    f1\n    spam   0.3\n", "as it is, in Markdown"


def test_other_ranks_and_runs_without_tensorboard_show_no_pictures(tmp_path: Path) -> None:
    for rank, written in ((1, False), (0, True)):
        log = RunLog(tmp_path, rank, 0, 6, LogSection(tensorboard=False))
        log.report(1, {"labels": "x", "confusion": np.zeros((2, 2, 3), dtype=np.uint8)})
        log.close()
        assert (tmp_path / "evaluation.txt").is_file() == written
    assert not (tmp_path / "tensorboard").exists()
