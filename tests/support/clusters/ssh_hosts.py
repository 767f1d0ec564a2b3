"""Two hosts on one machine, h1 and h2, each with an sshd: namespaces joined by a switch, in a folder of their own.

A host is a process with its own network, host name, processes, mounts, /dev/shm, /run and temporary
folder; it shares the rest of the file system, as hosts of a cluster share a disk. Nobody but the hosts
sees the keys, the home folder and the names made here. All of it ends with the process that started
it. By hand, with a shell on h1: ``python tests/support/clusters/ssh_hosts.py``.
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = {
    "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh", "ip": "iproute2",
    "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux", "mount": "mount",
}  # fmt: skip
ADDRESSES = {"h1": "10.77.0.1", "h2": "10.77.0.2"}
#: A name that resolves to an address nobody has.
NOBODY, _NOBODY_ADDRESS = "h3", "10.77.0.9"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_NAMESPACES = ("--net", "--uts", "--pid", "--mount", "--ipc")

_SSHD_CONFIG = """\
Port 22
HostKey {folder}/host_key
PidFile none
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
"""


def why_not() -> str:
    """The reason that no hosts can be made here, installing what they need first where that is allowed; or ""."""
    if not sys.platform.startswith("linux"):
        return "hosts of namespaces need Linux"
    if os.getuid() != 0:
        return "hosts of namespaces need root"
    missing = _missing()
    if missing and (shutil.which("apt-get") is None or Path("/run/systemd/system").exists()):
        # Where systemd runs, installing openssh-server would start a server for everybody.
        return f"not installed: {', '.join(missing)} (apt-get install {' '.join(sorted(set(missing.values())))})"
    if missing:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", *sorted(set(missing.values()))]):
            done = subprocess.run(
                ["apt-get", "-qq", *words], env=environment, capture_output=True, text=True, timeout=900, check=False
            )
            if done.returncode and words[0] == "install":
                return f"apt-get {' '.join(words)} failed: {' '.join(done.stderr.split())[-300:]}"
        if missing := _missing():
            return f"installed, but still missing: {', '.join(missing)}"
    probe = ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "ip", "link", "add", "type", "veth"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"no namespaces with network devices can be made here: {done.stderr.strip()}" if done.returncode else ""


def _missing() -> dict[str, str]:
    return {name: package for name, package in PROGRAMS.items() if shutil.which(name, path=_PATH) is None}


@dataclass
class SshHosts:
    """The running hosts. Process ids are those of this machine, not the ones that the hosts see."""

    folder: Path
    switch: int
    _inits: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    _switch_process: "subprocess.Popen[bytes] | None" = None

    @property
    def home(self) -> Path:
        """Root's home folder on every host."""
        return self.folder / "home"

    def start(
        self, host: str, *words: str | Path, env: dict[str, str] | None = None, **more: Any
    ) -> "subprocess.Popen[str]":
        """Start a command on a host as somebody who is logged in there would; its environment is `env` and little else."""
        basic = {
            "HOME": str(self.home), "USER": "root", "TMPDIR": "/run/tmp", "LANG": "C.UTF-8",
            "PATH": f"{Path(sys.executable).parent}:{_PATH}",
        }  # fmt: skip
        enter = ["nsenter", "-t", str(self.init(host)), *_NAMESPACES, "--"]
        return subprocess.Popen(
            [*enter, *(str(word) for word in words)], env=basic | (env or {}), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more,
        )  # fmt: skip

    def run(self, host: str, *words: str | Path, timeout: float = 120, **more: Any) -> str:
        """The output of a command on a host; AssertionError if it fails."""
        process = self.start(host, *words, **more)
        output, _ = process.communicate(timeout=timeout)
        assert process.returncode == 0, f"{words} on {host}: {process.returncode}\n{output}"
        return output

    def init(self, host: str) -> int:
        """The first process of a host, with which it ends."""
        return children_of(self._inits[host].pid)[0]

    def processes(self, host: str) -> list[int]:
        """What runs on a host besides its first process and sshd; nothing on one that is off."""
        if host not in self.living():
            return []
        init = self.init(host)
        namespace = Path(f"/proc/{init}/ns/pid").readlink()
        found = [pid for pid in _pids() if pid != init and _pid_namespace(pid) == namespace]
        return [pid for pid in found if not _is_sshd(pid)]

    def living(self) -> list[str]:
        """The hosts that are on."""
        return [host for host, init in self._inits.items() if init.poll() is None]

    def cut_off(self, host: str) -> None:
        """As when the cable is pulled: nobody is told, packets are lost."""
        self._on_switch("ip", "link", "set", host, "down")

    def power_off(self, host: str) -> None:
        """As when the power goes: nothing of the host is left, and nobody is told."""
        self.cut_off(host)
        os.kill(self.init(host), signal.SIGKILL)
        self._inits[host].wait()

    def sshd(self, host: str) -> int:
        """The process that listens."""
        return children_of(self.init(host))[0]

    def ssh_server_of(self, pid: int) -> int:
        """The sshd process that serves the connection through which `pid` was started."""
        while not _is_sshd(pid):
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return pid

    def restore(self) -> None:
        """Every host is on, connected, and runs nothing."""
        for host in ADDRESSES:
            if host in self.living():
                os.kill(self.sshd(host), signal.SIGCONT)
                self._on_switch("ip", "link", "set", host, "up")
                for pid in self.processes(host):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            else:
                self._power_on(host)
        for host in ADDRESSES:
            _wait_for_ssh(self, host)

    def _on_switch(self, *words: str, check: bool = True) -> None:
        subprocess.run(["nsenter", "-t", str(self.switch), "--net", *words], check=check, capture_output=not check)

    def _power_on(self, host: str) -> None:
        """Start the host's first process, and connect it as soon as it has a network of its own."""
        ready = self.folder / f"{host}.ready"
        ready.unlink(missing_ok=True)
        with (self.folder / f"{host}.log").open("ab") as log:
            self._inits[host] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES, "--fork", "--mount-proc", "--kill-child",
                 sys.executable, str(Path(__file__).resolve()), "host", host, str(self.folder)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._wait_for(ready, host)
        self._on_switch("ip", "link", "del", host, check=False)
        end = ["ip", "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", str(self.init(host))]
        end += ["address", f"02:00:00:00:00:{host[1:]:0>2}"]  # the one it had before, which others remember
        self._on_switch(*end)
        self._on_switch("ip", "link", "set", host, "master", "switch", "up")
        for words in (["addr", "add", f"{ADDRESSES[host]}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            subprocess.run(["nsenter", "-t", str(self.init(host)), "--net", "ip", *words], check=True)

    def _wait_for(self, ready: Path, host: str) -> None:
        deadline = time.monotonic() + 20
        while not ready.exists():
            assert time.monotonic() < deadline, (self.folder / f"{host}.log").read_text()
            time.sleep(0.02)


@contextlib.contextmanager
def running_hosts(folder: Path | None = None) -> Iterator[SshHosts]:
    """Start the switch and both hosts, and end all of it afterwards."""
    with tempfile.TemporaryDirectory(prefix="hosts-", dir=folder) as name:
        path = Path(name)
        _write_files(path)
        switch = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"])
        hosts = SshHosts(path, switch.pid, _switch_process=switch)
        try:
            own = Path("/proc/self/ns/net").readlink()
            while Path(f"/proc/{switch.pid}/ns/net").readlink() == own:
                time.sleep(0.01)
            hosts._on_switch("ip", "link", "add", "switch", "type", "bridge")
            hosts._on_switch("ip", "link", "set", "switch", "up")
            hosts.restore()
            yield hosts
        finally:
            for init in hosts._inits.values():
                init.kill()
                init.wait()
            switch.kill()
            switch.wait()


def _wait_for_ssh(hosts: SshHosts, host: str) -> None:
    other = next(name for name in ADDRESSES if name != host)
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(AssertionError):
            hosts.run(other, "ssh", host, "true")
            return
        assert time.monotonic() < deadline, (hosts.folder / f"{host}.log").read_text()
        time.sleep(0.1)


def _write_files(folder: Path) -> None:
    """Keys, the home folder, and what takes the place of /etc/passwd and /etc/hosts on the hosts."""
    folder.chmod(0o755)
    keys = folder / "home" / ".ssh"
    keys.mkdir(parents=True, mode=0o700)
    for key in (folder / "host_key", keys / "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    shutil.copy(keys / "id_ed25519.pub", keys / "authorized_keys")
    host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    (keys / "known_hosts").write_text(
        "".join(f"{name},{name}.local,{address} {host_key}\n" for name, address in ADDRESSES.items())
    )
    (folder / "sshd_config").write_text(_SSHD_CONFIG.format(folder=folder))
    real_home = pwd.getpwuid(0).pw_dir
    lines = Path("/etc/passwd").read_text().splitlines()
    root = f"root:x:0:0:root:{folder / 'home'}:/bin/bash"
    (folder / "passwd").write_text("\n".join([root, *(line for line in lines if not line.startswith("root:"))]) + "\n")
    (folder / "home" / ".cache").symlink_to(Path(real_home) / ".cache")  # compiled ops
    for host in ADDRESSES:
        # As Debian's installer writes it: a host's own name is an address of its loopback.
        others = {**ADDRESSES, NOBODY: _NOBODY_ADDRESS, host: "127.0.1.1"}
        others |= {f"{name}.local": others[name] for name in ADDRESSES}
        text = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in others.items())
        (folder / f"{host}.hosts").write_text(text)


def _be_host(host: str, folder: Path) -> None:
    """The first process of a host: prepares it, starts its sshd, and waits for what others leave behind."""
    subprocess.run(["hostname", host], check=True)
    for place in ("/dev/shm", "/run"):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    for name, place in ((f"{host}.hosts", "/etc/hosts"), ("passwd", "/etc/passwd")):
        subprocess.run(["mount", "--bind", str(folder / name), place], check=True)
    Path("/run/sshd").mkdir(mode=0o755)
    Path("/run/tmp").mkdir(mode=0o1777)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    environment = {"PATH": _PATH, "LANG": "C.UTF-8"}
    sshd = subprocess.Popen(
        [shutil.which("sshd", path=_PATH) or "sshd", "-D", "-e", "-f", str(folder / "sshd_config")], env=environment
    )
    (folder / f"{host}.ready").touch()
    while os.wait()[0] != sshd.pid:
        pass


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]


def _pid_namespace(pid: int) -> Path | None:
    try:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
            return None
        return Path(f"/proc/{pid}/ns/pid").readlink()
    except OSError:
        return None


def _is_sshd(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/exe").readlink().name.startswith("sshd")
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def main() -> None:
    """`host NAME FOLDER` is a host; without arguments a shell on h1."""
    if sys.argv[1:2] == ["host"]:
        _be_host(sys.argv[2], Path(sys.argv[3]))
        return
    reason = why_not()
    if reason:
        sys.exit(reason)
    with running_hosts() as hosts:
        enter = ["nsenter", "-t", str(hosts.init("h1")), *_NAMESPACES, "--"]
        environment = os.environ | {"HOME": str(hosts.home), "TMPDIR": "/run/tmp"}
        subprocess.run([*enter, *(sys.argv[1:] or ["/bin/bash"])], env=environment, check=False)


if __name__ == "__main__":
    main()
