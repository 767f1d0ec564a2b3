"""A node looks at itself and answers `fulltune doctor` on stdout: ``python -m launcher.doctor.node_facts``.

The program reads a line of JSON (the request), prints a line of facts, reads an address to connect to, prints how that
went, and leaves when its stdin ends. ssh, `srun` or a plain process may start it. It imports the standard library and
torch-free modules only, because it has to answer at once, also where torch is broken.
"""

import base64
import contextlib
import json
import os
import platform
import resource
import secrets
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.errors import FulltuneError
from engine.zero.direct_io import check_direct_io
from launcher.doctor.node_software import accelerator_facts, link_facts, op_facts, version_facts
from launcher.start.folder_facts import folder_facts, try_file
from launcher.supervision.out_of_memory import machine_limit_bytes, memory_cgroup_text

#: The wait for the next line or the end of stdin: the requesting machine is gone if neither comes.
_PATIENCE_SECONDS = 20.0
_CONNECT_SECONDS = 3.0
_SSH_SECONDS = 4
_LEFT_SECONDS = 60.0
_PIECE_BYTES = 720
_LIMITS = {
    "open files": resource.RLIMIT_NOFILE, "processes": resource.RLIMIT_NPROC, "locked memory": resource.RLIMIT_MEMLOCK,
    "address space": resource.RLIMIT_AS, "file size": resource.RLIMIT_FSIZE,
}  # fmt: skip
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where DeepSpeed and NCCL put their buffers)
_CAPABILITIES = {"CAP_IPC_LOCK": 14, "CAP_SYS_ADMIN": 21, "CAP_SYS_RESOURCE": 24}


def look(request: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of this node as plain values. A fact that cannot be found out is None or holds the reason."""
    return {
        "host": platform.node(),
        "versions": version_facts(),
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "kernel": platform.release(),
            "libc": " ".join(platform.libc_ver()),
            "addresses": _addresses(),
            **link_facts(),
        },
        "memory": memory_facts(),
        "limits": _limits(),
        "shared_memory": _shared_memory(),
        "gpus": accelerator_facts(),
        "ops": op_facts(bool(request.get("uses_nvme"))),
        "folders": {name: folder_facts(Path(path)) for name, path in request.get("folders", {}).items()},
        "temporary": folder_facts(Path(os.environ.get("TMPDIR") or "/tmp")),  # noqa: S108
        "direct_error": direct_error(request.get("nvme")),
        "shared": {name: _read_nonce(Path(path)) for name, path in request.get("nonces", {}).items()},
        "ssh_back": _ssh_back(request.get("ssh_back")),
    }


def direct_error(folder: str | None) -> str | None:
    """The reason why DeepSpeed could not keep optimizer states in `folder`; None if it can, and without a folder."""
    if folder is None or not Path(folder).is_dir():
        return None
    try:
        check_direct_io(Path(folder))
    except FulltuneError as error:
        return str(error)
    return None


def _read_nonce(path: Path) -> str | None:
    """The text of a file that the requesting machine has just written; None where this node does not see it."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


@contextlib.contextmanager
def _answers(request: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Make a file of this node beside each of those, for the requesting machine to find; removed afterwards."""
    made: dict[str, str] = {}
    for name, nonce in request.get("nonces", {}).items():
        path = Path(f"{nonce}.{secrets.token_hex(8)}")
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            made[name] = str(path)
    try:
        yield made
    finally:
        for answer in made.values():
            Path(answer).unlink(missing_ok=True)


def memory_facts() -> dict[str, Any]:
    """Bytes of memory: of the machine, available, and that a process may use here."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    fields = {key: int(value.split()[0]) * 1024 for key, _, value in (line.partition(":") for line in lines)}
    return {
        "total_bytes": fields["MemTotal"],
        "available_bytes": fields["MemAvailable"],
        "swap_bytes": fields["SwapTotal"],
        "limit_bytes": machine_limit_bytes(),
        "cgroup": memory_cgroup_text(),
    }


def _limits() -> dict[str, Any]:
    """The soft limits, -1 for none, and which of them do not bind this process."""
    soft = {name: resource.getrlimit(number)[0] for name, number in _LIMITS.items()}
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    return soft | {
        "capabilities": [name for name, bit in _CAPABILITIES.items() if effective >> bit & 1],
        "is_root": os.getuid() == 0,
        "threads": None if os.getuid() == 0 or soft["processes"] == -1 else _threads_of_mine(),
    }


def _threads_of_mine() -> int:
    """The number of this user's threads: each counts against the limit of processes."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid():
                count += sum(1 for _ in (folder / "task").iterdir())
    return count


def _shared_memory() -> dict[str, Any]:
    """Shared memory, and what ended runs of this user left there: files over a minute old that nobody has mapped."""
    try:
        usage = shutil.disk_usage(_SHARED_MEMORY)
    except OSError as error:
        return {"error": error.strerror, "total_bytes": 0, "free_bytes": 0, "left": [], "left_bytes": 0}
    mine = list(_old_files_of_mine())
    mapped = _mapped() if mine else set()
    left = [path for path in mine if str(path) not in mapped]
    return {
        "total_bytes": usage.total,
        "free_bytes": usage.free,
        "error": try_file(_SHARED_MEMORY),
        "left": [str(path) for path in left],
        "left_bytes": sum(path.stat().st_size for path in left if path.exists()),
    }


def _old_files_of_mine() -> Iterator[Path]:
    for path in _SHARED_MEMORY.glob("deepspeed_*"):
        with contextlib.suppress(OSError):
            status = path.stat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > _LEFT_SECONDS:
                yield path


def _mapped() -> set[str]:
    """Files of /dev/shm that a process has mapped."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
            found.update(line.split(maxsplit=5)[-1] for line in lines if "/dev/shm/" in line)  # noqa: S108
    return found


def _addresses() -> list[str]:
    """The addresses that `hostname -I` prints: DeepSpeed takes the first one of the first host for the rendezvous."""
    try:
        done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


def _ssh_back(host: str | None) -> str | None:
    """ "" if ssh from here to `host` works without a question, else its error; None without a host."""
    if host is None:
        return None
    words = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SSH_SECONDS}", "--", host, "true"]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_SSH_SECONDS + 2.5, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        return "no ssh here"
    except subprocess.TimeoutExpired:
        return f"no answer within {_SSH_SECONDS} s"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]


class _Door:
    """The rendezvous port of the first node, held open while the other nodes try to come in."""

    def __init__(self, port: int, token: str) -> None:
        self.error: str | None = None
        try:
            server = socket.create_server(("", port))
        except OSError as error:
            self.error = os.strerror(error.errno) if error.errno else str(error)
        else:
            threading.Thread(target=self._greet, args=(server, token), daemon=True).start()

    @staticmethod
    def _greet(server: socket.socket, token: str) -> None:
        while True:
            with contextlib.suppress(OSError):
                guest, _ = server.accept()
                with guest:
                    guest.sendall(token.encode())


def _connect(address: str, port: int, token: str) -> str:
    """ "" if the first node answers there with `token`, else the reason why not."""
    deadline = time.monotonic() + _CONNECT_SECONDS
    problem = ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, port), timeout=_CONNECT_SECONDS) as guest:
                guest.settimeout(_CONNECT_SECONDS)
                return "" if guest.recv(len(token)) == token.encode() else "another program answers there"
        except OSError as error:
            problem = os.strerror(error.errno) if error.errno else str(error)
        time.sleep(0.1)
    return problem


def _next_line() -> dict[str, Any]:
    """The next line of stdin as JSON; {} when stdin has ended or nothing came."""
    if not select.select([sys.stdin], [], [], _PATIENCE_SECONDS)[0]:
        return {}
    try:
        values = json.loads(sys.stdin.buffer.readline() or b"{}")
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def send(values: Mapping[str, Any]) -> None:
    """Print values in lines of less than 1024 bytes: longer ones of several nodes come out of `srun` mixed up."""
    text = base64.b64encode(json.dumps(values).encode()).decode()
    pieces = [text[start : start + _PIECE_BYTES] for start in range(0, len(text), _PIECE_BYTES)]
    for number, piece in enumerate(pieces, 1):
        print(json.dumps({"node": values["node"], "piece": piece, "is_last": number == len(pieces)}), flush=True)


def join(lines: Mapping[str, list[str]], line: str) -> dict[str, Any] | None:
    """Add a line of `send` to the pieces of its node. Returns the values when it was the last one. ValueError."""
    entry = json.loads(line)
    if not isinstance(entry, dict) or "piece" not in entry:
        raise ValueError("not from a node")
    pieces = lines[str(entry["node"])]
    pieces.append(str(entry["piece"]))
    if not entry["is_last"]:
        return None
    text = base64.b64decode("".join(pieces))
    pieces.clear()
    values = json.loads(text)
    return values if isinstance(values, dict) and "node" in values else None


def main() -> int:
    """Answer once. Always 0: the requesting machine checks the facts."""
    began = time.time()
    request = _next_line()
    node = request.get("node") or os.environ.get("SLURMD_NODENAME") or platform.node()
    is_first = node == request.get("first")
    with _answers(request) as answers:
        facts = look(request)
        door = None
        if is_first and request.get("port"):
            door = _Door(int(request["port"]), str(request.get("token")))
        facts |= {"node": node, "answers": answers, "port_error": door.error if door else None}
        send(facts | {"clock": [began, time.time()]})
        then = _next_line()
        if then.get("address") and not is_first:
            send({"node": node, "reach": _connect(str(then["address"]), int(then["port"]), str(then["token"]))})
            _next_line()
        elif then:
            send({"node": node, "reach": ""})
            _next_line()
    return 0


if __name__ == "__main__":
    sys.exit(main())
