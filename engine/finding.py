"""A finding of a check before a run; its verdict never promises more than was seen."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from engine.errors import SUPERVISED, ConfigError, FulltuneError, MissingInputError

#: error: would break the run; warning: would not, but is worth knowing; skipped: could not be looked at.
Verdict = Literal["ok", "warning", "error", "skipped"]


@dataclass(frozen=True)
class Finding:
    """A line: the check's name, the node it is about ("" for the whole job), what was found, what to do about it.

    `code` is the exit code with which an error ends the run.
    """

    name: str
    verdict: Verdict
    found: str
    to_do: str = ""
    node: str = ""
    code: int = ConfigError.exit_code

    @property
    def text(self) -> str:
        """The finding and its advice, in one line."""
        return f"{self.found}; {self.to_do}" if self.to_do else self.found


class RefusedError(FulltuneError):
    """Checks found something that would break the run; each error stands in a line of its own."""

    def __init__(self, errors: Sequence[Finding]):
        super().__init__("\n".join(f"{error.name}: {error.text}" for error in errors))
        self.exit_code = exit_code(errors)


def is_bad(findings: Iterable[Finding]) -> bool:
    """True if one of them would break the run."""
    return any(finding.verdict == "error" for finding in findings)


def exit_code(findings: Iterable[Finding]) -> int:
    """The code with which a run of these findings ends: 0, or that of its errors, or 78 where those differ."""
    codes = {finding.code for finding in findings if finding.verdict == "error"}
    return 0 if not codes else codes.pop() if len(codes) == 1 else ConfigError.exit_code


def refuse(findings: Iterable[Finding]) -> None:
    """RefusedError with all errors among the findings, if there is one."""
    if errors := [finding for finding in findings if finding.verdict == "error"]:
        raise RefusedError(errors)


def failure(name: str, error: Exception, to_do: str = "") -> Finding:
    """The finding for an error that names its exit code; any other error is a defect of ours, and raised."""
    code = getattr(error, "exit_code", None)
    if not isinstance(code, int):
        raise error
    return Finding(name, "error", " ".join(str(error).split()), to_do, code=code)


def failures(name: str, error: Exception, to_do: str = "") -> list[Finding]:
    """A finding for each line of an error, as `failure`; `to_do` is the last one's."""
    first = failure(name, error)
    lines = [" ".join(line.split()) for line in str(error).splitlines()] or [first.found]
    *others, last = (replace(first, found=line) for line in lines)
    return [*others, replace(last, to_do=to_do)]


def warning_lines(finding: Finding) -> list[str]:
    """A line for a warning that ranks find; none for ranks of `fulltune`, which has printed it before they started."""
    is_said = finding.verdict != "warning" or SUPERVISED in os.environ
    return [] if is_said else [f"warning: {finding.name}: {finding.text}"]


def not_there_yet(finding: Finding) -> Finding:
    """The finding as a plan has it: a missing input is an error for a start, and worth knowing before."""
    is_missing = finding.verdict == "error" and finding.code == MissingInputError.exit_code
    return replace(finding, verdict="warning") if is_missing else finding
