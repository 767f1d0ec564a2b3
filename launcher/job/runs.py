"""Who runs a run folder, and what was completed in it: records in the folder itself, and what Slurm says.

``run_dir/job.json`` names the local process or the Slurm job, ``run_dir/complete.json`` what was
completed. Nothing is kept outside of run folders.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.arithmetic import newest_checkpoint
from engine.errors import CannotWriteError, ConfigError, FulltuneError, MissingInputError
from engine.file_modes import FILE_MODE, FOLDER_MODE
from launcher.job.records import read_exits, read_starts
from launcher.job.run_config import Run

RECORD, COMPLETE, OUTCOME = "job.json", "complete.json", "outcome.json"
_ENDED = ("BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT").split()
_NUMBERS = ("job_id", "prepare_job_id", "pid", "started_ticks")


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """Who runs a run folder: a process of `host`, or the Slurm job `job_id`, which may wait for one that prepares."""

    host: str
    job_id: int | None = None
    prepare_job_id: int | None = None
    pid: int | None = None
    started_ticks: int | None = None
    log: str | None = None


def record_start(run_dir: Path, is_slurm_job: bool, environment: Mapping[str, str] = os.environ) -> None:
    """Note that this process runs the folder, or that the Slurm job does whose ranks it starts through `srun`."""
    for name in (COMPLETE, OUTCOME):
        (run_dir / name).unlink(missing_ok=True)
    job_id = environment.get("SLURM_JOB_ID", "")
    host = socket.gethostname()
    if is_slurm_job and job_id.isdecimal():
        before = read_record(run_dir)
        log = before.log if before is not None and before.job_id == int(job_id) else slurm_facts(int(job_id)).log
        write_record(run_dir, JobRecord(host=host, job_id=int(job_id), log=log))
    else:
        write_record(run_dir, JobRecord(host=host, pid=os.getpid(), started_ticks=start_ticks(os.getpid())))


def write_record(run_dir: Path, record: JobRecord) -> None:
    """Write job.json, for its owner's eyes alone."""
    write_private(run_dir / RECORD, json.dumps(record.__dict__, indent=2) + "\n")


def read_record(run_dir: Path) -> JobRecord | None:
    """Who ran this folder last; None if nobody said."""
    try:
        values = json.loads((run_dir / RECORD).read_text(encoding="utf-8"))
        numbers = {key: None if values[key] is None else int(values[key]) for key in _NUMBERS}
        log = None if values["log"] is None else str(values["log"])
        return JobRecord(host=str(values["host"]), log=log, **numbers)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_runs(named: list[Path]) -> list[Path]:
    """The named run folders; without names, all run folders in the current folder and two levels below it."""
    if named:
        for path in named:
            if not path.is_dir():
                raise MissingInputError(f"{path}: no such run folder")
        return [path.absolute() for path in named]
    here = Path.cwd()
    return sorted(record.parent for depth in ("", "*/", "*/*/") for record in here.glob(f"{depth}{RECORD}"))


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read; a reader sees the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, FILE_MODE)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    except OSError as error:
        raise CannotWriteError(f"cannot write {path}: {error.strerror}") from error


def record_outcome(run_dir: Path, code: int, message: str) -> None:
    """Note how this start of the run ended, in the words that its terminal got."""
    with contextlib.suppress(CannotWriteError):  # a full disk: the ranks' records tell as much
        write_private(run_dir / OUTCOME, json.dumps({"code": code, "message": message}, indent=2) + "\n")


def read_outcome(run_dir: Path) -> tuple[int, str] | None:
    """(exit code, words) of the last start that has ended; None if it was killed, or started without our command."""
    try:
        values = json.loads((run_dir / OUTCOME).read_text(encoding="utf-8"))
        return int(values["code"]), str(values["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def record_complete(run: Run) -> None:
    """Note that exactly this run file was trained to its end."""
    write_private(run.config.run_dir / COMPLETE, json.dumps(_what_is_complete(run), indent=2) + "\n")


def is_complete(run: Run) -> bool:
    """Whether this run file, as it is, was trained to its end and the checkpoint is still there."""
    try:
        values = json.loads((run.config.run_dir / COMPLETE).read_text(encoding="utf-8"))
        return bool(values == _what_is_complete(run))
    except (OSError, ValueError):
        return False


def _what_is_complete(run: Run) -> dict[str, str | None]:
    values = run.config.model_dump(mode="json") | {"data": run.data.model_dump(mode="json")}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    newest = newest_checkpoint(run.config.run_dir)
    return {"digest": digest, "checkpoint": None if newest is None else newest.name}


@dataclass(frozen=True)
class SlurmFacts:
    """What Slurm says about a job now; `state` is "" when it no longer knows it."""

    state: str
    reason: str
    nodes: str
    restarts: str
    log: str | None

    @property
    def is_alive(self) -> bool:
        """Whether it runs or will."""
        return bool(self.state) and self.state not in _ENDED


def slurm_facts(job_id: int) -> SlurmFacts:
    """Ask `scontrol`. ConfigError when there is none, or when it does not answer."""
    done = ask_slurm("scontrol", "show", "job", "-o", str(job_id), check=False)
    if done.returncode:
        if "Invalid job id" not in done.stderr:
            raise FulltuneError(f"`scontrol show job {job_id}` failed: {' '.join(done.stderr.split())}")
        return SlurmFacts("", "", "", "", None)

    def value(key: str) -> str:
        match = re.search(rf"(?:^|\s){key}=(\S*)", done.stdout)
        return match[1] if match else ""

    log = re.search(r"\sStdOut=(.*?)(?=\s\w+=|\s*$)", done.stdout)
    return SlurmFacts(value("JobState"), value("Reason"), value("NodeList"), value("Restarts"), log[1] if log else None)


def ask_slurm(*words: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run one of Slurm's commands. ConfigError where there is none, FulltuneError with its words if it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise ConfigError(f"there is no `{words[0]}` here: this needs a Slurm cluster's login node") from None
    except subprocess.TimeoutExpired:
        raise FulltuneError(f"`{words[0]}` did not answer within two minutes") from None
    if check and done.returncode:
        raise FulltuneError(f"`{words[0]}` refused: {' '.join((done.stderr or done.stdout).split())}")
    return done


def is_alive(record: JobRecord) -> bool:
    """Whether the process or job of a record runs or waits to run."""
    if record.job_id is not None:
        return slurm_facts(record.job_id).is_alive
    if record.host != socket.gethostname():
        raise ConfigError(
            f"it was started on {record.host}: ask there, or remove {RECORD} in the run folder if that host is gone"
        )
    return record.pid is not None and start_ticks(record.pid) == record.started_ticks is not None


def has_ended_elsewhere(run_dir: Path, record: JobRecord) -> bool:
    """Whether a run that a process of another machine started has ended: all its ranks have said so."""
    if record.job_id is not None or record.host == socket.gethostname():
        return False
    starts, exits = read_starts(run_dir), read_exits(run_dir)
    return bool(starts) and all(start.rank in exits for start in starts)


def start_ticks(pid: int) -> int | None:
    """When a process started, in the kernel's ticks: with its number, an identity. None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def forbid_requeue(job_id: int) -> None:
    """Take from a Slurm job the right to come back: a preemption or `scontrol requeue` then ends it."""
    ask_slurm("scontrol", "update", f"JobId={job_id}", "Requeue=0")
