"""What benchmarks/state.py and its workers measure with: memory, bytes read, the page cache, and starting ranks."""

import contextlib
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
_SAMPLE_SECONDS = 0.005
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TIMEOUT_SECONDS = 1200


class Meter:
    """Seconds, peak anonymous memory and bytes read of this process within a `with` block.

    Anonymous memory is resident memory without files and shared memory (RssAnon), looked at every
    5 ms: mapped files and the page cache do not count. Bytes read are rchar of /proc/self/io, what
    the process asked of the system, cached or not; reads of mapped files do not appear there.
    """

    def __enter__(self) -> Self:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory kept for later would hide that it is used again
        self._files = [os.open(f"/proc/self/{name}", os.O_RDONLY) for name in ("statm", "io")]
        self._own_bytes = 0
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self.before_bytes = self.peak_bytes = self._anonymous_bytes()
        self._read_before = self._rchar()
        self._sampler.start()
        self._cpu_before = time.process_time()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = self.elapsed()
        self.cpu_seconds = time.process_time() - self._cpu_before
        self._ended.set()
        self._sampler.join()
        self.peak_bytes = max(self.peak_bytes, self._anonymous_bytes())
        self.read_bytes = self._rchar() - self._read_before
        gc.collect()
        self.after_bytes = self._anonymous_bytes()
        for descriptor in self._files:
            os.close(descriptor)

    def elapsed(self) -> float:
        """Seconds since the block began."""
        return time.perf_counter() - self._started

    def report(self) -> dict[str, float]:
        """Seconds; CPU seconds of all threads; bytes read; peak and lasting growth of anonymous memory in MB."""
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "read_bytes": self.read_bytes,
            "peak_mb": (self.peak_bytes - self.before_bytes) / 1e6,
            "kept_mb": (self.after_bytes - self.before_bytes) / 1e6,
        }

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, self._anonymous_bytes())

    def _look(self, number: int) -> bytes:
        data = os.pread(self._files[number], 4096, 0)
        self._own_bytes += len(data)
        return data

    def _anonymous_bytes(self) -> int:
        _, resident, shared, *_ = self._look(0).split()
        return (int(resident) - int(shared)) * _PAGE_BYTES

    def _rchar(self) -> int:
        own = self._own_bytes  # a read is counted when it is done
        return int(self._look(1).split()[1]) - own


def warm(folder: Path) -> None:
    """Bring every file below `folder` into the page cache."""
    buffer = bytearray(1 << 22)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def cool(folder: Path) -> None:
    """Write every file below `folder` to the disk and out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def rank_environment(world_size: int) -> dict[str, str]:
    """The environment of a rank of `world_size` on this machine, or of a process of its own."""
    from engine.zero.prebuild import tool_environment

    return (
        os.environ
        | tool_environment()
        | {
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world_size)),
            "PYTHONPATH": str(ROOT),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
    )


def prebuild() -> None:
    """Compile DeepSpeed's ops where that has not been done; says so."""
    subprocess.run([sys.executable, "-m", "engine.zero.prebuild"], cwd=ROOT, env=rank_environment(1), check=True)


def run_process(phase: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What `phase` of benchmarks/state_process.py reports, in a new process."""
    return _run([{}], "state_process.py", phase, arguments)[0]


def run_ranks(world_size: int, phase: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """What `phase` of benchmarks/state_worker.py reports on every rank, in new processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(world_size)]
    return _run(
        [{name: str(value) for name, value in place.items()} for place in places], "state_worker.py", phase, arguments
    )


def _run(places: list[dict[str, str]], program: str, phase: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """One process for each environment in `places`; what they reported. SystemExit with what a failed one said."""
    folder = Path(arguments["work"]) / "reports"
    folder.mkdir(exist_ok=True)
    reports = [folder / f"rank-{rank}.json" for rank in range(len(places))]
    for path in reports:
        path.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / program), phase, json.dumps(arguments | {"reports": str(folder)})]
    processes = []
    try:
        for rank, place in enumerate(places):
            with (folder / f"rank-{rank}.log").open("wb") as log:
                environment = rank_environment(len(places)) | place
                processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
                )
        until = time.monotonic() + _TIMEOUT_SECONDS
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes) or time.monotonic() > until:
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, (process, path) in enumerate(zip(processes, reports, strict=True)):
        if process.returncode or not path.is_file():
            said = (folder / f"rank-{rank}.log").read_text(errors="replace")[-4000:]
            raise SystemExit(
                f"{program} {phase}: rank {rank} of {len(places)} ended with {process.returncode}:\n{said}"
            )
    return [json.loads(path.read_text(encoding="utf-8")) for path in reports]


def write_report(arguments: dict[str, Any], rank: int, report: dict[str, Any]) -> None:
    """Hand `report` to the benchmark that started this rank or process."""
    (Path(arguments["reports"]) / f"rank-{rank}.json").write_text(json.dumps(report), encoding="utf-8")


@contextlib.contextmanager
def without_fsync() -> Iterator[None]:
    """Let fsync return at once, to see what a program takes besides waiting for the disk."""
    real = os.fsync
    os.fsync = lambda _descriptor: None  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync = real
