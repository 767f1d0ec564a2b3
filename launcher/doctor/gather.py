"""Gathers the facts of all nodes of a job at once: here, over ssh, or through `srun`.

A node is a process that runs `launcher.doctor.node_facts` and exchanges lines over its stdin and stdout. So only the
name of the Python program reaches a remote shell, and the wait for an answer ends at the limit. Other lines that a node
prints (greetings of a login shell or a module system) are skipped.
"""

import collections
import contextlib
import json
import os
import queue
import re
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from launcher.doctor.node_facts import join
from launcher.job.environment import PROJECT_DIR, python_environment
from launcher.job.hosts import is_host_name

LIMIT_SECONDS = 8.0
_CONNECT_SECONDS = 4
_LEAVE_SECONDS = 2.0
_SAFE = re.compile(r"[\w@%+=:,./-]+")


@dataclass
class Answer:
    """The facts of one node, or the reason why there are none.

    `skew_seconds` is the smallest error of its clock that explains the moments seen: 0 unless an error is certain.
    """

    node: str
    facts: dict[str, Any] | None = None
    error: str = ""
    skew_seconds: float = 0.0
    reach_error: str | None = None
    shares: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """How to reach nodes: the argv of one process, the nodes that answer through it, the request to each."""

    command: tuple[str, ...]
    nodes: tuple[str, ...]
    request: Mapping[str, Any]


class _Line:
    """A line of JSON from a node and when it came."""

    def __init__(self, values: dict[str, Any], seconds: float) -> None:
        self.values, self.seconds = values, seconds


class _Talk:
    """The running process of a target."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.started = time.time()
        self.lines: queue.Queue[_Line | None] = queue.Queue()
        self.process = subprocess.Popen(
            target.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            encoding="utf-8", errors="replace", start_new_session=True,
            env=os.environ | python_environment(),
        )  # fmt: skip
        self._errors: list[str] = []
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()
        self.send(target.request)

    def send(self, values: Mapping[str, Any]) -> None:
        """Write one line to the nodes; a node that is gone does not read it."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(values) + "\n")
            self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        pieces: dict[str, list[str]] = collections.defaultdict(list)
        for line in self.process.stdout:
            came = time.time()
            with contextlib.suppress(ValueError, KeyError):
                values = join(pieces, line)
                if values is not None:
                    self.lines.put(_Line(values, came))
        self.lines.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.strip():
                self._errors.append(" ".join(line.split()))

    def answers(self, deadline: float) -> Iterator[_Line]:
        """Yield a line of each node, as they come, until the deadline or the end of the process."""
        for _ in self.target.nodes:
            try:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return
            if line is None:
                self.lines.put(None)
                return
            yield line

    def why_silent(self, limit_seconds: float) -> str:
        """The reason why nodes did not answer: the last useful line that the process printed, or its exit code."""
        # Its output may have ended a moment before it has.
        self._readers[0].join(0.2)
        if not self._readers[0].is_alive():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_LEAVE_SECONDS)
        if self.process.poll() is None:
            return f"no answer within {limit_seconds:.0f} s"
        self._readers[1].join(0.5)
        useful = [line for line in self._errors if not line.startswith(("Warning:", "srun: error: task"))]
        return useful[-1] if useful else f"ended with code {self.process.returncode} and no answer"

    def leave(self) -> None:
        """End of stdin: the nodes remove what they made and go; whoever does not is killed."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def local_target(node: str, request: Mapping[str, Any]) -> Target:
    """This machine, by a process of its own like all others."""
    return Target((sys.executable, "-m", "launcher.doctor.node_facts"), (node,), {**request, "node": node})


def ssh_target(host: str, request: Mapping[str, Any]) -> Target:
    """A host of a hostfile, reached as DeepSpeed would. ConfigError for a name or path that a shell could mistake."""
    root = str(PROJECT_DIR)
    if not is_host_name(host):
        raise ConfigError(f"`{host}` is no host name")
    for word in (sys.executable, root):
        if not _SAFE.fullmatch(word):
            raise ConfigError(f"`{word}` would reach remote shells unquoted: use letters, digits and . _ - / = only")
    remote = shlex.join(
        ["env", f"PYTHONPATH={root}", "PYTHONSAFEPATH=1", sys.executable, "-m", "launcher.doctor.node_facts"]
    )
    options = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}")
    return Target(("ssh", *options, "--", host, remote), (host,), {**request, "node": host})


def srun_target(nodes: Sequence[str], request: Mapping[str, Any]) -> Target:
    """All nodes of the allocation, one task each; each calls itself what Slurm calls it."""
    count = len(nodes)
    words = ("srun", "--overlap", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--cpus-per-task=1",
             "--export=ALL")  # fmt: skip
    return Target((*words, sys.executable, "-m", "launcher.doctor.node_facts"), tuple(nodes), request)


@contextlib.contextmanager
def nonces(folders: Mapping[str, Path]) -> Iterator[dict[str, str]]:
    """A new file in each folder, by the same names, for other nodes to read; removed afterwards.

    The file holds its own path. A folder where no file can be made is left out; the folder's own check reports it.
    """
    made: dict[str, str] = {}
    try:
        for name, folder in folders.items():
            path = folder / f".fulltune-doctor-{secrets.token_hex(8)}"
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(str(path))
                made[name] = str(path)
        yield made
    finally:
        for path_text in made.values():
            Path(path_text).unlink(missing_ok=True)


def gather(
    targets: Sequence[Target],
    first: str,
    port: int | None,
    address: str | None = None,
    limit_seconds: float = LIMIT_SECONDS,
) -> list[Answer]:
    """Send all targets their requests at once; an answer for every node, in order.

    If there are several nodes and the first could take `port`, the others then try to reach it there: at `address`,
    or where DeepSpeed would look for it.
    """
    answers = {node: Answer(node) for target in targets for node in target.nodes}
    talks = []
    for target in targets:
        try:
            talks.append(_Talk(target))
        except OSError as error:
            for node in target.nodes:
                answers[node].error = f"cannot run {target.command[0]}: {error.strerror}"
    deadline = time.monotonic() + limit_seconds
    try:
        for talk in talks:
            for line in talk.answers(deadline):
                _take(answers, talk, line)
            for node in talk.target.nodes:
                if answers[node].facts is None:
                    answers[node].error = talk.why_silent(limit_seconds)
        if port is not None and len(answers) > 1:
            _try_to_meet(answers, talks, first, port, address)
        for talk in talks:
            _look_for_answers(answers, talk)
    finally:
        for talk in talks:
            talk.leave()
    return list(answers.values())


def _take(answers: Mapping[str, Answer], talk: _Talk, line: _Line) -> None:
    node = str(line.values["node"])
    if node not in answers:
        return
    answer = answers[node]
    answer.facts = line.values
    # Its first look at the clock came after our start, its last before its line came: what is outside is certain.
    began, ended = (float(moment) for moment in line.values.get("clock", (talk.started, line.seconds)))
    if began < talk.started:
        answer.skew_seconds = began - talk.started
    elif ended > line.seconds:
        answer.skew_seconds = ended - line.seconds


def _try_to_meet(
    answers: Mapping[str, Answer], talks: Sequence[_Talk], first: str, port: int, address: str | None
) -> None:
    """Have every other node connect to the rendezvous port of the first."""
    facts = answers[first].facts if first in answers else None
    if facts is None or facts.get("port_error"):
        return
    place = address or next(iter(facts["machine"]["addresses"]), None)
    if place is None:
        return
    for talk in talks:
        talk.send({"address": place, "port": port, "token": talk.target.request.get("token")})
    deadline = time.monotonic() + LIMIT_SECONDS / 2
    for talk in talks:
        for line in talk.answers(deadline):
            node = str(line.values["node"])
            if node in answers and "reach" in line.values:
                problem = str(line.values["reach"])
                answers[node].reach_error = f"{place} port {port}: {problem}" if problem else ""


def _look_for_answers(answers: Mapping[str, Answer], talk: _Talk) -> None:
    """Note for each node and folder if the node sees our file there, and we see the node's file beside it."""
    wanted: Mapping[str, str] = talk.target.request.get("nonces", {})
    for node in talk.target.nodes:
        facts = answers[node].facts
        for name, path in wanted.items() if facts is not None else ():
            assert facts is not None
            made = facts["answers"].get(name)
            answers[node].shares[name] = facts["shared"].get(name) == path and made is not None and Path(made).exists()
