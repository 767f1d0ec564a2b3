"""The environment ranks start with: every variable set here is set on purpose and shown by --dry-run.

A variable the user has set already wins, except where the job cannot work with another value.
"""

import os
import re
from pathlib import Path

import engine
from engine.errors import CannotWriteError, ConfigError
from engine.ranks.placement import BIND_CORES, PINNED_MEMORY
from engine.secrets_in_text import is_secret_value, names_a_secret
from engine.zero.prebuild import tool_environment

_SHARED_MEMORY_DIR = Path("/dev/shm")  # noqa: S108 (where DeepSpeed puts them)
PROJECT_DIR = Path(engine.__file__).resolve().parent.parent


def python_environment() -> dict[str, str]:
    """Make `python -m engine` import this checkout, whatever the current folder contains."""
    python_path = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": f"{PROJECT_DIR}:{python_path}" if python_path else str(PROJECT_DIR),
        "PYTHONSAFEPATH": "1",
    }


def job_environment(ranks_per_node: int, uses_gpus: bool) -> dict[str, str]:
    """The variables to add to our own environment for a job with that many ranks on this node."""
    cores = len(os.sched_getaffinity(0))
    required = {**python_environment(), **tool_environment()}
    if not uses_gpus:
        required["DS_ACCELERATOR"] = "cpu"
    preferred = {
        # Launchers that leave this alone give CPU Adam every core in every rank, or one core in all.
        "OMP_NUM_THREADS": str(max(1, cores // ranks_per_node)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if uses_gpus and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        preferred["PYTORCH_ALLOC_CONF"] = PINNED_MEMORY
    return {key: os.environ.get(key, value) for key, value in preferred.items()} | required


def remote_environment(run_dir: Path, environment: dict[str, str]) -> dict[str, str]:
    """Variables that make DeepSpeed hand our settings to the other hosts; writes run_dir/deepspeed_env.

    DeepSpeed exports PYTHON* and NCCL* itself and the lines of one file; by default it takes that
    file from the home folder and from whatever folder we stand in. Ours holds the home one's lines
    and what we set; a file in the current folder is left out. Where ops are compiled is decided on
    each host, because their CPUs may differ. DeepSpeed puts the lines on ssh's command line: ConfigError
    for one that looks like a secret. The caller removes the file when the job is over.
    """
    lines = {}
    home = Path.home() / ".deepspeed_env"
    if home.is_file():
        for number, line in enumerate(home.read_text(encoding="utf-8").splitlines(), start=1):
            key, separator, value = line.strip().partition("=")
            if not line.strip() or line.startswith("#"):
                continue
            if not separator or not re.fullmatch(r"\w+", key) or re.search(r"[\"$`\\]", value):
                raise ConfigError(f"{home}:{number}: write KEY=VALUE without quotes, $ and backquotes")
            if names_a_secret(key) or is_secret_value(value):
                raise ConfigError(
                    f"{home}:{number}: {key} looks like a secret, and DeepSpeed would put it on ssh's command line, "
                    "which everybody can read: remove the line, and set it on every host in a file that only you can "
                    "read (`hf auth login` keeps HF_TOKEN in one)"
                )
            lines[key] = value
    ours = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "TOKENIZERS_PARALLELISM")
    lines |= {key: environment[key] for key in ours if key in environment}
    lines |= {BIND_CORES: os.environ[BIND_CORES]} if os.environ.get(BIND_CORES) in ("0", "1") else {}
    path = run_dir / "deepspeed_env"
    try:
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)  # also in a shared run
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write("".join(f"{key}={value}\n" for key, value in lines.items()))
    except OSError as error:
        raise CannotWriteError(f"run_dir: cannot write {path}: {error.strerror}") from error
    return {"DS_ENV_FILE": str(path)}


def remove_shared_memory(master_addr: str, master_port: int, rank: str = "*") -> None:
    """Remove the buffers DeepSpeed's CPU collectives leave in /dev/shm, for a job that used this port, or one rank."""
    for path in _SHARED_MEMORY_DIR.glob(f"deepspeed_*_{os.getuid()}_{master_addr}_{master_port}_{rank}"):
        path.unlink(missing_ok=True)
