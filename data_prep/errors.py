"""Errors of data preparation: one line for a person, and the exit code the process ends with."""

from collections.abc import Sequence
from typing import NamedTuple


class PreparationError(Exception):
    """Base of what a user can get wrong. The message says what, where (file:line or dotted key) and what to do."""

    exit_code = 70


#: The reason under which a record that would train nothing is counted.
NO_TARGETS = "no_targets"
#: The reason of a text whose annotators agreed on no label, or whose label was held back: always left out and counted.
NO_GOLD_LABEL = "no_gold_label"


class BadDataError(PreparationError):
    """A record, tokenizer or store does not hold what it should. `reason`: what the ledger counts a record under."""

    exit_code = 65

    def __init__(self, message: str, reason: str = "not_understood"):
        super().__init__(message)
        self.reason = reason


class UntrainableError(BadDataError):
    """Records of a batch that would train nothing; `indices` says which. The message is about the first."""

    def __init__(self, message: str, indices: tuple[int, ...]):
        super().__init__(message, NO_TARGETS)
        self.args = (message, indices)  # what it is made again from, in another process
        self.indices = indices

    def __str__(self) -> str:
        return str(self.args[0])


class FatalDataError(BadDataError):
    """Bad data that is no matter of one record: leaving records out would not help, or not be right."""


class Finding(NamedTuple):
    """A record that cannot be used: its piece (span) and line, the reason, and the message behind the file's name."""

    piece: int
    line: int
    reason: str
    text: str

    def place(self) -> tuple[int, int]:
        """The key that sorts findings in the order of their input."""
        return self.piece, self.line


class FindingsError(BadDataError):
    """The records of some spans that cannot be used. `then`: the message of what ended the reading behind them."""

    def __init__(self, findings: Sequence[Finding], then: str | None = None):
        super().__init__(f"{len(findings)} records cannot be used")
        self.args = (findings, then)
        self.findings = findings
        self.then = then


class UnusableError(BadDataError):
    """All that is known of records that cannot be used: `lines` for people, the last of which says what to do."""

    def __init__(self, lines: Sequence[str]):
        super().__init__("")
        self.args = (lines,)
        self.lines = tuple(lines) if len(lines) > 2 else ("; ".join(lines),)  # a finding and what to do are one line

    def __str__(self) -> str:
        return "\n".join(self.lines)


#: An error lists so many records.
MOST_LISTED = 20


def none_usable(faults: Sequence[BadDataError]) -> BadDataError:
    """The error for a source whose first records all have faults: the fault itself, or the list of them."""
    if len(faults) == 1:
        return faults[0]
    found = "" if len(faults) <= MOST_LISTED else f", of which the first {MOST_LISTED} are listed"
    listed = [str(fault) for fault in faults[:MOST_LISTED]]
    advice = "mend them, or say what they are with `format:`, `shape:` and `fields:`"
    last = f"none of the first {len(faults)} records of this source can be used{found}: {advice}"
    return UnusableError([*listed, last])


class MissingInputError(PreparationError):
    """A file or folder that was named does not exist."""

    exit_code = 66


class CannotWriteError(PreparationError):
    """The store folder cannot be created or written."""

    exit_code = 73


class StorageError(PreparationError):
    """Reading or writing failed half-way."""

    exit_code = 74


class RefusedError(PreparationError):
    """An input would run code or leave its folder."""

    exit_code = 77


class DataConfigError(PreparationError):
    """The ``data`` section has values that cannot be meant."""

    exit_code = 78


#: The reason of a record that fits no row, about which `data.overlong` decides.
OVERLONG = "overlong"
OVERLONG_ADVICE = "raise data.row_tokens, or set data.overlong to drop, split or truncate"


def overlong_message(where: str, num_tokens: int, row_tokens: int) -> str:
    """The one line for a record that fits no row, without the advice."""
    return f"{where}: {num_tokens} tokens do not fit a row of {row_tokens} (data.row_tokens)"
