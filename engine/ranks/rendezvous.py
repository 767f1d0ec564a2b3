"""Where the ranks of a job meet: a store on one address of rank 0's machine, for ranks of this job only.

torch's own store listens on every interface, takes whoever comes, and waits for hours in front of a
foreign one. Nothing here encrypts: see docs/security.md.
"""

import array
import errno
import fcntl
import hashlib
import ipaddress
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from engine.errors import SUPERVISED, ConfigError

#: A rank that reaches rank 0's port waits this long for a sign of its own job there.
PATIENCE_SECONDS = 60.0
#: Where rank 0 listens instead of at MASTER_ADDR: behind a translated address, such as 0.0.0.0 for everywhere.
LISTEN_ADDRESS = "FULLTUNE_LISTEN_ADDRESS"
_ADDRESS = re.compile(r"[A-Za-z0-9:][A-Za-z0-9.:%_-]{0,254}")
_GREETING = "fulltune"
_SIOCGIFCONF = 0x8912
_IFREQ_BYTES = 40
_BACKLOG = 4096
_TAKEN_SECONDS = 3.0


@dataclass(frozen=True)
class Place:
    """A rank's place in the world that its launcher described, and where rank 0 is."""

    rank: int
    world_size: int
    address: str
    port: int
    local_size: int

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Place | None":
        """From RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; None when one is missing. ConfigError for nonsense."""
        names = ("RANK", "WORLD_SIZE", "MASTER_PORT")
        if not all(environment.get(name) for name in (*names, "MASTER_ADDR")):
            return None
        for name in names:
            if not re.fullmatch(r"[0-9]{1,9}", environment[name]):
                raise ConfigError(f"{name}: write a number, not {environment[name]!r}")
        rank, world_size, port = (int(environment[name]) for name in names)
        address = environment["MASTER_ADDR"]
        if not _ADDRESS.fullmatch(address):
            raise ConfigError(f"MASTER_ADDR: write a host name or an address, not {address!r}")
        if not (rank < world_size and 0 < port < 65536):
            raise ConfigError(f"RANK={rank}, WORLD_SIZE={world_size}, MASTER_PORT={port}: there is no such place")
        local = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or ""
        return cls(rank, world_size, address, port, int(local) if local.isdecimal() else world_size)


def join_world(place: Place, job: str, backend: str, timeout: timedelta, **options: Any) -> None:
    """Make torch's default process group for `job`, the same text on all ranks. All ranks call it.

    Ranks of other machines may come up to `timeout` later. Raises ConfigError when the port is taken
    or belongs to another job, or a rank is there twice or expects another number of ranks.
    """
    secret = os.environ.get(SUPERVISED) or job
    # What is said in the open must not tell the other: it only shows that both know the same job.
    greeting, prefix = (hashlib.sha256(f"{what}\n{secret}".encode()).hexdigest()[:32] for what in ("greet", "group"))
    if place.rank == 0:
        store, own_address = _host(place, f"{greeting} {place.world_size}")
    else:
        store, own_address = _visit(place, greeting, timeout)
    keep_to_interface(own_address)
    group_store = PrefixStore(prefix, store)
    if group_store.add(f"rank {place.rank}", 1) > 1:
        raise ConfigError(f"rank {place.rank} of this job is there already at {place.address}:{place.port}")
    group_store.set_timeout(timeout)
    dist.init_process_group(
        backend, store=group_store, rank=place.rank, world_size=place.world_size, timeout=timeout, **options
    )


def _host(place: Place, greeting: str) -> tuple[Any, str]:
    """Rank 0's store, on one address; and that address, "" for all of them."""
    listener, address = _listen(place)
    store = TCPStore(
        address or place.address, place.port, None, True, timeout=timedelta(seconds=PATIENCE_SECONDS),
        wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True,
    )  # fmt: skip
    store.set(_GREETING, greeting)
    return store, address


def _listen(place: Place) -> tuple[socket.socket, str]:
    """A listening socket on rank 0's own address, and the address; "" when that cannot be known."""
    named = os.environ.get(LISTEN_ADDRESS) or place.address
    try:
        found = socket.getaddrinfo(named, place.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR={named}: no such host ({error.strerror})") from None
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)  # every rank tries both; some machines have one only
    family, _, _, _, where = found[0]
    address = str(where[0])
    everywhere = ipaddress.ip_address(address.partition("%")[0]).is_unspecified
    if _means_only_here(named, address) and place.local_size < place.world_size:
        # Debian gives a machine's own name a loopback address, under which no other machine reaches it.
        print(
            f"warning: MASTER_ADDR={named} is {address} on this machine, which others cannot reach: the ranks meet on"
            " every interface; name an address",
            flush=True,
        )
        everywhere, where = True, ("0.0.0.0" if family == socket.AF_INET else "::", place.port)  # noqa: S104
    listener = _bound(family, where, named)
    listener.listen(_BACKLOG)
    return listener, "" if everywhere else address


def _bound(family: int, where: Any, named: str) -> socket.socket:
    """A socket bound there; ConfigError when the port stays taken, or the address is not ours."""
    began = time.monotonic()
    while True:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(where)
        except OSError as error:
            listener.close()
            taken = error.errno == errno.EADDRINUSE
            if taken and time.monotonic() - began < _TAKEN_SECONDS:  # by a job that ends, or in passing
                time.sleep(0.2)
                continue
            if taken:
                told = (
                    f"port {where[1]} of {named} is taken, perhaps by another job: wait for it, or choose another "
                    "port (--master-port)"
                )
            elif error.errno == errno.EADDRNOTAVAIL:
                told = (
                    f"MASTER_ADDR={named} is no address of {socket.gethostname()}, where rank 0 runs: name one of its "
                    f"own ({LISTEN_ADDRESS}=0.0.0.0 where addresses are translated)"
                )
            else:
                told = f"cannot listen on {named}, port {where[1]}: {error.strerror}"
            raise ConfigError(told) from error
        return listener


def _means_only_here(named: str, address: str) -> bool:
    """True if a name of a machine was given, and this machine takes it for the loopback interface."""
    try:
        ipaddress.ip_address(named)
    except ValueError:
        return named != "localhost" and ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return False


def _visit(place: Place, greeting: str, timeout: timedelta) -> tuple[Any, str]:
    """Another rank's view of the store, and the address of this machine that it is seen from."""
    own_address, address = _wait_for_rank_0(place, timeout)
    # A store of another job may be on its way out: look again, for a while.
    deadline = time.monotonic() + PATIENCE_SECONDS
    told = ""
    while time.monotonic() < deadline:
        store, told = _greeted(address, place.port, deadline - time.monotonic())
        theirs, _, ranks = told.partition(" ")
        if store is not None and theirs == greeting:
            if ranks != str(place.world_size):
                raise ConfigError(
                    f"rank {place.rank} was started as one of {place.world_size} ranks, rank 0 as one of {ranks}"
                )
            return store, own_address
        time.sleep(1.0)
    who = "another job" if told else "another program"
    raise ConfigError(
        f"rank {place.rank} met {who} at {place.address}:{place.port} instead of rank 0 of its own: choose another port"
        " (--master-port)"
    )


def _wait_for_rank_0(place: Place, timeout: timedelta) -> tuple[str, str]:
    """Until somebody listens there: (our address, theirs). ConfigError for an unknown name or after `timeout`."""
    began = time.monotonic()
    told = False
    while True:
        try:
            with socket.create_connection((place.address, place.port), timeout=PATIENCE_SECONDS) as connection:
                if connection.getsockname() != connection.getpeername():  # else TCP has met itself, on a free port
                    return str(connection.getsockname()[0]), str(connection.getpeername()[0])
        except OSError as error:
            waited = time.monotonic() - began
            unknown = isinstance(error, socket.gaierror)
            if waited > (PATIENCE_SECONDS if unknown else timeout.total_seconds()):
                raise ConfigError(
                    f"rank {place.rank} cannot reach rank 0 at {place.address}:{place.port}: {error}"
                ) from None
            if waited > PATIENCE_SECONDS and not told:
                told = True
                print(f"rank {place.rank}: waiting for rank 0 at {place.address}:{place.port} ({error})", flush=True)
        time.sleep(0.2)


def _greeted(address: str, port: int, seconds: float) -> tuple[Any, str]:
    """A view of the store there and its greeting; (None, "") when there is no store, or none that greets.

    In a thread, because torch waits for ever for an answer of what is no store.
    """
    found: list[tuple[Any, str]] = []

    def connect() -> None:
        limit = timedelta(seconds=max(1.0, seconds))
        try:
            store = TCPStore(address, port, None, False, timeout=limit, wait_for_workers=False)
            found.append((store, ""))
            found.append((store, store.get(_GREETING).decode("ascii", "replace")))
        except RuntimeError:  # torch's network errors
            return

    thread = threading.Thread(target=connect, name="rendezvous", daemon=True)
    thread.start()
    thread.join(max(1.0, seconds))
    store, told = found[-1] if found else (None, "")
    return (store, told[:100]) if told else (None, "another job" if found else "")


def keep_to_interface(own_address: str) -> None:
    """Have gloo, and NCCL in a job of one machine, listen on the interface of `own_address` unless the user chose."""
    name = interface_of(own_address) if own_address else None
    if name is None:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if name == "lo":
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 or IPv6 address; None if none has."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(wanted, ipaddress.IPv6Address) and wanted.ipv4_mapped:
        wanted = wanted.ipv4_mapped
    if wanted.is_loopback:
        return "lo"
    if isinstance(wanted, ipaddress.IPv6Address):
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
        return next((line.split()[5] for line in lines if int(line.split()[0], 16) == int(wanted)), None)
    return _ipv4_interfaces().get(str(wanted))


def _ipv4_interfaces() -> dict[str, str]:
    """Every IPv4 address of this machine with its interface, as the kernel lists them (struct ifconf, ifreq)."""
    table = array.array("B", bytes(_IFREQ_BYTES * 1024))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("iP", len(table), table.buffer_info()[0])
        (num_bytes, _) = struct.unpack("iP", fcntl.ioctl(any_socket, _SIOCGIFCONF, request))
    found = {}
    for start in range(0, num_bytes, _IFREQ_BYTES):
        name = table[start : start + 16].tobytes().partition(b"\0")[0].decode(errors="replace").partition(":")[0]
        found[socket.inet_ntoa(table[start + 20 : start + 24].tobytes())] = name
    return found
