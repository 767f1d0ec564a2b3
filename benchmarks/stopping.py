"""How long it takes until a job has saved, ended, or goes on, after what can happen to it.

    python benchmarks/stopping.py [--quick] [--output FILE]

Two CPU ranks of a small model under `fulltune train`, disturbed while they train: a rank is asked to stop, killed,
stopped like a debugger does, and `fulltune` itself is killed. Every start is a new job; --quick does each once, else
five times, with the longest told, because a limit is for the worst case. Last line: one JSON object.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "FULLTUNE_BENCHMARK_RUN"
#: figure -> (what it is, the most it may be)
GOALS = {
    "commit_after_term_s": ("TERM to one rank until the checkpoint is committed", 25.0),
    "end_after_term_s": ("until the job has ended", None),
    "end_after_death_s": ("a rank is killed until no process of the job is left", 15.0),
    "end_after_supervisor_death_s": ("`fulltune` is killed until no process of the job is left", 15.0),
    "hang_found_s": ("a rank is stopped (SIGSTOP) until it is named and all stacks are written", 15.0),
    "restart_s": ("a rank is killed until the next step that was not there before, with --restarts", 30.0),
    "start_s": ("`fulltune train` until its first step", None),
    "beat_us": ("a sign of life, in microseconds", None),
    "supervisor_cpu_fraction": ("CPU time of `fulltune` as a share of one core", None),
}


@dataclass
class Job:
    """A running `fulltune train`."""

    process: "subprocess.Popen[bytes]"
    run_dir: Path
    began: float

    def rank_pid(self, rank: int) -> int:
        return int(json.loads((self.run_dir / "ranks" / f"rank-{rank:05d}.json").read_text())["pid"])

    def steps(self) -> list[int]:
        with contextlib.suppress(OSError):
            lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
            return [line["step"] for line in map(json.loads, lines) if line["kind"] == "train"]
        return []

    def processes(self) -> list[int]:
        """Everything that was started by this job and still runs."""
        mark, found = f"{MARK}={self.run_dir}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX" and mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found


def wait_until(happens: Callable[[], object], running: "Job", seconds: float = 300) -> float:
    """When it happened first; ends the benchmark if the job ends without it."""
    deadline = time.time() + seconds
    while not happens():
        if time.time() > deadline or running.process.poll() is not None:
            raise SystemExit(f"error: it never happened:\n{log_of(running)[-2000:]}")
        time.sleep(0.02)
    return time.time()


def make_inputs(folder: Path) -> None:
    words, draw = "the a cat dog tree runs sees green small river stone and of over".split(), random.Random(1)  # noqa: S311
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=20))}) for _ in range(400)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "launcher.cli", "tokenizer", "train", "text.jsonl", "tokenizer", "--kind",
               "byte-bpe", "--vocab-size", "300"]  # fmt: skip
    subprocess.run(command, cwd=folder, env=environment(folder), check=True, stdout=subprocess.DEVNULL)


def environment(run_dir: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", MARK: str(run_dir),
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


@contextlib.contextmanager
def job(folder: Path, name: str, *options: str, save_every_steps: int = 1000) -> Iterator[Job]:
    """A job on two ranks, killed with all that is left of it at the end."""
    values = {
        "run_dir": name, "task": "causal_lm", "seed": 5,
        "data": {"store_dir": "store", "train": "text.jsonl", "tokenizer": "tokenizer", "row_tokens": 64},
        "model": {
            "init": "random",
            "config": {"model_type": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64},
        },
        "optimizer": {"learning_rate": 1e-3}, "batch": {"global_rows": 32, "micro_rows": 4},
        "duration": {"steps": 100_000}, "checkpoint": {"save_every_steps": save_every_steps},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(values))  # JSON is YAML
    command = [sys.executable, "-m", "launcher.cli", "train", f"{name}.yaml", "--ranks", "2", *options]
    with (folder / f"{name}.log").open("wb") as log:
        began = time.time()
        run_dir = folder / name
        process = subprocess.Popen(command, cwd=folder, env=environment(run_dir), stdout=log, stderr=subprocess.STDOUT)
    running = Job(process, run_dir, began)
    try:
        yield running
    finally:
        for pid in running.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def after_term(folder: Path, name: str) -> dict[str, float]:
    with job(folder, name) as running:
        first = wait_until(running.steps, running)
        wait_until(lambda: len(running.steps()) > 20, running)
        told = time.time()
        os.kill(running.rank_pid(1), signal.SIGTERM)
        expect(running, 75)
        ended = time.time()
        (manifest,) = (running.run_dir / "checkpoints").glob("step-*/manifest.json")
    return {
        "start_s": first - running.began, "commit_after_term_s": manifest.stat().st_mtime - told,
        "end_after_term_s": ended - told,
    }  # fmt: skip


def after_deaths(folder: Path, name: str) -> dict[str, float]:
    figures = {}
    for figure, who in (("end_after_death_s", "rank"), ("end_after_supervisor_death_s", "supervisor")):
        with job(folder, f"{name}-{who}") as running:
            wait_until(lambda running=running: len(running.steps()) > 5, running)
            told = time.time()
            os.kill(running.rank_pid(0) if who == "rank" else running.process.pid, signal.SIGKILL)
            expect(running, 76 if who == "rank" else -signal.SIGKILL)
            while running.processes():
                time.sleep(0.02)
            figures[figure] = time.time() - told
    return figures


def after_hang(folder: Path, name: str) -> dict[str, float]:
    with job(folder, name) as running:
        wait_until(lambda: len(running.steps()) > 110, running)  # then the usual length of a step is known
        spent = Path(f"/proc/{running.process.pid}/stat").read_text().rpartition(")")[2].split()
        cpu = (int(spent[11]) + int(spent[12])) / os.sysconf("SC_CLK_TCK")
        share = cpu / (time.time() - running.began)
        told = time.time()
        os.kill(running.rank_pid(1), signal.SIGSTOP)
        expect(running, 76)
        found = (running.run_dir / "ranks" / "hang.txt").stat().st_mtime
    return {"hang_found_s": found - told, "supervisor_cpu_fraction": share}


def after_restart(folder: Path, name: str) -> dict[str, float]:
    with job(folder, name, "--restarts", "1", save_every_steps=5) as running:
        wait_until(lambda: len(running.steps()) > 12, running)
        told, last = time.time(), max(running.steps())
        os.kill(running.rank_pid(1), signal.SIGKILL)
        went_on = wait_until(
            lambda: "restart 1 of 1" in log_of(running) and max(running.steps(), default=0) > last + 1, running
        )
    return {"restart_s": went_on - told}


def log_of(running: Job) -> str:
    return running.run_dir.with_suffix(".log").read_text(errors="replace")


def expect(running: Job, code: int) -> None:
    got = running.process.wait(timeout=300)
    if got != code:
        raise SystemExit(f"error: the job ended with {got}, not {code}:\n{log_of(running)[-2000:]}")


def beat_microseconds(folder: Path) -> float:
    from engine.ranks import heartbeat

    heartbeat.open_page(folder / "page")
    began = time.perf_counter()
    for _ in range(100_000):
        heartbeat.beat("after forward")
    return (time.perf_counter() - began) * 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every case once, not five times")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures there too, as JSON")
    arguments = parser.parse_args()
    rounds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="fulltune-stopping-") as name:
        folder = Path(name)
        make_inputs(folder)
        for number in range(1 if arguments.quick else 5):
            for case in (after_term, after_deaths, after_hang, after_restart):
                for figure, value in case(folder, f"{case.__name__}-{number}").items():
                    rounds.setdefault(figure, []).append(value)
                    print(f"{figure}: {value:.3f}", flush=True)
        rounds["beat_us"] = [beat_microseconds(folder)]
    print(f"\n{'figure':32} {'median':>8} {'longest':>8}  limit")
    for figure, (what, limit) in GOALS.items():
        values = rounds[figure]
        shown = "" if limit is None else f"{limit:g} {'met' if max(values) <= limit else 'NOT MET'}"
        print(f"{figure:32} {statistics.median(values):8.3f} {max(values):8.3f}  {shown:12}  {what}")
    result = {figure: max(values) for figure, values in rounds.items()}
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
