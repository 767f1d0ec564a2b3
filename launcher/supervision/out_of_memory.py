"""Evidence for or against the kernel's out-of-memory killer, and how much memory the ranks had."""

import contextlib
import os
import re
from pathlib import Path

_GIB = 2.0**30
_UNLIMITED_BYTES = 2**60  # cgroup v1 writes a number of this size for "no limit"


class MemoryWatch:
    """Looks at the memory of this machine's ranks while they run, for evidence of what killed one."""

    def __init__(self) -> None:
        self._bytes: dict[int, int] = {}  # last seen, by pid
        self._peaks: dict[int, int] = {}
        self._cgroups: dict[int, Path | None] = {}
        self._kills_before: dict[Path, int | None] = {}
        self._machine_kills_before = _machine_kills()
        self._kmsg = _open_kernel_log()

    def look(self, pids: list[int]) -> None:
        """Remember what these processes use now."""
        for pid in pids:
            used, peak = _resident_bytes(pid)
            if not used:
                continue
            self._bytes[pid] = used
            self._peaks[pid] = max(peak, self._peaks.get(pid, 0))
            if pid not in self._cgroups:
                folder = _memory_cgroup(pid)
                self._cgroups[pid] = folder
                if folder is not None and folder not in self._kills_before:
                    self._kills_before[folder] = _cgroup_kills(folder)

    def used_text(self, pids: dict[int, int]) -> str:
        """The memory that the ranks of this machine used at the last look, as text; `pids` by rank."""
        parts = [
            f"rank {rank} {self._bytes[pid] / _GIB:.1f} GiB (peak {self._peaks[pid] / _GIB:.1f})"
            for rank, pid in sorted(pids.items())
            if pid in self._bytes
        ]
        return ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")

    def evidence(self, pid: int) -> tuple[str, bool]:
        """Of a killed process: (what speaks for or against the out-of-memory killer, whether it probably was it)."""
        for line in self._kernel_lines():
            if re.search(rf"Killed process {pid}\b", line):
                return f"the kernel's log names it: {line.split(';', 1)[-1].strip()[:160]}", True
        folder = self._cgroups.get(pid)
        before = self._kills_before.get(folder) if folder is not None else None
        now = _cgroup_kills(folder) if folder is not None else None
        if now is not None and before is not None and now > before:
            limit = _cgroup_limit(folder) if folder is not None else None
            of = f" of {limit / _GIB:.1f} GiB" if limit else ""
            return f"out-of-memory kills in its cgroup rose from {before} to {now}; memory limit{of}", True
        machine = _machine_kills()
        if machine is not None and self._machine_kills_before is not None:
            if machine > self._machine_kills_before:
                return f"out-of-memory kills of this machine rose from {self._machine_kills_before} to {machine}", True
            return "the kernel counted no out-of-memory kill meanwhile: somebody or something sent the signal", False
        return "nothing readable counts out-of-memory kills here; see dmesg", True

    def close(self) -> None:
        """Let go of the kernel's log."""
        if self._kmsg is not None:
            os.close(self._kmsg)
            self._kmsg = None

    def _kernel_lines(self) -> list[str]:
        lines: list[str] = []
        while self._kmsg is not None and len(lines) < 10_000:
            try:
                lines.append(os.read(self._kmsg, 8192).decode(errors="replace"))
            except BrokenPipeError:
                continue  # the log was faster than we: some lines are gone
            except OSError:
                break
        return lines


def machine_limit_bytes() -> int:
    """The memory this process may use at most: the machine's, or its cgroup's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    folder = _memory_cgroup(os.getpid())
    limit = _cgroup_limit(folder) if folder is not None else None
    return min(total, limit or total)


def memory_cgroup_text() -> str | None:
    """The limit of this process's memory cgroup in words; None without one."""
    folder = _memory_cgroup(os.getpid())
    limit = _cgroup_limit(folder) if folder is not None else None
    return None if limit is None else f"{limit / _GIB:.1f} GiB by the cgroup {folder}"


def _open_kernel_log() -> int | None:
    try:
        kmsg = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        os.lseek(kmsg, 0, os.SEEK_END)
    return kmsg


def _resident_bytes(pid: int) -> tuple[int, int]:
    """(now, peak); zeros if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", text, re.MULTILINE))
    return int(found.get("VmRSS", 0)) * 1024, int(found.get("VmHWM", 0)) * 1024


def _memory_cgroup(pid: int) -> Path | None:
    """The folder of a process's memory cgroup, version 1 or 2."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for controllers, path in paths.items():
        folder = Path(f"/sys/fs/cgroup/memory{path}")
        if "memory" in controllers.split(",") and folder.is_dir():
            return folder
    folder = Path(f"/sys/fs/cgroup{paths.get('', '/')}")
    return folder if (folder / "memory.events").is_file() else None


def _cgroup_kills(folder: Path) -> int | None:
    for name in ("memory.events", "memory.oom_control"):
        with contextlib.suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", (folder / name).read_text(), re.MULTILINE)
            if found:
                return int(found[1])
    return None


def _cgroup_limit(folder: Path) -> int | None:
    """The tightest limit of a cgroup and those above it."""
    limits = []
    for level in (folder, *folder.parents):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((level / name).read_text()))
    return min((limit for limit in limits if limit < _UNLIMITED_BYTES), default=None)


def _machine_kills() -> int | None:
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
