"""The batch scripts of a run for Slurm, from slurm/'s templates, and the checked request that they are written for.

Nothing that a user wrote stands in a script but names and paths of a strict character set; whatever
else is in a run file and its overrides stays in a YAML file whose path the script names.
"""

import argparse
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import slurm
from engine.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(,[A-Za-z0-9][A-Za-z0-9._-]{0,63}){0,15}")
_FEATURES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,&|-]{0,127}")
_TIME = re.compile(r"(\d{1,3}-)?\d{1,4}(:[0-5]\d){0,2}")
_MEMORY = re.compile(r"\d{1,9}[KMGT]?")
#: Of paths in scripts: nothing that bash, sbatch (%) or a tool's options could take for more than a name.
_PATH = re.compile(r"/[A-Za-z0-9._/+=@,:-]{0,1023}")
_SITE = ("# ---- site", "# ---- end of site")


@dataclass(frozen=True)
class Request:
    """The job that Slurm is to run, checked. None: Slurm's own default."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    name: str
    time: str | None
    partition: str | None
    account: str | None
    qos: str | None
    reservation: str | None
    constraint: str | None
    cpus_per_rank: int | None
    mem: str
    stop_seconds: int
    site: Path | None
    prepare: bool
    prepare_partition: str | None
    prepare_cpus: int
    prepare_time: str | None
    restarts: int


def check_request(arguments: argparse.Namespace, run_dir: Path) -> Request:
    """The options of ``fulltune submit`` as a checked request. ConfigError names the option that is wrong."""
    gpus = _count(arguments.gpus_per_node, "--gpus-per-node", 0)
    ranks = arguments.ranks_per_node if arguments.ranks_per_node is not None else gpus
    if ranks == 0:
        raise ConfigError("give --gpus-per-node G, or --ranks-per-node R for CPU ranks")
    if gpus and _count(ranks, "--ranks-per-node") > gpus:
        raise ConfigError(f"--ranks-per-node {ranks}: there are {gpus} GPUs a node")
    cpus = arguments.cpus_per_rank
    request = Request(
        nodes=_count(arguments.nodes, "--nodes"),
        ranks_per_node=_count(ranks, "--ranks-per-node"),
        gpus_per_node=gpus,
        name=_matching(_NAME, arguments.name or _name_of(run_dir), "--name", "letters, digits and . _ -"),
        time=_optional(_TIME, arguments.time, "--time", "a time such as 30, 24:00:00 or 2-12"),
        partition=_optional(_NAMES, arguments.partition, "--partition", "names of letters, digits and . _ -"),
        account=_optional(_NAME, arguments.account, "--account", "letters, digits and . _ -"),
        qos=_optional(_NAME, arguments.qos, "--qos", "letters, digits and . _ -"),
        reservation=_optional(_NAMES, arguments.reservation, "--reservation", "names of letters, digits and . _ -"),
        constraint=_optional(_FEATURES, arguments.constraint, "--constraint", "names joined by & | or ,"),
        cpus_per_rank=None if cpus is None else _count(cpus, "--cpus-per-rank"),
        mem=_matching(_MEMORY, arguments.mem, "--mem", "a size such as 64G"),
        stop_seconds=_count(arguments.stop_seconds, "--stop-seconds"),
        site=None if arguments.site is None else Path(checked_path(arguments.site.absolute(), "--site")),
        prepare=arguments.prepare,
        prepare_partition=_optional(
            _NAMES, arguments.prepare_partition, "--prepare-partition", "names of letters, digits and . _ -"
        ),
        prepare_cpus=_count(arguments.prepare_cpus, "--prepare-cpus"),
        prepare_time=_optional(_TIME, arguments.prepare_time, "--prepare-time", "a time such as 04:00:00"),
        restarts=_count(arguments.restarts, "--restarts", 0),
    )
    _check_together(request)
    return request


def _check_together(request: Request) -> None:
    """ConfigError for a time limit that leaves no time to train, or a site file that is not there."""
    limit = None if request.time is None else seconds_of(request.time)
    if limit and limit <= request.stop_seconds:  # 0: Slurm's word for no limit
        raise ConfigError(
            f"--time {request.time}: the ranks are asked to stop {request.stop_seconds} s before it (--stop-seconds), "
            "which is as soon as they start: the job would come back for ever"
        )
    if request.site is not None and not request.site.is_file():
        raise ConfigError(f"--site {request.site}: no such file")


def seconds_of(time: str) -> int:
    """Seconds of a time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def checked_path(path: Path, what: str) -> str:
    """`path` as text that may stand in a script. ConfigError when a character in it could mean something there."""
    return _matching(_PATH, str(path), what, "a path of letters, digits and . _ - + = @ , : only")


def _name_of(run_dir: Path) -> str:
    """A job name from a run folder's."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", run_dir.name).lstrip("._-")[:64] or "fulltune"


def _matching(pattern: re.Pattern[str], value: str, what: str, allowed: str) -> str:
    if not pattern.fullmatch(value):
        raise ConfigError(f"{what}: write {allowed}, not {value!r}")
    return value


def _optional(pattern: re.Pattern[str], value: str | None, what: str, allowed: str) -> str | None:
    return None if value is None else _matching(pattern, value, what, allowed)


def _count(value: int, what: str, least: int = 1) -> int:
    if not least <= value <= 65535:
        raise ConfigError(f"{what}: write a number from {least} to 65535, not {value}")
    return value


def training_script(request: Request, run_dir: Path) -> str:
    """The batch script that trains the run whose folder this is."""
    folder = checked_path(run_dir, "run_dir")
    header = {
        "job-name": request.name,
        "nodes": request.nodes,
        "gpus-per-node": request.gpus_per_node or None,
        "ntasks-per-node": request.ranks_per_node,
        "cpus-per-task": request.cpus_per_rank,
        "exclusive": "" if request.cpus_per_rank is None else None,
        "mem": request.mem,
        **common(request),
        "requeue": "",
        "open-mode": "append",
        "output": f"{folder}/slurm-%j.log",
        "signal": f"TERM@{request.stop_seconds}",
    }
    words = [f"{folder}/submitted.yaml", "--ranks-per-node", str(request.ranks_per_node)]
    words += ["--restarts", str(request.restarts)] if request.restarts else []
    return _fill("train.sbatch", header, request, words)


def preparation_script(request: Request, run_dir: Path) -> str:
    """The batch script that makes the token store on CPUs."""
    folder = checked_path(run_dir, "run_dir")
    header = {
        "job-name": f"{request.name[:56]}-prepare",
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": request.prepare_cpus,
        **common(request),
        "partition": request.prepare_partition or request.partition,
        "time": request.prepare_time or request.time,
        "requeue": "",
        "open-mode": "append",
        "output": f"{folder}/slurm-prepare-%j.log",
    }
    return _fill("prepare.sbatch", header, request, [f"{folder}/submitted.yaml"])


def common(request: Request) -> dict[str, str | int | None]:
    names = ("time", "partition", "account", "qos", "reservation", "constraint")
    return {name: getattr(request, name) for name in names}


def _fill(template: str, header: dict[str, str | int | None], request: Request, words: list[str]) -> str:
    """The template with its #SBATCH lines, site lines and arguments replaced; all else as it is."""
    lines = (Path(slurm.__file__).parent / template).read_text(encoding="utf-8").splitlines()
    wanted = [
        f"#SBATCH --{key}{f'={value}' if value != '' else ''}" for key, value in header.items() if value is not None
    ]
    first = next(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    begin, end = (next(number for number, line in enumerate(lines) if line.startswith(mark)) for mark in _SITE)
    # Site files are rarely written for `set -u`.
    site = [] if request.site is None else ["set +u", f"source {shlex.quote(str(request.site))}", "set -u"]
    site.append(f'export PATH={shlex.quote(checked_path(Path(sys.executable).parent, "folder of Python"))}:"$PATH"')
    arguments = f"set -- {shlex.join(words)}"
    body = [line for line in lines[first:begin] if not line.lstrip("#").startswith("SBATCH")]
    comments = [f"# Written by `fulltune submit` from slurm/{template}.", *lines[1:first]]
    return "\n".join(
        [lines[0], *comments, *wanted, *body, "# ---- site ----", *site, arguments, *lines[end:], ""]
    )  # fmt: skip
