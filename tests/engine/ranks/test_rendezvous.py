"""Ranks meet on one interface, only those of their own job, and say so when they cannot."""

import random
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from listeners import listeners
from ranks import free_port, rank_environment
from repository import WORKERS

from engine.errors import SUPERVISED, ConfigError
from engine.ranks.rendezvous import Place, interface_of

WORKER = str(WORKERS / "rendezvous_worker.py")
MAGIC = b"\x00" + struct.pack("<I", 0x3C85F7CE)
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a rank of a world: ``start(rank, world_size, port, job, ...)``; all are gone in the end."""
    processes: list[subprocess.Popen[str]] = []

    def start_one(
        rank: int,
        world_size: int,
        port: int,
        job: str,
        address: str = "127.0.0.1",
        patience: float = 60.0,
        **variables: str,
    ) -> subprocess.Popen[str]:
        place = {
            "RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_RANK": rank,
            "LOCAL_SIZE": world_size,
            "MASTER_PORT": port,
        }
        environment = {key: value for key, value in rank_environment(world_size).items() if key != SUPERVISED}
        process = subprocess.Popen(
            [sys.executable, WORKER, job, str(tmp_path / "end"), str(patience)],
            env=environment | {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": address} | variables,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start_one
    for process in processes:
        process.kill()
        process.communicate()


def disturb(port: int) -> list[socket.socket]:
    """What strangers may send to an open port; some of them stay."""
    noise = random.Random(port)
    held = []
    for turn in range(60):
        stranger = socket.create_connection(("127.0.0.1", port), timeout=5)
        words = (
            noise.randbytes(noise.randrange(1, 2000)), b"GET / HTTP/1.0\r\n\r\n", b"\0" * 100,
            MAGIC + b"\x01" + struct.pack("<Q", 2**62), MAGIC + noise.randbytes(300), b"",
        )  # fmt: skip
        with suppress(OSError):
            stranger.sendall(words[turn % len(words)])
        if turn % 2:
            held.append(stranger)
        else:
            stranger.close()
    return held


@pytest.mark.ranks
def test_only_ranks_of_the_job_meet_and_on_one_interface(start: Start, tmp_path: Path) -> None:
    port = free_port()
    ranks = [start(rank, 2, port, "job") for rank in (1, 0)]
    for process in ranks:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any(line == "together: [[0], [1]]\n" for line in lines), process.communicate()[1]
    addresses = {process.pid: listeners(process.pid) for process in ranks}
    assert all(addresses.values()), "gloo listens in every rank"
    everywhere = [address for found in addresses.values() for address in found if not address.startswith("0100007F:")]
    assert everywhere == [], "127.0.0.1 and nothing else"
    held = [line for found in addresses.values() for address in found for line in disturb(int(address[9:], 16))]

    # A second world at the same port: its rank 0 cannot listen, and its rank 1 does not join this one.
    second = [start(rank, 2, port, "another job", patience=4.0) for rank in (0, 1)]
    smaller = start(1, 3, port, "job", patience=4.0)
    twice = start(1, 2, port, "job", patience=4.0)
    told = [process.communicate(timeout=120)[0] for process in (*second, smaller, twice)]
    assert [process.returncode for process in (*second, smaller, twice)] == [78] * 4
    assert f"port {port} of 127.0.0.1 is taken" in told[0]
    assert f"rank 1 met another job at 127.0.0.1:{port}" in told[1]
    assert "started as one of 3 ranks, rank 0 as one of 2" in told[2]
    assert "rank 1 of this job is there already" in told[3]
    assert all(text.count("\n") == 1 for text in told), told

    (tmp_path / "end").touch()
    for process in ranks:
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, "still together: [2.0]\n"), errors
    del held


@pytest.mark.ranks
def test_a_port_that_is_no_store_is_said(start: Start) -> None:
    """torch alone waits there for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        rank = start(1, 2, port, "job", patience=3.0)
        output, errors = rank.communicate(timeout=120)
    assert rank.returncode == 78, errors
    assert f"rank 1 met another program at 127.0.0.1:{port}" in output


@pytest.mark.ranks
def test_an_address_of_another_machine_is_said(start: Start) -> None:
    rank = start(0, 2, free_port(), "job", address="203.0.113.7")
    output, errors = rank.communicate(timeout=120)
    assert rank.returncode == 78, errors
    assert "MASTER_ADDR=203.0.113.7 is no address of" in output


def test_a_rank_knows_its_place() -> None:
    place = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "::1", "MASTER_PORT": "29500", "LOCAL_SIZE": "2"}
    assert Place.read(place) == Place(1, 4, "::1", 29500, 2)
    assert Place.read({key: value for key, value in place.items() if key != "RANK"}) is None
    for name, value in (
        ("RANK", "-1"), ("RANK", "4"), ("WORLD_SIZE", "x"), ("MASTER_PORT", "70000"), ("MASTER_PORT", "٣"),
        ("MASTER_ADDR", "-oProxyCommand=touch /tmp/x"), ("MASTER_ADDR", "a;b"), ("MASTER_ADDR", "a\nb"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=name):
            Place.read(place | {name: value})


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == interface_of("::1") == interface_of("127.9.9.9") == "lo"
    assert interface_of("203.0.113.7") is None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        own = probe.getsockname()[0]
    assert interface_of(own) in {path.name for path in Path("/sys/class/net").iterdir()}
