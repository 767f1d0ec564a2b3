"""Compiles the DeepSpeed ops a job needs, once, before ranks start: ``python -m engine.zero.prebuild``.

DeepSpeed compiles them on first use, in every rank, under a lock of torch's that waits for ever
after a killed build. Here one process builds under a lock the kernel releases, says how long it
has been at it, and removes such a lock. Imports no torch until something must be built.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from engine.errors import CannotWriteError, ConfigError, FulltuneError

# Builder of DeepSpeed -> the folder and library it leaves.
_CPU_OPS = {"ShareMemCommBuilder": "deepspeed_shm_comm", "CPUAdamBuilder": "cpu_adam"}
_CUDA_OPS = {"CPUAdamBuilder": "cpu_adam"}
_NVME_OPS = {"PinMemoryBuilder": "pin_memory", "AsyncIOBuilder": "async_io"}
_STALE_SECONDS = 60.0


def extensions_dir() -> Path:
    """Where compiled ops of this CPU type and these versions are kept (``TORCH_EXTENSIONS_DIR`` wins).

    They are compiled with ``-march=native``, so nodes that share a home need a folder each CPU type.
    """
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    versions = "-".join(f"{name}{importlib.metadata.version(name)}" for name in ("torch", "deepspeed"))
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    try:
        home = Path.home().absolute()
    except RuntimeError:
        raise ConfigError(
            "the home folder of this user is not known, and compiled ops are kept below it: set HOME, or "
            "TORCH_EXTENSIONS_DIR to a folder of yours"
        ) from None
    return home / ".cache" / "fulltune" / f"{python}-{versions}-{_build_key()}"


def tool_environment() -> dict[str, str]:
    """The variables every process that may load an op needs: where ops are kept, and which ninja comes first.

    Two versions of ninja do not read each other's log, and each would build everything again.
    """
    folder, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    first = path if path.split(os.pathsep)[0] == folder else f"{folder}{os.pathsep}{path}"
    return {"TORCH_EXTENSIONS_DIR": str(extensions_dir()), "PATH": first}


def load_ops_once(uses_gpus: bool, uses_nvme: bool = False) -> None:
    """Set this process up for the compiled ops, compiling what is missing; ranks of a node wait for the first."""
    import cpuinfo

    os.environ.update(tool_environment())
    # DeepSpeed asks for the CPU's features at every load, and every answer takes more than a second.
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    if missing_ops(extensions_dir(), uses_gpus, uses_nvme):
        prebuild(extensions_dir(), uses_gpus, uses_nvme)
    if uses_nvme:
        _check_libaio()


def _build_key() -> str:
    """Short name of what a compiled op depends on: the CPU and its instructions, compiler, headers."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = ("model name", "cpu family", "model", "flags", "Features", "CPU part")
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in fields:
            facts.setdefault(key.strip(), " ".join(sorted(value.split())))
    # Another compiler or folder of headers means other commands: ninja would build again, in every rank.
    commands = (os.environ.get("CXX"), sysconfig.get_path("platlib"), sysconfig.get_path("include"))
    text = repr((platform.machine(), sorted(facts.items()), commands))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def missing_ops(folder: Path, uses_gpus: bool, uses_nvme: bool = False) -> list[str]:
    """Builders whose library is not in `folder`, or whose build was broken off."""
    ops = (_CUDA_OPS if uses_gpus else _CPU_OPS) | (_NVME_OPS if uses_nvme else {})
    return [
        builder
        for builder, name in ops.items()
        if not (folder / name / f"{name}.so").is_file() or (folder / name / "lock").exists()
    ]


def prebuild(folder: Path, uses_gpus: bool, uses_nvme: bool = False) -> None:
    """Build what `missing_ops` names; one process of a node at a time, others wait.

    Prints progress; silent when there is nothing to do. CannotWriteError as `make_ops_dir`.
    """
    make_ops_dir(folder)
    with (folder / "prebuild.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with _progress("another process is building the DeepSpeed ops"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        builders = missing_ops(folder, uses_gpus, uses_nvme)
        if "AsyncIOBuilder" in builders:
            _check_libaio()
        for builder in builders:
            _build(builder, folder / (_CPU_OPS | _NVME_OPS)[builder])


def make_ops_dir(folder: Path) -> None:
    """Make the folder for compiled ops. CannotWriteError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else "Permission denied"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        where = "" if os.environ.get("TORCH_EXTENSIONS_DIR") else ", below HOME"
        raise CannotWriteError(
            f"{folder}: cannot be written ({reason}), and DeepSpeed's compiled ops are kept there{where}: set "
            "TORCH_EXTENSIONS_DIR to a folder of yours"
        )


def _check_libaio() -> None:
    """ConfigError unless programs can be linked with libaio here, which DeepSpeed tries at every start too."""
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().create_op_builder("AsyncIOBuilder").has_function("io_submit", ("aio",)):
        raise ConfigError("to keep optimizer states on NVMe DeepSpeed needs libaio: apt-get install libaio-dev")


def _build(builder_name: str, op_dir: Path) -> None:
    _remove_stale_lock(op_dir / "lock")
    if (op_dir / f"{op_dir.name}.so").is_file() and not (op_dir / "lock").exists():
        return
    with _progress(f"building {op_dir.name} for this machine, once"):
        from deepspeed.accelerator import get_accelerator

        builder = get_accelerator().create_op_builder(builder_name)
        try:
            builder.load(verbose=False)
        except Exception as error:
            last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise FulltuneError(
                f"DeepSpeed's {op_dir.name} cannot be compiled here: {last}; needed: a C++ compiler, ninja and "
                f"Python's headers (apt-get install g++ python3-dev); see {op_dir}"
            ) from error


def broken_locks(folder: Path) -> list[Path]:
    """Lock files of torch's under `folder` whose build was killed: whoever waits for one waits for ever."""
    return [lock for lock in sorted(folder.glob("*/lock")) if _is_broken(lock)]


def _is_broken(lock: Path) -> bool:
    """True if the process that made a lock file is gone, as far as can be known.

    A builder keeps the file open. One on another node (a shared home) cannot be seen from here, but
    ranks that merely load an op hold the lock for moments, so an old file has no living owner.
    """
    try:
        age_seconds = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return False
    return age_seconds > _STALE_SECONDS and not _is_open_somewhere(lock)


def _remove_stale_lock(lock: Path) -> None:
    """Remove torch's lock file when the process that made it is gone; wait while that is unclear."""
    while lock.exists():
        if _is_broken(lock):
            print(f"removing {lock}: the build that made it was killed", flush=True)
            lock.unlink(missing_ok=True)
            return
        time.sleep(0.5)


def _is_open_somewhere(path: Path) -> bool:
    """True if a process on this machine, as far as we may look, has `path` open."""
    wanted = str(path.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if str(link.readlink()) == wanted:
                return True
    return False


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """Say `what` and how long it has taken: one line that moves on a terminal, a line now and then in a log."""
    done = threading.Event()
    start = time.monotonic()
    terminal = sys.stdout.isatty()

    def tick() -> None:
        while not done.wait(1.0 if terminal else 15.0):
            elapsed = time.monotonic() - start
            print(f"{what} ... {elapsed:.0f} s", end="\r" if terminal else "\n", flush=True)

    print(f"{what} ...", end="\r" if terminal else "\n", flush=True)
    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
        print(f"{what} ... {time.monotonic() - start:.0f} s", flush=True)


def main() -> int:
    """Build for the accelerator DeepSpeed would choose; 0, or 70 with one line on stderr.

    ``--where`` builds nothing and prints the folder, to be exported as TORCH_EXTENSIONS_DIR.
    ``--nvme`` builds also what optimizer states on NVMe need.
    """
    os.umask(os.umask(0o077) | 0o022)  # others may use a shared folder of ops, never change them
    if sys.argv[1:] == ["--where"]:
        print(extensions_dir())
        return 0
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        uses_gpus = False
    else:
        import torch

        uses_gpus = torch.cuda.is_available()
    if not uses_gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        load_ops_once(uses_gpus, uses_nvme="--nvme" in sys.argv[1:])
        print("ops ready", flush=True)
    except FulltuneError as error:
        print(f"fulltune: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
