"""Runs one job to its end and explains how it ended.

Starts and watches `deepspeed` and hands signals on; the exit code is the ranks' own. The explanation has the cause's
traceback, stacks or evidence, and missing exit records are written.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from engine.errors import LOST_PEER, STOPPED_WITH_CHECKPOINT
from launcher.job.environment import remove_shared_memory
from launcher.job.job import Job, refuse_unsafe
from launcher.job.records import clear_records, exit_code_of, named, read_exits, read_starts, signal_number
from launcher.ssh.ranks import SSH_OPTIONS, SshRanks
from launcher.supervision.guard import Guard
from launcher.supervision.hang import Hang
from launcher.supervision.out_of_memory import machine_limit_bytes
from launcher.supervision.supervisor import MISSING_SECONDS, Liveness, Stop, Supervision, liveness


def _export_to_hosts(job: Job, alive: Liveness) -> dict[str, str]:
    """Add the supervisor's variables to the file that DeepSpeed exports to the hosts. Returns variables for ssh."""
    refuse_unsafe(list(alive.environment.values()))
    with Path(job.environment["DS_ENV_FILE"]).open("a", encoding="utf-8") as file:
        file.write("".join(f"{key}={value}\n" for key, value in alive.environment.items()))
    options = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}"
    return {"PDSH_SSH_ARGS_APPEND": options.strip()}


def run_job(job: Job, stop: Stop | None = None) -> tuple[int, str]:
    """Run `job` to its end; (exit code, one line that explains it unless it is 0).

    On INT, TERM, HUP and USR1 the ranks save a checkpoint and end; a second INT kills them. (`deepspeed` itself
    passes none of these on.) A dead or hanging rank ends the job. No process of the job is left at the end. If
    this process is killed, the ranks notice it, and a guard ends those that cannot.
    A caller that handles signals itself gives its `stop`.
    """
    if stop is None:
        with (stop := Stop()).handling():
            return run_job(job, stop)
    clear_records(job.run_dir)
    with liveness() as alive:
        environment = os.environ | job.environment | alive.environment
        ssh_ranks: SshRanks | None = None
        if job.starts_through_ssh:
            environment |= _export_to_hosts(job, alive)
            ssh_ranks = SshRanks(job.run_dir, alive.token, job.nodes)
        # A session of its own: a terminal's Ctrl-C then reaches us alone, and all of it can be found.
        process = subprocess.Popen(
            job.command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL if ssh_ranks else None
        )
        supervision = Supervision(
            process, job.run_dir, job.run_file, stop, alive.token, job.hang_seconds, job.num_ranks, ssh_ranks=ssh_ranks
        )
        guard: Guard | None = None
        try:
            mark = (job.run_dir, alive.token) if ssh_ranks else None
            guard = Guard(process.pid, (job.master_addr, job.master_port), alive.private_dir, environment, mark)
            supervision.stay()
        finally:
            supervision.end()
            remove_shared_memory(job.master_addr, job.master_port)
            if guard is not None:
                guard.dismiss()
    code, message = explain_end(job.run_dir, job.num_ranks, process.returncode, supervision, job.memory_rule)
    return (130, "interrupted twice: killed, no checkpoint saved") if stop.at_once and code else (code, message)


_GIB = 2.0**30
_LAST_LINES = 30


def explain_end(
    run_dir: Path, num_ranks: int, launcher_code: int, supervision: Supervision, memory_rule: str
) -> tuple[int, str]:
    """The exit code of the job and the line that explains it. Prints longer evidence and writes missing records."""
    findings, ssh_ranks = supervision.findings, supervision.ssh_ranks
    if findings.hang is not None and ssh_ranks is not None and ssh_ranks.cut_off:
        hosts = ", ".join(ssh_ranks.cut_off)
        return LOST_PEER, f"no network leads to {hosts} any more: ssh has ended, and the ranks could not agree to stop"
    if findings.hang is not None:
        text = _hang_text(run_dir, findings.hang, findings.culprit, findings.hang_file)
        _write_records(run_dir, supervision, {findings.culprit: None}, text)
        return LOST_PEER, text
    if findings.stopped_starting:
        return STOPPED_WITH_CHECKPOINT, "stopped on request while the ranks were starting, nothing to save: start again"
    if findings.missing:
        return LOST_PEER, f"{named(findings.missing)} never started, {MISSING_SECONDS:.0f} s after the first one did"
    # The code of a launcher that we ended ourselves means nothing.
    code, message = exit_code_of(run_dir, num_ranks, 1 if supervision.gave_up else launcher_code, findings.died_first)
    exits = read_exits(run_dir)
    signals = {rank: findings.signals.get(rank) for rank in findings.died_first}
    if code == LOST_PEER and signals:
        elsewhere = ssh_ranks is not None and not signals.keys() <= supervision.pids.keys()
        message = (
            _lost_text(ssh_ranks, signals, supervision)
            if ssh_ranks is not None and elsewhere
            else _killed_text(run_dir, signals, launcher_code, supervision, memory_rule)
        )
        _write_records(run_dir, supervision, signals, message)
    elif code not in (0, 75):
        cause = next((record for record in exits.values() if message.startswith(f"rank {record.rank} ")), None)
        if cause is not None and cause.traceback:
            print(f"rank {cause.rank}:\n{cause.traceback.rstrip()}", file=sys.stderr, flush=True)
    return code, message


def _hang_text(run_dir: Path, hang: Hang, rank: int, path: Path | None) -> str:
    host = next((start.host for start in read_starts(run_dir) if start.rank == rank), "?")
    print(_excerpt(path, rank), file=sys.stderr, flush=True)
    how = "is stopped (state T)" if hang.is_stopped else "hangs"
    where = f"in step {hang.beat.step}" if hang.beat.phase == "step" else f"in {hang.beat.phase}"
    after = f", {hang.beat.activity}" if hang.beat.activity else ""
    return (
        f"rank {rank} on {host} {how} {where}{after}: no sign of life for {hang.silent_seconds:.0f} s "
        f"(limit {hang.limit_seconds:.0f} s); all stacks: {path}"
    )


def _excerpt(path: Path | None, rank: int) -> str:
    """The culprit's part of the stacks, shortened."""
    text = path.read_text(encoding="utf-8") if path is not None and path.exists() else ""
    part = text.partition(f"=== rank {rank}:")[2].partition("\n=== rank ")[0].splitlines()
    shown = part[:60]
    return "\n".join([f"=== rank {rank}:{shown[0] if shown else ''}", *shown[1:]])


def _killed_text(
    run_dir: Path, signals: dict[int, int | None], launcher_code: int, supervision: Supervision, memory_rule: str
) -> str:
    """The killed ranks, the signal and the phase; for KILL also the evidence for or against memory as the reason."""
    ranks = sorted(signals)
    given = 0 if supervision.gave_up else signal_number(launcher_code) or 0
    number = next((found for found in signals.values() if found), given)
    beat = supervision.hangs.beats.get(ranks[0])
    where = f" in phase {beat.phase}, step {beat.step}" if beat is not None else ""
    was = "was" if len(ranks) == 1 else "were"
    which = f" (signal {number}, {signal.Signals(number).name})" if number else ""
    text = f"{named(ranks)} {was} killed{which}{where}, no exit record"
    if number not in (0, signal.SIGKILL):
        _print_log_end(run_dir, ranks[0])  # a crash of native code: its log has the stack
        return text
    pid = supervision.pids.get(ranks[0])
    evidence, is_memory = supervision.memory.evidence(pid) if pid is not None else ("it ran elsewhere; see dmesg", True)
    if not is_memory:
        return f"{text}; {evidence}"
    used = supervision.memory.used_text(supervision.pids)
    rule = f"; the rule says {memory_rule}" if memory_rule else ""
    return (
        f"host memory: {text}, {'probably ' if 'names it' not in evidence else ''}by the out-of-memory killer "
        f"({evidence}); last seen: {used or 'nothing'}; this machine gives {machine_limit_bytes() / _GIB:.1f} GiB{rule}"
    )


def _lost_text(ssh_ranks: SshRanks, signals: dict[int, int | None], supervision: Supervision) -> str:
    """The ranks that were killed on another host or are gone with it; only the network has brought facts about them."""
    ranks = sorted(signals)
    hosts = sorted({ssh_ranks.hosts[rank] for rank in ranks})
    which, is_are, was = (
        f"{named(ranks)} on {', '.join(hosts)}",
        *(("is", "was") if len(ranks) == 1 else ("are", "were")),
    )
    beat = supervision.hangs.beats.get(ranks[0])
    where = f" in phase {beat.phase}, step {beat.step}" if beat is not None else ""
    number = next((found for found in signals.values() if found), None)
    if number is not None:
        hint = f"; often the kernel's out-of-memory killer: see dmesg on {hosts[0]}" if number == signal.SIGKILL else ""
        return f"{which} {was} killed (signal {number}, {signal.Signals(number).name}){where}, no exit record{hint}"
    if not all(map(ssh_ranks.has_come_up, ranks)):
        return f"{which} did not come up: ssh to {', '.join(hosts)} has ended; the reason is printed above"
    return f"{which} {is_are} lost: ssh to {', '.join(hosts)} has ended, and no sign of life comes from there{where}"


def _print_log_end(run_dir: Path, rank: int) -> None:
    with contextlib.suppress(OSError):
        lines = (run_dir / "ranks" / f"rank-{rank:05d}.log").read_text(errors="replace").splitlines()
        crashes = [number for number, line in enumerate(lines) if line.startswith("Fatal Python error")]
        shown = lines[crashes[-1] :][: 2 * _LAST_LINES] if crashes else lines[-_LAST_LINES:]
        print(f"the last lines of rank {rank}:", *shown, sep="\n", file=sys.stderr, flush=True)


def _write_records(run_dir: Path, supervision: Supervision, signals: dict[int, int | None], message: str) -> None:
    """Exit records of ranks that could not write their own."""
    for rank, number in signals.items():
        path = run_dir / "ranks" / f"exit-{rank:05d}.json"
        beat = supervision.hangs.beats.get(rank)
        values = {
            "rank": rank, "code": LOST_PEER, "phase": beat.phase if beat else "", "step": beat.step if beat else 0,
            "signal": signal.Signals(number).name if number else None, "message": message, "traceback": None,
            "time": time.time(), "pid": supervision.pids.get(rank), "written_by": "supervisor",
        }  # fmt: skip
        if not path.exists():
            with contextlib.suppress(OSError):
                path.write_text(json.dumps(values, indent=2) + "\n")
