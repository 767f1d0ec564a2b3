"""Faults for tests: a preloaded library that spoils storage calls (faults.c), real runs without a launcher, kills."""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from data_fixtures import byte_level_folder, sentences, write_jsonl
from ranks import ROOT, RankParent, Ranks, free_port, rank_environment, rank_parent
from repository import SUPPORT
from safetensors import safe_open

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from data_prep.token_store import open_rows, resolve_store
from engine.config import RunConfig
from engine.row_stream import stream_rows
from engine.run_file import dump_yaml

GLOBAL_ROWS, SEED = 6, 3


def cannot_run(reason: str) -> None:
    """Skip, saying why; where all tests must run (FULLTUNE_ALL_TESTS), fail."""
    if os.environ.get("FULLTUNE_ALL_TESTS"):
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def fault_library() -> Path:
    """faults.c, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        cannot_run("no C compiler")
    assert compiler is not None
    path = Path(tempfile.mkdtemp(prefix="fulltune-faults-")) / "faults.so"
    source = SUPPORT / "faults" / "faults.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(path), str(source), "-ldl"], check=True)
    return path


@functools.cache
def _fault_parent() -> RankParent:
    return RankParent(LD_PRELOAD=str(fault_library()))


def start_with_faults(world_size: int, *program: str | Path, rules: Path, log: Path) -> Ranks:
    """Ranks whose storage calls go through the library: what `rules` says is done to them and written into `log`."""
    names = {"LD_PRELOAD": str(fault_library()), "FAULTS_RULES": str(rules), "FAULTS_LOG": str(log)}
    return _fault_parent().start(world_size, *program, together=False, **names)


@contextlib.contextmanager
def small_file_system(path: Path, options: str) -> Iterator[Path]:
    """A tmpfs of its own at `path`, for example with size=8m or nr_inodes=40."""
    path.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        cannot_run("a file system of its own needs root and the right to mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def write_run_file(folder: Path, name: str, **changes: Any) -> Path:
    """A run file of a tiny GPT-2 with dropout and accumulation, its stores prepared (once a folder)."""
    data = {
        "store_dir": str(folder / "stores"), "train": str(folder / "train.jsonl"),
        "tokenizer": str(folder / "tokenizer"), "row_tokens": 128, "workers": 1,
    }  # fmt: skip
    values: dict[str, Any] = {
        "run_dir": str(folder / name), "task": "causal_lm", "seed": SEED, "data": data,
        "model": {
            "init": "random",
            "config": {
                "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
                "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
            },
        },
        "optimizer": {"learning_rate": 2e-3, "weight_decay": 0.1, "warmup_steps": 2},
        "batch": {"global_rows": GLOBAL_ROWS, "micro_rows": 1},
        "duration": {"steps": 12},
        "checkpoint": {"save_every_steps": 1, "keep_checkpoints": 2},
        "log": {"tensorboard": False},
    }  # fmt: skip
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        values[section] = value if not key else values[section] | {key: value}
    RunConfig.model_validate(values)
    if not (folder / "stores").is_dir():
        write_jsonl(folder / "train.jsonl", [{"text": text} for text in sentences(150)])
        byte_level_folder(folder / "tokenizer")
        prepare(DataConfig.model_validate(data), data, "causal_lm", progress=False)
    path = folder / f"{name}.yaml"
    path.write_text(dump_yaml(values))
    return path


class Job:
    """A training run's ranks, started as `srun` would, or by torch's launcher."""

    def __init__(
        self, run_file: Path, world_size: int, rules: str = "", launcher: bool = False, program: tuple[str, ...] = ()
    ):
        folder = Path(tempfile.mkdtemp(prefix="job-", dir=run_file.parent))
        self.log = folder / "faults.log"
        words = [*(program or ("-m", "engine")), str(run_file)]
        self._ranks: Ranks | TorchRanks
        if launcher:
            self._ranks = TorchRanks(run_file, world_size, words, folder / "output.txt")
        elif rules:
            (folder / "rules").write_text(rules)
            self._ranks = start_with_faults(world_size, *words, rules=folder / "rules", log=self.log)
        else:
            self._ranks = rank_parent().start(world_size, *words, together=False)

    @property
    def output(self) -> str:
        return self._ranks.output

    @property
    def injected(self) -> list[list[str]]:
        """[rank, call, action, path] of every fault so far."""
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []

    @property
    def runs(self) -> bool:
        """Whether any of its processes still does."""
        return bool(self.pids())

    @property
    def is_whole(self) -> bool:
        """Whether none of its processes has ended yet."""
        return set(self.pids()) >= set(self._ranks.pids)

    def pids(self) -> list[int]:
        """Its living processes; a launcher's children included, also when it has left them, after itself."""
        return [pid for pid in self._ranks.all_pids() if is_alive(pid)]

    def kill(self, pids: list[int], number: signal.Signals = signal.SIGKILL) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, timeout_seconds: float = 400) -> list[int]:
        """The exit codes; AssertionError with the output when it does not end."""
        self._ranks.wait(timeout_seconds)
        return self._ranks.codes

    def end(self, grace_seconds: float = 0) -> None:
        """Kill what is left, at once or after some time to leave by itself, as a scheduler does."""
        deadline = time.monotonic() + grace_seconds
        while time.monotonic() < deadline and self.runs:
            time.sleep(0.05)
        self._ranks.end()


class TorchRanks:
    """Ranks under torch's own launcher, a real process with its own children."""

    def __init__(self, run_file: Path, world_size: int, words: list[str], output: Path):
        self._run_file, self._output = run_file, output
        self._port = str(free_port())
        self._children: set[int] = set()
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size),
            "--master-addr", "127.0.0.1", "--master-port", self._port, *words,
        ]  # fmt: skip
        environment = rank_environment(world_size)
        with output.open("ab") as file:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        self.pids = [self._process.pid]

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    @property
    def codes(self) -> list[int]:
        return [self._process.returncode]

    def all_pids(self) -> list[int]:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{self._process.pid}/task").iterdir():
                self._children |= {int(child) for child in (task / "children").read_text().split()}
        self._process.poll()
        return [self._process.pid, *sorted(pid for pid in self._children if self._is_ours(pid))]

    def _is_ours(self, pid: int) -> bool:
        try:  # empty for one that has ended and waits to be collected
            return str(self._run_file).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    def wait(self, timeout_seconds: float) -> None:
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"did not end in {timeout_seconds} s:\n{self.output[-4000:]}") from None

    def end(self) -> None:
        while left := [pid for pid in self.all_pids() if is_alive(pid)]:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for segment in Path("/dev/shm").glob(f"deepspeed_*_{self._port}_*"):
            segment.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and it does not only wait to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def steps_done(run_dir: Path) -> int:
    """The last step in metrics.jsonl; 0 when there is none."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            return int(json.loads(line)["step"])
    return 0


def metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    """Figures by step; AssertionError when one is there twice."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert len(set(steps)) == len(steps), "a step is logged twice"
    return {line["step"]: line for line in lines if line["kind"] == "train"}


def final_state(path: Path) -> dict[str, bytes]:
    """Whole masters, moments and all else of a checkpoint by name: read with the ordinary library, joined by index."""
    slices = json.loads((path / "manifest.json").read_text())["slices"]
    pieces: dict[str, list[tuple[int, bytes]]] = {}
    for file, rows in slices.items():
        starts = {name: start for name, start, _ in rows}
        with safe_open(path / file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                data = opened.get_tensor(key)
                pieces.setdefault(key, []).append(
                    (starts[key.partition("/")[2]], data.view(torch.uint8).numpy().tobytes())
                )
    assert pieces
    return {key: b"".join(data for _, data in sorted(parts)) for key, parts in pieces.items()}


def expected_rows(run_file: Path, steps: int) -> list[list[int]]:
    """The rows of each step of the run that nobody disturbs; each once an epoch, checked here."""
    from engine.run_file import load_run_file

    values = load_run_file(run_file, []).values
    config = RunConfig.model_validate(values)
    path = resolve_store(config.data.store_dir, "train", values["data"], config.task)
    assert path is not None
    from data_prep.token_store import TokenStore

    rows = open_rows(TokenStore.open(path), config.data.row_tokens)
    whole = stream_rows(0, steps * GLOBAL_ROWS, rows.sources, SEED)
    for first in range(0, len(whole), rows.num_rows):
        epoch = whole[first : first + rows.num_rows]
        assert len(np.unique(epoch)) == len(epoch), "a row comes twice in an epoch"
    return [whole[first : first + GLOBAL_ROWS].tolist() for first in range(0, len(whole), GLOBAL_ROWS)]


def rows_hash(rows: list[int]) -> float:
    """What metrics.jsonl must say of a step that used these rows."""
    return float(sum(xxhash.xxh3_64_intdigest(int(row).to_bytes(8, "little")) & 0xFFFFFFFF for row in rows))


SPOILS = (
    "a flipped bit", "cut short", "empty", "longer", "missing", "a link", "a pipe", "a folder", "a stale one", "swapped"
)  # fmt: skip


def spoil(folder: Path, file: str, how: str, draw: random.Random, stale: Path) -> str:
    """Spoil `file` of the checkpoint `folder`, one way; returns where. `stale` is a file of the same name elsewhere."""
    path = folder / file
    data = bytearray(path.read_bytes())
    match how:
        case "a flipped bit":
            position = draw.randrange(draw.choice((len(data), min(len(data), 2048))))
            data[position] ^= 1 << draw.randrange(8)
            path.write_bytes(data)
            return f"byte {position}"
        case "cut short":
            path.write_bytes(data[: draw.choice((len(data) - 1, len(data) // 2, 8, 7))])
        case "empty":
            path.write_bytes(b"")
        case "longer":
            path.write_bytes(data + draw.randbytes(draw.choice((1, 8, 4096))))
        case "missing":
            path.unlink()
        case "a link":
            path.rename(folder.parent / "aside")
            path.symlink_to(folder.parent / "aside")
        case "a pipe":
            path.unlink()
            os.mkfifo(path)
        case "a folder":
            path.unlink()
            path.mkdir()
        case "a stale one":
            path.write_bytes(stale.read_bytes())
        case "swapped":
            alike = "*.json" if path.suffix == ".json" else "slices-*"
            other = next(other for other in sorted(folder.glob(alike)) if other != path)
            path.write_bytes(other.read_bytes())
            other.write_bytes(data)
    return ""
