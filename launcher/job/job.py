"""A job: where its ranks run, and the exact `deepspeed` command line that starts them."""

import contextlib
import fcntl
import os
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CannotWriteError, ConfigError
from engine.file_modes import refuse_foreign
from engine.secrets_in_text import is_secret_value, names_a_secret
from launcher.job.hosts import Node, is_local

DEFAULT_PORT = 29500
#: Shortest silence in a step that counts as a hang; raised to 3x the p99 step time once steps are known.
LEAST_SECONDS = 15.0
#: The module that is the parent of a rank on the hosts of a hostfile.
SSH_RANK = "launcher.ssh.rank_parent"
# DeepSpeed hands these to a remote shell unquoted.
_SHELL_SAFE = re.compile(r"[\w@+=:,./-]*", re.ASCII)
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


@dataclass(frozen=True)
class Job:
    """A start of the engine: what runs where. `command` is the complete argv of `deepspeed`, or of `srun`.

    `memory_rule` is a text about the host memory that the run should need; `hang_seconds` is the shortest silence
    in a step that counts as a hang, 0 for never.
    """

    run_dir: Path
    run_file: Path
    nodes: tuple[Node, ...]
    command: tuple[str, ...]
    environment: dict[str, str]
    master_port: int
    memory_rule: str = ""
    hang_seconds: float = LEAST_SECONDS

    @property
    def num_ranks(self) -> int:
        """World size."""
        return sum(len(node.slots) for node in self.nodes)

    @property
    def starts_through_ssh(self) -> bool:
        """True if `deepspeed` starts the ranks by ssh, also those of this machine (see launcher.ssh.rank_parent)."""
        return SSH_RANK in self.command

    @property
    def master_addr(self) -> str:
        """The address at which ranks meet."""
        return self.command[self.command.index("--master_addr") + 1]

    @property
    def starts_through_srun(self) -> bool:
        """True if Slurm starts the ranks (see launcher.batch.slurm_job)."""
        return self.command[0] == "srun"


def free_port() -> int:
    """A TCP port that nobody listens on now, on any interface."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def deepspeed_program() -> str:
    """The `deepspeed` script of this very Python."""
    return str(Path(sys.executable).parent / "deepspeed")


def local_command(node: Node, master_port: int, engine_arguments: list[str], module: str = "engine") -> tuple[str, ...]:
    """The argv for all ranks on this machine, on the node's devices."""
    if node.slots == tuple(range(len(node.slots))):
        where = ["--num_gpus", str(len(node.slots))]
    else:
        where = ["--include", f"localhost:{','.join(map(str, node.slots))}"]
    address = ["--master_addr", "127.0.0.1", "--master_port", str(master_port)]
    # Not even `error`: it would only print that a rank failed, and we print which one and why.
    return (deepspeed_program(), "--log_level", "critical", *where, *address, "--module", module, *engine_arguments)


def hostfile_command(
    hostfile: Path,
    nodes: list[Node],
    selection: list[str],
    master_port: int,
    engine_arguments: list[str],
    module: str = "engine",
    run_dir: Path | None = None,
) -> tuple[str, ...]:
    """The argv for the hosts of a hostfile. `selection` is --include or --exclude with its value, or [].

    With a `run_dir`, that of a training run, ranks on several hosts get parents (see launcher.ssh.rank_parent).
    A single host needs care: DeepSpeed starts it right here whatever its name, unless forced.
    """
    where = ["--hostfile", str(hostfile), *selection]
    if all(is_local(node.name) for node in nodes) and len(nodes) == 1:
        where += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
    else:
        refuse_unsafe([*engine_arguments, str(run_dir or ""), str(Path.cwd()), sys.executable])
        if len(nodes) == 1:
            where.append("--force_multi")
        if run_dir is not None:
            # Where the first host is reached from the others is found out before the start (see check_hosts.py).
            where += ["--no_ssh_check", "--master_addr", nodes[0].name]
            ranks = str(sum(len(node.slots) for node in nodes))
            module, engine_arguments = SSH_RANK, ["--ranks", ranks, "--run-dir", str(run_dir), *engine_arguments]
    port = ["--master_port", str(master_port)]
    return (deepspeed_program(), "--log_level", "error", *where, *port, "--module", module, *engine_arguments)


def refuse_unsafe(words: list[str]) -> None:
    """Several hosts: DeepSpeed builds a shell command out of these without quoting, and pdsh replaces %h and such."""
    for word in words:
        if not _SHELL_SAFE.fullmatch(word):
            raise ConfigError(f"`{word}` would reach remote shells unquoted: use letters, digits and . _ - / = only")
    for key, value in os.environ.items():
        if key.startswith(_EXPORTED) and (names_a_secret(key) or is_secret_value(value)):
            raise ConfigError(
                f"environment variable {key} looks like a secret, and DeepSpeed would put it on ssh's "
                "command line, which everybody can read: unset it"
            )
        if key.startswith(_EXPORTED) and re.search(r"[\"$`\\\n]", value):
            raise ConfigError(
                f"environment variable {key} would reach remote shells unquoted: remove $ ` \\ and quotes"
            )


@contextlib.contextmanager
def owned_run_dir(run_dir: Path, share_with_group: bool = False) -> Iterator[None]:
    """Hold the run folder for one launcher of this machine; CannotWriteError if another has it.

    RefusedForSecurityError as `refuse_foreign` does.
    """
    refuse_foreign(run_dir, share_with_group)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / "launcher.lock").open("a")
    except OSError as error:
        raise CannotWriteError(f"run_dir {run_dir}: cannot be created: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotWriteError(f"run_dir {run_dir}: another `fulltune train` is using it") from None
        yield
