"""Small real runs under `fulltune train` that tests disturb, and what is left of them afterwards."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_fixtures import byte_level_folder, sentences, write_jsonl
from ranks import ROOT, free_port, rank_environment
from repository import WORKERS

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from engine.ranks.heartbeat import Beat, page_path, read_page
from engine.run_file import dump_yaml

FAULTS_WORKER = str(WORKERS / "misbehaving_rank.py")


def make_run(folder: Path, name: str, steps: int = 6, **sections: Any) -> Path:
    """Write a run file for a tiny model, prepare its store, and return the run file."""
    data = {
        "store_dir": str(folder / "stores"),
        "train": str(write_jsonl(folder / "train.jsonl", [{"text": text} for text in sentences(120)])),
        "tokenizer": str(byte_level_folder(folder / "tokenizer")),
        "row_tokens": 128,
        "workers": 1,
    }
    values = {
        "run_dir": str(folder / name), "task": "causal_lm", "seed": 3, "data": data,
        "model": {
            "init": "random",
            "config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128},
        },
        "optimizer": {"learning_rate": 2e-3},
        "batch": {"global_rows": 8, "micro_rows": 1},
        "duration": {"steps": steps},
        "checkpoint": {"save_every_steps": 1, "keep_checkpoints": 2},
    } | sections  # fmt: skip
    prepare(DataConfig.model_validate(data), data, "causal_lm", progress=False)
    path = folder / f"{name}.yaml"
    path.write_text(dump_yaml(values))
    return path


@dataclass
class FaultRun:
    """A running `fulltune train` on two ranks, with the given faults."""

    process: subprocess.Popen[str]
    run_dir: Path
    port: int

    def wait(self, timeout_seconds: float = 240) -> tuple[int, str]:
        """(exit code, all output)."""
        output, _ = self.process.communicate(timeout=timeout_seconds)
        return self.process.returncode, output

    def beats(self) -> dict[int, Beat]:
        """The ranks' pages that are there."""
        found = {rank: read_page(page_path(self.run_dir, rank)) for rank in (0, 1)}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    def wait_until(self, happens: Callable[[], bool], timeout_seconds: float = 200) -> None:
        """Until something holds; AssertionError with the output when it never does."""
        deadline = time.monotonic() + timeout_seconds
        while not happens():
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.process.kill()
                raise AssertionError(f"it never happened:\n{self.process.communicate()[0][-4000:]}")
            time.sleep(0.02)

    def wait_for_phase(self, phase: str, step: int = 0) -> None:
        """Until both ranks are in a phase, at that step or a later one."""
        self.wait_until(
            lambda: len(self.beats()) == 2 and all(b.phase == phase and b.step >= step for b in self.beats().values())
        )

    def pid(self, target: str) -> int:
        """The process of `launcher` (fulltune), `runner` and `deepspeed` (its two processes), or `rank-N`."""
        if target == "launcher":
            return self.process.pid
        children = [pid for pid in children_of(self.process.pid) if "launcher.supervision.guard" not in command_of(pid)]
        if target == "runner":
            return children[0]
        deepspeed = children_of(children[0])[0]
        if target == "deepspeed":
            return deepspeed
        return sorted(children_of(deepspeed))[int(target.removeprefix("rank-"))]

    def exits(self) -> dict[int, dict[str, Any]]:
        """The ranks' exit records."""
        paths = sorted((self.run_dir / "ranks").glob("exit-*.json"))
        return {int(path.stem.removeprefix("exit-")): json.loads(path.read_text()) for path in paths}

    def survivors(self) -> list[str]:
        """What still runs of this job, and what it left in /dev/shm."""
        mark = f"FULLTUNE_TEST_RUN={self.run_dir}".encode()
        living = [
            command_of(int(folder.name))
            for folder in Path("/proc").glob("[0-9]*")
            if mark in environment_of(int(folder.name))
        ]
        return living + [path.name for path in Path("/dev/shm").glob(f"deepspeed_*_{self.port}_*")]

    def assert_nothing_is_left(self, within_seconds: float = 15) -> None:
        """No process and no shared memory, after a short while for those that nobody waits for."""
        deadline = time.monotonic() + within_seconds
        while (left := self.survivors()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def environment_of(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
            return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


@contextlib.contextmanager
def started(
    run_file: Path, fault: str = "", *options: str, launcher_prefix: tuple[str, ...] = ()
) -> Iterator[FaultRun]:
    """Start `fulltune train` on it; whatever happens, nothing of it is left behind."""
    run_dir, port = run_file.with_suffix(""), free_port()
    environment = rank_environment(2) | {"FAULT": fault, "FULLTUNE_TEST_RUN": str(run_dir)}
    command = [*launcher_prefix, sys.executable, FAULTS_WORKER, "fulltune", "train", str(run_file), "--ranks", "2"]
    process = subprocess.Popen(
        [*command, "--master-port", str(port), *options],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    run = FaultRun(process, run_dir, port)
    try:
        yield run
    finally:
        mark = f"FULLTUNE_TEST_RUN={run_dir}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            if mark in environment_of(int(folder.name)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(folder.name), 9)
        process.wait()
