"""`fulltune tensorboard`, looked at in a real browser."""

import math
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from ranks import ROOT, free_port

from engine.errors import MissingInputError
from engine.run_log import LAYOUT, RunLog
from engine.sections import LogSection
from launcher.commands.tensorboard import name_runs


def write_run(run_dir: Path, learning: float) -> None:
    """Figures as a training of 200 steps writes them."""
    run_dir.mkdir(parents=True)
    log = RunLog(run_dir, 0, 0, 200, LogSection(log_every_steps=1000), load_seconds=4.0)
    for step in range(1, 201):
        stall = 0.05 if step % 50 == 0 else 0.0
        figures = {
            "loss": 2 + 6 * math.exp(-step * learning), "learning_rate": 1e-3, "gradient_norm": 0.5,
            "tokens_per_second": 9000 - 2000 * stall, "data_seconds": 0.01, "forward_seconds": 0.2,
            "backward_seconds": 0.4, "optimizer_seconds": 0.1, "step_seconds": 0.71, "save_stall_seconds": stall,
            "host_gib": 3.0, "host_peak_gib": 3.5,
        }  # fmt: skip
        log.train(step, figures)
        if step % 50 == 0:
            log.evaluation(step, {"loss": 2.2 + 6 * math.exp(-step * learning), "seconds": 0.3})
    log.ended()
    log.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """TensorBoard, started by the command for two runs."""
    folder = tmp_path_factory.mktemp("runs")
    for name, learning in (("quick", 0.05), ("slow", 0.02)):
        write_run(folder / name, learning)
    port = free_port()
    command = [sys.executable, "-m", "launcher.cli", "tensorboard", str(folder / "quick"), str(folder / "slow")]
    process = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, start_new_session=True)
    address = f"http://localhost:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                runs = urllib.request.urlopen(f"{address}/data/runs", timeout=5).read().decode()
                if "quick" in runs and "slow" in runs:
                    break
            except OSError:
                pass
            assert time.monotonic() < deadline, "TensorBoard did not come up"
            assert process.poll() is None
            time.sleep(0.3)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


def test_it_listens_on_this_machine_only(address: str) -> None:
    port = int(address.rpartition(":")[2])
    with socket.create_connection(("localhost", port), timeout=5):
        pass
    # Whoever listens everywhere answers at every address of this machine, this one too.
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=5):
        pass


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
def test_the_layout_is_what_a_browser_shows(address: str, tmp_path: Path) -> None:
    """The page of custom scalars, rendered: the project's charts in its order, a line for each run."""
    titles = list(LAYOUT["fulltune"])
    with Browser(tmp_path / "profile") as browser:
        text = browser.text_with(f"{address}/?darkMode=false#custom_scalars", [*titles, "quick", "slow"])
        browser.screenshot(tmp_path / "page.png")
    lines = text.splitlines()
    assert [line for line in lines if line in titles] == titles
    assert {"quick", "slow"} <= set(lines)
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_runs_of_one_name_are_told_apart_and_a_folder_without_events_is_refused(tmp_path: Path) -> None:
    for name in ("a/sft", "b/sft", "b/other"):
        (tmp_path / name / "tensorboard").mkdir(parents=True)
    assert list(name_runs([tmp_path / "a/sft", tmp_path / "b/other"])) == ["sft", "other"]
    assert list(name_runs([tmp_path / "a/sft", tmp_path / "b/sft", tmp_path / "b/sft"])) == ["a-sft", "b-sft"]
    with pytest.raises(MissingInputError, match="has no TensorBoard events"):
        name_runs([tmp_path / "a"])
