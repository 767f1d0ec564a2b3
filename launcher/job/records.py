"""The ranks' own records of their start and end, and the exit code of the run that follows from them.

`deepspeed` ends with 0 in some crashes. Every rank writes ``ranks/rank-00000.json`` when it starts
and ``ranks/exit-00000.json`` as its last act, so a rank without the second was killed. A batch
script uses this module by itself::

    RUN_DIR=$(python -m launcher.job.records start RUN.yaml key=value ...)
    deepspeed ...
    python -m launcher.job.records end RUN_DIR --ranks 16 --code $?
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import RunConfig
from engine.errors import (
    INTERNAL,
    LOST_PEER,
    OTHER_RANK_FAILED,
    STOPPED_WITH_CHECKPOINT,
    CannotWriteError,
    FulltuneError,
)
from engine.file_modes import refuse_foreign, set_umask
from engine.run_file import load_run_file

# From cause to consequence: a rank that lost its peer or stopped on request explains nothing.
_CAUSES_FIRST = (77, 78, 66, 65, 73, 74, 79, 70)


@dataclass(frozen=True)
class RankStart:
    """A rank's record of its start."""

    rank: int
    pid: int
    host: str


@dataclass(frozen=True)
class RankExit:
    """A rank's record of its end."""

    rank: int
    code: int
    phase: str
    message: str
    step: int = 0
    traceback: str = ""
    time: float = 0.0


def clear_records(run_dir: Path) -> None:
    """Remove the records of earlier starts, not their logs; call before ranks start and never while they run."""
    ranks_dir = run_dir / "ranks"
    markers = [ranks_dir / name for name in ("dump", "stop", "leave", "supervisor", "hang.txt")]
    patterns = ("*-*.json", "beat-*", "stacks-*", "alive-*")
    for path in [*(path for pattern in patterns for path in ranks_dir.glob(pattern)), *markers]:
        path.unlink(missing_ok=True)


def read_starts(run_dir: Path) -> list[RankStart]:
    """The ranks that have started so far."""
    return [
        RankStart(int(record["rank"]), int(record["pid"]), str(record["host"]))
        for record in _read_records(run_dir, "rank")
    ]


def failed_before(run_dir: Path, moment: float) -> bool:
    """True if a rank wrote a failing exit record before `moment` (seconds since 1970)."""
    return any(
        record.code and (run_dir / "ranks" / f"exit-{rank:05d}.json").stat().st_mtime < moment
        for rank, record in read_exits(run_dir).items()
    )


def read_exits(run_dir: Path) -> dict[int, RankExit]:
    """The exit records written so far, by rank."""
    return {
        int(record["rank"]): RankExit(
            int(record["rank"]),
            int(record["code"]),
            str(record.get("phase", "")),
            str(record.get("message") or ""),
            int(record.get("step") or 0),
            str(record.get("traceback") or ""),
            float(record.get("time") or 0.0),
        )
        for record in _read_records(run_dir, "exit")
    }


def _read_records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    records = []
    for path in sorted((run_dir / "ranks").glob(f"{kind}-*.json")):
        try:
            records.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue  # a rank that was killed while it wrote: as good as no record
    return records


def exit_code_of(run_dir: Path, num_ranks: int, launcher_code: int, died_first: Sequence[int] = ()) -> tuple[int, str]:
    """The honest exit code of a run and, unless it is 0, one line that explains it.

    0 only if every rank wrote 0. If the ranks agree, their code. A killed rank leaves no record; its
    peers then fail because of it, so the killed rank is the cause, with 76. Otherwise the code of the cause.
    `launcher_code` is what `deepspeed` or `srun` returned: how one of the first failing ranks ended.
    `died_first` are ranks that a supervisor saw vanish without a record while no other had failed.
    """
    exits = read_exits(run_dir)
    records = [exits[rank] for rank in range(num_ranks) if rank in exits]
    silent = [rank for rank in range(num_ranks) if rank not in exits]
    if not silent and len({record.code for record in records}) == 1:
        records.sort(key=lambda record: record.time)
        first = next((record for record in records if record.message != OTHER_RANK_FAILED), records[0])
        return first.code, "" if first.code == 0 else _describe(first)
    number = signal_number(launcher_code)
    killed = [rank for rank in died_first if rank in silent] or (silent if number and read_starts(run_dir) else [])
    if killed:
        hint = "; often the kernel's out-of-memory killer, see dmesg" if number in (None, signal.SIGKILL) else ""
        how = "was killed" if len(killed) == 1 else "were killed, or one was and the others after it"
        which = f" (signal {number})" if number else ""
        return LOST_PEER, f"{named(killed)} {how}{which}, no exit record{hint}"
    tellers = [record for record in records if record.message != OTHER_RANK_FAILED] or records
    tellers = sorted(tellers, key=lambda record: record.time)
    cause = next((record for code in _CAUSES_FIRST for record in tellers if record.code == code), None)
    if cause is not None:
        return cause.code, _describe(cause)
    if not silent:
        worst = max(records, key=lambda record: record.code)
        return worst.code, _describe(worst)
    if not read_starts(run_dir):
        return INTERNAL, f"no rank of {num_ranks} started (launcher code {launcher_code}); the reason is printed above"
    return LOST_PEER, f"{named(silent)} left no exit record (launcher code {launcher_code}); see the output above"


def named(ranks: list[int]) -> str:
    """`ranks 0, 3, 5`; at most eight of them."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}{more}"


def signal_number(code: int) -> int | None:
    """The signal in a return code: Popen's -9, a shell's 137, or the 247 that sys.exit(-9) becomes."""
    number = -code if code < 0 else code - 128 if 128 < code < 192 else 256 - code if 192 <= code < 256 else 0
    return number if number in {int(known) for known in signal.Signals} else None


def _describe(record: RankExit) -> str:
    if record.code == STOPPED_WITH_CHECKPOINT:
        return record.message or "stopped on request"
    phase = f" in phase {record.phase}" if record.phase else ""
    return f"rank {record.rank} ended with exit code {record.code}{phase}: {record.message or 'no message'}"


def main(argv: Sequence[str] | None = None) -> int:
    """For batch scripts: clear the records before the start, read them after the end."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher.job.records", description="the exit code of a run, by its ranks' records"
    )
    actions = parser.add_subparsers(dest="action", required=True)
    start = actions.add_parser("start", help="remove the records of earlier starts and print the run folder")
    start.add_argument("run_file", type=Path)
    start.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    end = actions.add_parser("end", help="print what happened and exit with the honest code")
    end.add_argument("run_dir", type=Path)
    end.add_argument("--ranks", type=int, required=True, help="number of ranks of the job")
    end.add_argument("--code", type=int, required=True, help="exit code of deepspeed or srun")
    arguments = parser.parse_args(argv)
    if arguments.action == "start":
        return _start(arguments.run_file, arguments.overrides)
    code, message = exit_code_of(arguments.run_dir, arguments.ranks, arguments.code)
    if message:
        print(f"fulltune: {message}", file=sys.stderr)
    return code


def _start(run_file: Path, overrides: list[str]) -> int:
    try:
        config = load_run_file(run_file, overrides).parse(RunConfig)
        run_dir = config.run_dir
        set_umask(config.share_with_group)
        refuse_foreign(run_dir, config.share_with_group)
        (run_dir / "ranks").mkdir(parents=True, exist_ok=True)
    except (FulltuneError, OSError) as error:
        print(f"fulltune: error: {error}", file=sys.stderr)
        return int(getattr(error, "exit_code", CannotWriteError.exit_code))
    clear_records(run_dir)
    print(run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
