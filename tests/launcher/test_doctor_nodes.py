"""Several nodes: real processes that see another disk, other packages or another clock, real ssh, and facts compared."""

import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from doctor_cases import ROOT, make_setting

from engine.finding import Finding, Verdict
from launcher.commands.doctor import merged, print_table
from launcher.doctor.check_job import check_job
from launcher.doctor.check_node import Needs, check_node
from launcher.doctor.gather import Answer, Target, gather, local_target, nonces, ssh_target
from launcher.doctor.node_facts import look
from launcher.job.job import free_port

NODE = (sys.executable, "-m", "launcher.doctor.node_facts")
Faults = Mapping[str, tuple[Any, ...]]


def named(findings: Sequence[Finding], verdict: Verdict) -> dict[str, str]:
    return {each.name: f"{each.node}: {each.found}" for each in findings if each.verdict == verdict}


def ask_two(before: Sequence[str], folder: Path | None = None, port: int | None = None) -> list[Finding]:
    """A node as it is and one whose command has these words before it; what is found of both together."""
    with nonces({"run folder": folder} if folder else {}) as made:
        request = {"nonces": made, "first": "one", "port": port, "token": "x"}
        targets = [local_target("one", request), Target((*before, *NODE), ("two",), request | {"node": "two"})]
        return check_job(gather(targets, "one", port, "127.0.0.1", 60), "one", port, over_ssh=False)


def test_two_nodes_that_are_alike(tmp_path: Path) -> None:
    found = ask_two((), tmp_path, free_port())
    assert [each.verdict for each in found] == ["ok"] * len(found), found
    assert {each.name for each in found} == {
        "nodes", "versions", "differences", "clock", "shared folder", "port", "way to the first node",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="mounts are root's")
def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    script = 'mount -t tmpfs tmpfs "$1" && shift && exec "$@"'
    found = ask_two(("unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path)), tmp_path)
    assert named(found, "error") == {"shared folder": ": the run folder of two is not the one seen here"}
    assert list(tmp_path.iterdir()) == []


def test_a_node_with_another_torch(tmp_path: Path) -> None:
    (tmp_path / "torch-2.9.1.dist-info").mkdir()
    (tmp_path / "torch-2.9.1.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.9.1\n")
    found = ask_two(("env", f"PYTHONPATH={tmp_path}:{ROOT}"))
    assert re.fullmatch(r": torch differs: 2\.\d+.* on one; 2\.9\.1 on two", named(found, "error")["versions"])


def test_a_node_with_other_source(tmp_path: Path) -> None:
    for package in ("launcher", "engine", "data_prep", "ds_configs"):
        shutil.copytree(ROOT / package, tmp_path / package)
    with (tmp_path / "engine" / "zero" / "ds_config.py").open("a") as file:
        file.write("# another line\n")
    found = ask_two(("env", f"PYTHONPATH={tmp_path}"))
    assert ": the source of fulltune differs: " in named(found, "error")["versions"]


def test_a_node_without_our_packages() -> None:
    request = {"first": "one"}
    (answer,) = gather(
        [Target((sys.executable, "-S", "-m", "launcher.doctor.node_facts"), ("two",), request | {"node": "two"})],
        "one",
        None,
    )
    assert answer.facts is not None, answer.error
    found = named(check_node(answer.facts, Needs(1, 1, False, (0,))), "error")
    assert list(found) == ["packages"]
    assert "not installed: torch, deepspeed" in found["packages"]


@pytest.mark.parametrize(("limit", "threads", "verdict"), [(200, 150, "error"), (200, 5, "warning"), (-1, None, "ok")])
def test_processes_are_counted_against_their_limit(
    limit: int, threads: int | None, verdict: Verdict, facts: dict[str, Any]
) -> None:
    plain = copy.deepcopy(facts)
    plain["limits"] |= {"processes": limit, "threads": threads, "is_root": False, "capabilities": []}
    plain["machine"]["cores"] = 2
    assert "processes" in named(check_node(plain, Needs(2, 2, False, (0, 1))), verdict)


def test_gpus_that_would_lie_idle_are_told(facts: dict[str, Any]) -> None:
    plain = copy.deepcopy(facts) | {"gpus": TWO_GPUS}
    assert "2 here, and not used" in named(check_node(plain, Needs(2, 2, False, (0, 1))), "warning")["GPUs"]
    assert "GPUs" in named(check_node(plain, Needs(2, 2, False, (0, 1), cpu_on_purpose=True)), "ok")


def test_a_host_that_takes_the_connection_and_says_nothing(ssh: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        (ssh / "ssh_config").write_text(f"Host *\nPort {server.getsockname()[1]}\n")
        (answer,) = gather([ssh_target("127.0.0.1", {})], "127.0.0.1", None, limit_seconds=60)
    (found,) = check_job([answer], "127.0.0.1", None, over_ssh=True)
    assert (found.name, found.verdict, found.node) == ("ssh", "error", "127.0.0.1")
    assert "timed out" in found.found


def test_a_node_with_other_limits() -> None:
    found = ask_two(("prlimit", "--nofile=4000:4000"))
    assert re.fullmatch(r": the limit of open files: \d+ on one; 4000 on two", named(found, "warning")["differences"])


@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs faketime (apt-get install faketime)")
@pytest.mark.parametrize(
    ("shift", "verdict", "words"),
    [("+30s", "warning", "ahead of"), ("-30s", "warning", "behind"), ("+1d", "error", "ahead of"), ("-1h", "error", "behind")],
)  # fmt: skip
def test_a_clock_that_is_wrong(shift: str, verdict: Verdict, words: str) -> None:
    found = named(ask_two(("faketime", "-f", shift)), verdict)
    seconds = int(re.fullmatch(rf"two: at least (\d+) s {words} this machine's", found["clock"])[1])  # type: ignore[index]
    true = {"+30s": 30, "-30s": 30, "+1d": 86400, "-1h": 3600}[shift]
    assert true - 10 <= seconds <= true + 1


def test_a_port_that_somebody_else_has() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = ask_two((), port=server.getsockname()[1])
    assert "Address already in use" in named(found, "error")["port"]


@pytest.mark.skipif(os.getuid() != 0, reason="network namespaces are root's")
def test_a_node_that_cannot_reach_the_first() -> None:
    found = ask_two(("unshare", "--net"), port=free_port())
    assert re.match(r"two: 127\.0\.0\.1 port \d+: ", named(found, "error")["way to the first node"])


def test_a_node_that_does_not_answer_in_time_is_named() -> None:
    targets = [local_target("one", {}), Target(("sleep", "100"), ("two",), {}), Target(("/no/such",), ("three",), {})]
    found = check_job(gather(targets, "one", None, limit_seconds=5), "one", None, over_ssh=False)
    assert {each.node: each.found for each in found if each.verdict == "error"} == {
        "two": "no answer within 5 s", "three": "cannot run /no/such: No such file or directory",
    }  # fmt: skip


def test_what_a_login_shell_prints_is_skipped() -> None:
    script = 'echo "Welcome"; echo \'{"node": 1}\'; echo "[]"; exec "$@"'
    assert "error" not in {each.verdict for each in ask_two(("sh", "-c", script, "sh"))}


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """What this machine says of itself, as a start for nodes that it is not."""
    plain: dict[str, Any] = json.loads(json.dumps(look({}) | {"node": "here", "answers": {}, "port_error": None}))
    return plain


GPU = {
    "index": "0", "name": "NVIDIA H100 80GB HBM3", "memory.total": "81559", "memory.used": "4",
    "driver_version": "580.95.05", "compute_cap": "9.0", "pcie.link.gen.max": "5", "pcie.link.width.max": "16", "ecc": "0",
}  # fmt: skip
TWO_GPUS = {"gpus": [GPU, GPU | {"index": "1"}], "error": None, "devices": 2, "nvcc": "13.0"}
#: Facts of a node with two GPUs, changed in one place -> the finding that names it.
GPU_FAULTS: Faults = {
    "driver too old": ({"gpus": ("gpus", [GPU | {"driver_version": "570.86"}] * 2)}, "driver", "error", "570.86 is too old"),
    "torch without CUDA": ({"versions": ("torch CUDA", None)}, "driver", "error", "cannot use GPUs"),
    "nvcc of another major version": ({"gpus": ("nvcc", "12.4")}, "nvcc", "warning", "CUDA 12.4"),
    "nvidia-smi fails": ({"gpus": ("error", "Driver/library version mismatch")}, "GPUs", "error", "mismatch"),
    "fewer GPUs than slots": ({"gpus": ("gpus", [GPU])}, "GPUs", "error", "2 slots up to number 1, and 1 GPUs"),
    "GPUs of two kinds": ({"gpus": ("gpus", [GPU, GPU | {"name": "NVIDIA A100"}])}, "GPUs", "warning", "different kinds"),
    "GPU in use": ({"gpus": ("gpus", [GPU, GPU | {"index": "1", "memory.used": "70000"}])}, "GPUs in use", "warning", "GPU 1"),
    "memory errors": ({"gpus": ("gpus", [GPU | {"ecc": "3"}, GPU])}, "GPU memory", "error", "uncorrected"),
    "no bf16 units": ({"gpus": ("gpus", [GPU | {"compute_cap": "7.0"}] * 2)}, "bf16", "warning", "bf16"),
    "address space limited": ({"limits": ("address space", 2**40)}, "address space", "error", "limited"),
    "package missing": ({"versions": ("deepspeed", None)}, "packages", "error", "not installed: deepspeed"),
}  # fmt: skip


@pytest.mark.parametrize("case", GPU_FAULTS)
def test_a_fault_of_a_gpu_node_is_named(case: str, facts: dict[str, Any]) -> None:
    needs = Needs(ranks=2, world_size=2, uses_gpus=True, slots=(0, 1))
    sound = copy.deepcopy(facts) | {"gpus": copy.deepcopy(TWO_GPUS)}
    sound["versions"]["torch CUDA"] = "13.0"
    sound["shared_memory"]["left"] = []
    assert {each.verdict for each in check_node(sound, needs)} == {"ok"}, check_node(sound, needs)
    changes, name, verdict, words = GPU_FAULTS[case]
    for section, (key, value) in changes.items():
        sound[section][key] = value
    found = named(check_node(sound, needs), verdict)
    assert list(found) == [name]
    assert words in found[name]


#: The second of two nodes, changed in one place -> the finding that names it.
DIFFERENCES: Faults = {
    "python": ("versions", "python", "3.10.2", "versions", "error", "python differs"),
    "python, a patch": ("versions", "python", "3.11.999", "versions", "warning", "python differs"),
    "deepspeed": ("versions", "deepspeed", "0.18.0", "versions", "error", "0.18.0 on two"),
    "numpy": ("versions", "numpy", "2.0.0", "versions", "warning", "numpy differs"),
    "cores": ("machine", "cores", 999, "differences", "warning", "999 on two"),
    "memory": ("memory", "limit_bytes", 2**30, "differences", "warning", "1 GiB on two"),
    "GPUs on one node only": ("gpus", "gpus", [GPU], "differences", "error", "1 x NVIDIA H100 80GB HBM3 81559 MiB on two"),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERENCES)
def test_a_difference_between_nodes_is_named(case: str, facts: dict[str, Any]) -> None:
    section, key, value, name, verdict, words = DIFFERENCES[case]
    two = copy.deepcopy(facts) | {"node": "two"}
    two[section][key] = value
    answers = [Answer("here", facts), Answer("two", two)]
    found = named(check_job(answers, "here", None, over_ssh=False), verdict)
    assert list(found) == [name]
    assert words in found[name]


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server of our own on all addresses of the loopback interface, and an `ssh` that knows it."""
    server = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    if server is None or os.getuid() != 0:
        pytest.skip("needs root and sshd (apt-get install openssh-server)")
    Path("/run/sshd").mkdir(exist_ok=True)
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    (tmp_path / "authorized").write_text((tmp_path / "user.pub").read_text())
    (tmp_path / "authorized").chmod(0o600)
    port = free_port()
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 0.0.0.0\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/authorized\n"
        f"StrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile none\nSetEnv PATH={bin_dir}:{os.environ['PATH']}\n"
    )
    (tmp_path / "ssh_config").write_text(
        f"Host *\nPort {port}\nIdentityFile {tmp_path}/user\nIdentitiesOnly yes\nUserKnownHostsFile {tmp_path}/known\n"
        "LogLevel ERROR\n"
    )
    keys = (tmp_path / "host.pub").read_text().strip()
    (tmp_path / "known").write_text("".join(f"[127.0.0.{n}]:{port} {keys}\n" for n in (2, 3)))
    (bin_dir / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/ssh_config "$@"\n')
    (bin_dir / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    process = subprocess.Popen([server, "-D", "-e", "-f", tmp_path / "sshd_config"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "listening" in process.stderr.readline()
    try:
        yield tmp_path
    finally:
        process.terminate()
        process.wait()


def doctor(folder: Path, *words: str) -> tuple[int, list[dict[str, str]]]:
    command = [sys.executable, "-m", "launcher.cli", "doctor", "--json", "--wait-seconds", "60", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)["findings"]


def test_two_hosts_over_ssh(ssh: Path, tmp_path: Path) -> None:
    if shutil.which("pdsh") is None:
        pytest.skip("needs pdsh")
    work = tmp_path / "work"
    work.mkdir()
    with ExitStack() as stack:
        make_setting(work, stack)
    (work / "hosts").write_text("127.0.0.2 slots=1\n127.0.0.3 slots=1\n")
    words = ("run.yaml", "--hostfile", "hosts", "--master-port", str(free_port()))
    code, found = doctor(work, *words)
    wrong = [
        each for each in found if each["verdict"] not in ("ok", "skipped") and each["name"] != "shared memory left"
    ]
    assert (code, wrong) == (0, [])
    names = [each["name"] for each in found]
    assert {"pdsh", "ssh", "ssh back", "shared folder", "way to the first node", "port", "current folder"} <= set(names)
    # A host whose key nobody knows, and a way back that is closed.
    known = (tmp_path / "known").read_text()
    (tmp_path / "known").write_text(known.splitlines()[1] + "\n")
    code, found = doctor(work, *words)
    told = {each["name"]: each for each in found if each["verdict"] == "error"}
    assert code == 78
    assert told["ssh"]["node"] == "127.0.0.2"
    assert "accept its key" in told["ssh"]["to_do"]
    (back,) = [each for each in found if each["name"] == "ssh back"]
    assert (back["verdict"], back["node"]) == ("warning", "127.0.0.3")
    assert "Host key verification failed" in back["found"]


def test_no_host_becomes_an_option() -> None:
    for name in ("-oProxyCommand=id", "a b", "a;id", "$(id)", ""):
        with pytest.raises(Exception, match="is no host name"):
            ssh_target(name, {})
    command = ssh_target("worker-0", {}).command
    assert command[command.index("--") + 1 :][0] == "worker-0"


class Terminal(list[str]):
    def write(self, text: str) -> int:
        self.append(text)
        return len(text)

    def isatty(self) -> bool:
        return True


def test_the_table_is_coloured_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding("port", "error", "taken", "free it", "a"), Finding("clock", "ok", "fine", "", "a")]
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    print_table(findings, ["a", "b"], screen)  # type: ignore[arg-type]
    assert "\x1b[31;1merror  \x1b[0m  port   a: taken; free it" in "".join(screen)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    print_table(findings, ["a", "b"], plain)  # type: ignore[arg-type]
    monkeypatch.delenv("NO_COLOR")
    print_table(findings, ["a", "b"], sys.stdout)
    assert capsys.readouterr().out == "".join(plain) == "error    port   a: taken; free it\nok       clock  a: fine\n"


def test_nodes_that_agree_share_a_line() -> None:
    findings = [Finding("cores", "ok", "8", node=node) for node in "abc"] + [Finding("port", "ok", "free", node="a")]
    rows = merged(findings, ["a", "b", "c"])
    assert [(row.name, row.node) for row in rows] == [("cores", "all 3 nodes"), ("port", "a")]
