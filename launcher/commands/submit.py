"""``fulltune submit``: a batch script from slurm/'s template, handed to `sbatch`.

Nothing that a user wrote stands in a script but names and paths of a strict character set; whatever
else is in a run file and its overrides stays in a YAML file whose path the script names.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import slurm
from engine.errors import CannotWriteError, ConfigError, FulltuneError
from engine.file_modes import FOLDER_MODE, refuse_foreign, umask_for
from engine.finding import Finding, exit_code, failures, not_there_yet, refuse
from engine.run_file import dump_yaml
from engine.zero.ds_config import resolve_ds_config
from launcher.commands.arguments import add_run_file, checked_run
from launcher.doctor.check_here import check_here
from launcher.job import runs
from launcher.job.run_config import Run
from launcher.start.preflight import check_in_use, check_run

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(,[A-Za-z0-9][A-Za-z0-9._-]{0,63}){0,15}")
_FEATURES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,&|-]{0,127}")
_TIME = re.compile(r"(\d{1,3}-)?\d{1,4}(:[0-5]\d){0,2}")
_MEMORY = re.compile(r"\d{1,9}[KMGT]?")
#: Of paths in scripts: nothing that bash, sbatch (%) or a tool's options could take for more than a name.
_PATH = re.compile(r"/[A-Za-z0-9._/+=@,:-]{0,1023}")
_SITE = ("# ---- site", "# ---- end of site")
_CPUS_OF_PREPARATION = 8
# Slurm signals up to a minute late, and the ranks end a micro-batch first.
_STOP_SECONDS = 180


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run file, and the options for Slurm."""
    add_run_file(parser)
    add = parser.add_argument
    add("--nodes", type=int, default=1, metavar="N", help="default: 1")
    add("--gpus-per-node", type=int, default=0, metavar="G", help="a rank each; 0 (default): CPU ranks")
    add("--ranks-per-node", type=int, metavar="R", help="default: G; needed on CPUs")
    add("--cpus-per-rank", type=int, metavar="C", help="default: the nodes whole (--exclusive)")
    add("--mem", default="0", metavar="SIZE", help="memory of each node, such as 64G; default: all of it")
    add("--time", metavar="TIME", help="limit, such as 24:00:00 or 2-12; a longer run comes back by itself")
    add("--stop-seconds", type=int, default=_STOP_SECONDS, metavar="S",
        help=f"save and requeue so long before the limit (default: {_STOP_SECONDS})")  # fmt: skip
    for option in ("partition", "account", "qos", "reservation", "constraint"):
        add(f"--{option}", metavar="NAME", help="as in sbatch")
    add("--name", metavar="NAME", help="of the job (default: the run folder's)")
    add("--site", type=Path, metavar="FILE", help="shell file read first on the nodes: modules, network variables")
    add("--restarts", type=int, default=0, metavar="N", help="after a crash or a hang, go on within the job, N times")
    add("--prepare", action="store_true", help="make the token store in a CPU job first; training waits for it")
    add("--prepare-partition", metavar="NAME", help="where (default: as --partition)")
    add("--prepare-cpus", type=int, default=_CPUS_OF_PREPARATION, metavar="C",
        help=f"default: {_CPUS_OF_PREPARATION}")  # fmt: skip
    add("--prepare-time", metavar="TIME", help="default: as --time")
    add("--dry-run", action="store_true", help="print the scripts; write and submit nothing")


def run(arguments: argparse.Namespace) -> int:
    """Write the run's batch scripts and submit them, or print them."""
    run = checked_run(arguments)
    return _submit(run, check_request(arguments, run.config.run_dir), arguments.dry_run)


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
        **_common(request),
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
        **_common(request),
        "partition": request.prepare_partition or request.partition,
        "time": request.prepare_time or request.time,
        "requeue": "",
        "open-mode": "append",
        "output": f"{folder}/slurm-prepare-%j.log",
    }
    return _fill("prepare.sbatch", header, request, [f"{folder}/submitted.yaml"])


def _common(request: Request) -> dict[str, str | int | None]:
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


def _submit(run: Run, request: Request, dry_run: bool) -> int:
    """Write the scripts of a run into its folder and submit them; returns the exit code."""
    findings = _findings(run, request.nodes * request.ranks_per_node)
    run_dir = run.config.run_dir
    scripts = [("prepare.sbatch", preparation_script(request, run_dir))] if request.prepare else []
    scripts.append(("train.sbatch", training_script(request, run_dir)))
    if dry_run:
        for name, text in scripts:
            print(f"# {run_dir / name}\n{text}")
        findings = [not_there_yet(finding) for finding in findings]
        _print(findings, "error", "warning", "skipped")
        return exit_code(findings)
    _refuse_running(run_dir)
    _print(findings, "warning")
    refuse(findings)
    refuse_foreign(run_dir, run.config.share_with_group)
    try:
        run_dir.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWriteError(f"run_dir {run_dir}: cannot be created: {error.strerror}") from error
    values = run.config.model_dump(mode="json") | {"data": run.data.model_dump(mode="json")}
    runs.write_private(
        run_dir / "submitted.yaml", f"# What `fulltune submit` was given, resolved.\n{dump_yaml(values)}"
    )
    for name, text in scripts:
        runs.write_private(run_dir / name, text)
    job_ids = _hand_over([run_dir / name for name, _ in scripts], request, umask_for(run.config.share_with_group))
    log = run_dir / f"slurm-{job_ids[-1]}.log"
    first = job_ids[0] if request.prepare else None
    record = runs.JobRecord(host=os.uname().nodename, job_id=job_ids[-1], prepare_job_id=first, log=str(log))
    runs.write_record(run_dir, record)
    if request.prepare:
        print(f"preparing: Slurm job {job_ids[0]}, log {run_dir / f'slurm-prepare-{job_ids[0]}.log'}")
    after = f", after job {job_ids[0]}" if request.prepare else ""
    print(f"training: Slurm job {job_ids[-1]}{after}, log {log}")
    print(f"look with: fulltune status {shlex.quote(str(run_dir))}; fulltune logs -f {shlex.quote(str(run_dir))}")
    return 0


def _findings(run: Run, num_ranks: int) -> list[Finding]:
    """All that would be found out only after the queue, as far as this machine can know it."""
    found = []
    try:
        run.config.check_trainable()
        resolve_ds_config(run.config, num_ranks)
    except FulltuneError as error:
        found += failures("job", error)
    return [*found, *check_here(run, None), *check_run(run), check_in_use(run.config.run_dir)]


def _print(findings: list[Finding], *verdicts: str) -> None:
    """A line on stderr for each finding of these verdicts."""
    for finding in findings:
        if finding.verdict in verdicts:
            print(f"fulltune: {finding.verdict}: {finding.name}: {finding.text}", file=sys.stderr)


def _refuse_running(run_dir: Path) -> None:
    record = runs.read_record(run_dir)
    if record is not None and not runs.has_ended_elsewhere(run_dir, record) and runs.is_alive(record):
        who = f"Slurm job {record.job_id}" if record.job_id is not None else f"process {record.pid}"
        raise CannotWriteError(f"run_dir {run_dir}: {who} has it; `fulltune stop {run_dir}`, or choose another")


def _hand_over(scripts: list[Path], request: Request, umask: int) -> list[int]:
    """`sbatch` each, the next after the one before; their ids. If one is refused, those before it are cancelled."""
    # An option given here wins over its variable, such as SBATCH_PARTITION; other variables may be a site's defaults.
    given = [name for name in _common(request) if getattr(request, name) is not None]
    environment = {key: value for key, value in os.environ.items() if key not in {f"SBATCH_{n.upper()}" for n in given}}
    job_ids: list[int] = []
    for script in scripts:
        after = [f"--dependency=afterok:{job_ids[-1]}", "--kill-on-invalid-dep=yes"] if job_ids else []
        try:
            job_ids.append(_sbatch([*after, str(script)], environment, umask))
        except FulltuneError:
            for job_id in job_ids:
                runs.slurm_command("scancel", str(job_id), check=False)
            raise
    return job_ids


def _sbatch(words: list[str], environment: dict[str, str], umask: int) -> int:
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *words], env=environment, capture_output=True, text=True, timeout=120, check=False,
            stdin=subprocess.DEVNULL, umask=umask,  # the job inherits it, for its log
        )  # fmt: skip
    except FileNotFoundError:
        raise ConfigError("there is no `sbatch` here: submit on a Slurm cluster's login node") from None
    except subprocess.TimeoutExpired:
        raise FulltuneError(
            "`sbatch` did not answer within two minutes; look with squeue before trying again"
        ) from None
    if any(words in done.stderr for words in ("contact slurm controller", "resolve_ctls", "Could not establish")):
        raise ConfigError("no Slurm controller answers here: submit on a login node of the cluster")
    job_id = done.stdout.strip().partition(";")[0]
    if done.returncode or not job_id.isdecimal():
        raise FulltuneError(f"`sbatch` refused: {' '.join((done.stderr or done.stdout).split())}")
    return int(job_id)
