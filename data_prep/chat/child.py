"""Proves a chat template in a process of its own, which a hostile one can only bring down with itself."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from data_prep.errors import BadDataError, DataConfigError, PreparationError, RefusedError

if TYPE_CHECKING:  # with the template engine; the child loads it while its parent does other things
    from data_prep.chat.proof import Plan


@dataclass(frozen=True)
class Proof:
    """A proof under way. Leaving it as a context ends it."""

    child: subprocess.Popen[bytes]
    answer: IO[bytes]
    complaint: IO[bytes]

    def result(self) -> str:
        """Wait for what `template_proof.prove` found, which `read_plan` reads; raises as it does."""
        code = self.child.wait()
        self.answer.seek(0)
        self.complaint.seek(0)
        if code != 0:
            last = self.complaint.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
            why = f"signal {-code}" if code < 0 else last
            raise RefusedError(f"chat template: it takes too much time or memory, or breaks the interpreter ({why})")
        text = self.answer.read().decode()
        answer = json.loads(text)
        if "error" in answer:
            raise {kind.__name__: kind for kind in _ERRORS}[answer["error"]](answer["message"])
        return text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.child.kill()
        self.child.wait()
        self.answer.close()
        self.complaint.close()


def start_proof(
    source: str,
    special_tokens: Mapping[str, str],
    control_strings: Sequence[str],
    added_strings: Sequence[str],
    now: datetime,
    cpu_seconds: float | None = None,
) -> Proof:
    """Begin `prove` in a process of its own, with bounded CPU time and memory; it takes about a tenth of a second."""
    arguments = [source, dict(special_tokens), list(control_strings), list(added_strings), now.isoformat()]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    answer, complaint = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - Proof closes them
    with tempfile.TemporaryFile() as request:  # files and not pipes, so that neither waits for the other
        request.write(json.dumps([cpu_seconds, *arguments]).encode("utf-8", "surrogatepass"))
        request.seek(0)
        command = [sys.executable, "-m", "data_prep.chat.child"]
        child = subprocess.Popen(command, stdin=request, stdout=answer, stderr=complaint, env=environment)
    return Proof(child, answer, complaint)


def prove_apart(
    source: str,
    special_tokens: Mapping[str, str],
    control_strings: Sequence[str],
    added_strings: Sequence[str],
    now: datetime,
    cpu_seconds: float | None = None,
) -> "Plan":
    """`start_proof`, and wait for it."""
    with start_proof(source, special_tokens, control_strings, added_strings, now, cpu_seconds) as proof:
        return read_plan(proof.result())


def read_plan(text: str) -> "Plan":
    """The plan that a proof resulted in."""
    from data_prep.chat.proof import plan_from_json

    return plan_from_json(json.loads(text))


_ERRORS: tuple[type[PreparationError], ...] = (BadDataError, DataConfigError, RefusedError)


def _child() -> None:
    from data_prep.chat.proof import prove
    from data_prep.chat.sandbox import CPU_LIMIT_SECONDS, limits

    cpu_seconds, source, special_tokens, control, added, now = json.loads(
        sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    )
    answer: dict[str, Any]
    try:
        with limits(cpu_seconds or CPU_LIMIT_SECONDS):
            answer = asdict(prove(source, special_tokens, control, added, datetime.fromisoformat(now)))
    except _ERRORS as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    _child()
