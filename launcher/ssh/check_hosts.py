"""Before ranks start on several hosts: does every host answer, and is it what the hostfile promises?

`check_hosts` runs ``python -m launcher.ssh.check_hosts FILE`` on all hosts at once, which prints one line of JSON. FILE
was just written into the run folder: a host that can read it shares that folder. A wrong host is named in one line
before DeepSpeed starts, which would start the other hosts and let them wait.
"""

import contextlib
import importlib.metadata
import ipaddress
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CannotWriteError, ConfigError
from launcher.job.hosts import Node, local_gpus
from launcher.job.job import free_port, refuse_unsafe
from launcher.ssh.ranks import SSH_OPTIONS

#: These packages must have the same version on all hosts.
_PACKAGES = ("torch", "deepspeed", "transformers")
_CONNECT_SECONDS = 10
_ANSWER_SECONDS = 60
_AT_ONCE = 64


@dataclass(frozen=True)
class HostFacts:
    """The facts that a host prints, and both ends of our ssh connection to it."""

    name: str
    boot: str
    gpus: int
    read: str
    port: int
    client_address: str
    own_address: str
    versions: dict[str, str]


def check_hosts(nodes: Sequence[Node], run_dir: Path, environment: Mapping[str, str]) -> tuple[str, int]:
    """Check every host. ConfigError names the first that is not as it must be.

    Returns the address at which the others reach the first host, and a port that is free there.
    """
    if shutil.which("pdsh") is None:
        raise ConfigError("--hostfile: DeepSpeed starts several hosts through `pdsh`, which is not installed here")
    secret, path = secrets.token_hex(8), run_dir / "ranks" / f"shared-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secret, encoding="utf-8")
    except OSError as error:
        raise CannotWriteError(f"run_dir {run_dir}: cannot write into it: {error.strerror}") from error
    words = ["env", f"PYTHONPATH={environment['PYTHONPATH']}", "PYTHONSAFEPATH=1"]
    if environment.get("DS_ACCELERATOR"):
        words.append(f"DS_ACCELERATOR={environment['DS_ACCELERATOR']}")
    words += [sys.executable, "-m", "launcher.ssh.check_hosts", str(path)]
    refuse_unsafe(words)
    try:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            facts = list(pool.map(lambda node: _facts_of(node.name, words), nodes))
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    _check_alike(nodes, facts)
    for node, found in zip(nodes, facts, strict=True):
        if found.read != secret:
            raise ConfigError(f"host {node.name} does not see the run folder {run_dir}: it must be shared by all hosts")
        if environment.get("DS_ACCELERATOR") != "cpu" and max(node.slots) >= found.gpus:
            what = f"slot {max(node.slots)} is asked for" if node.slots[0] else f"slots={len(node.slots)}"
            raise ConfigError(f"host {node.name}: {what}, but it has {found.gpus} GPU(s)")
    return _meeting_address(facts), facts[0].port


def _facts_of(host: str, words: list[str]) -> HostFacts:
    options = [*SSH_OPTIONS.split(), f"-oConnectTimeout={_CONNECT_SECONDS}"]
    try:
        done = subprocess.run(
            ["ssh", *options, "--", host, *words], capture_output=True, text=True, timeout=_ANSWER_SECONDS,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise ConfigError("--hostfile: there is no `ssh` here: install it, and pdsh") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"host {host} does not answer: connected, but silent for {_ANSWER_SECONDS} s") from None
    last = " ".join((done.stderr.strip().splitlines() or ["it printed nothing"])[-1].split())
    if done.returncode == 255:
        raise ConfigError(f"host {host} does not answer over ssh: {last}")
    if done.returncode:
        raise ConfigError(f"host {host} cannot run {sys.executable}, which must be there as it is here: {last}")
    try:
        line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
        facts = json.loads(line)
        client, _, own, _ = str(facts.pop("connection")).split()
        return HostFacts(**facts, client_address=client, own_address=own)
    except (StopIteration, ValueError, TypeError, KeyError):
        raise ConfigError(f"host {host} printed no facts: {done.stdout[-200:]!r}") from None


def _check_alike(nodes: Sequence[Node], facts: Sequence[HostFacts]) -> None:
    """Every name another machine, with a host name of its own, and the same versions everywhere."""
    seen: dict[str, tuple[str, str]] = {}
    for node, found in zip(nodes, facts, strict=True):
        # Ranks know by the name whether the supervisor runs on their own host.
        if found.name == socket.gethostname() and found.boot != _boot_id():
            raise ConfigError(f"host {node.name} calls itself {found.name}, as this one does: they need two names")
        if found.name in seen:
            other, boot = seen[found.name]
            if boot == found.boot:
                raise ConfigError(f"hosts {other} and {node.name} are one machine: name it once, with all its slots")
            raise ConfigError(f"hosts {other} and {node.name} both call themselves {found.name}: they need two names")
        seen[found.name] = node.name, found.boot
    for package in _PACKAGES:
        for node, found in zip(nodes, facts, strict=True):
            if found.versions[package] != facts[0].versions[package]:
                first, here = facts[0].versions[package], found.versions[package]
                raise ConfigError(f"{package} is {first} on host {nodes[0].name} and {here} on {node.name}")


def _meeting_address(facts: Sequence[HostFacts]) -> str:
    """The first host's address as this machine or another host saw it; its own name may mean its loopback there."""
    # A host that we reach over its loopback is this one: then it is what the others saw us come from.
    here = [found.client_address for found in facts if not _is_loopback(found.own_address)]
    address = facts[0].own_address if not _is_loopback(facts[0].own_address) else (here or [""])[0]
    return address or facts[0].own_address


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return True


def main() -> None:
    """On a host: print its facts."""
    try:
        read = Path(sys.argv[1]).read_text(encoding="utf-8")
    except OSError:
        read = ""
    facts = {
        "name": socket.gethostname(),
        "boot": _boot_id(),
        "gpus": len(local_gpus()),
        "read": read,
        "port": free_port(),
        # client's address, its port, our address, our port
        "connection": os.environ.get("SSH_CONNECTION", ""),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    print(json.dumps(facts), flush=True)


def _boot_id() -> str:
    """The kernel's identifier of this start of the machine; "" where it gives none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
