"""A finding of a check, for `fulltune doctor` and before a start; its verdict never promises more than was seen."""

from dataclasses import dataclass
from typing import Literal

#: error: would break the run; warning: would not, but is worth knowing; skipped: could not be looked at.
Verdict = Literal["ok", "warning", "error", "skipped"]


@dataclass(frozen=True)
class Finding:
    """A line: the check's name, the node it is about ("" for the whole job), what was found, what to do about it."""

    name: str
    verdict: Verdict
    found: str
    to_do: str = ""
    node: str = ""


def is_bad(findings: list[Finding]) -> bool:
    """True if one of them would break the run."""
    return any(finding.verdict == "error" for finding in findings)
