"""Records that cannot be used: noted where they are met, and listed, counted or refused where parts come together."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from data_prep.config import DataConfig
from data_prep.errors import (
    MOST_LISTED,
    NO_GOLD_LABEL,
    NO_TARGETS,
    OVERLONG,
    OVERLONG_ADVICE,
    BadDataError,
    Finding,
    FindingsError,
    UnusableError,
)
from data_prep.pipeline.parts import PartAccount
from data_prep.pipeline.work import Work

#: A ledger shows so many places of each reason.
_PLACES = 3
_HELD = 4096
_FRACTION = 0.01  # of a source's records that may be dropped where the run file says nothing, and
_FEW = 20  # so many, whatever their share
_ADVICE = "mend, or set data.unusable=drop to leave out and count such records"
_PLACE = re.compile(r":(\d+| (?:row|element|article) \d+(?:, [a-z]+ \d+)*)")


class Unusable:
    """The records of one split of a part that cannot be used: counts by reason, and the first of them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._findings: list[Finding] = []

    def add(self, work: Work, piece: int, line: int, fault: BadDataError) -> None:
        """Note a record of piece number `piece` of `work`."""
        label, said = work.pieces[piece][0].label, str(fault)
        text = said.removeprefix(label) if said.startswith(f"{label}:") else said
        self.counts[fault.reason] += 1
        self._findings.append(Finding(piece, line, fault.reason, text))
        if len(self._findings) > _HELD:
            self._findings = self.first()

    def first(self) -> list[Finding]:
        """The first records in the order of the input, and the first of each reason."""
        found: list[Finding] = []
        seen: Counter[str] = Counter()
        for finding in sorted(self._findings, key=lambda one: (one.piece, one.line)):
            seen[finding.reason] += 1
            if len(found) < MOST_LISTED or seen[finding.reason] <= _PLACES:
                found.append(finding)
        return found


def refused(counts: Mapping[str, int], config: DataConfig) -> int:
    """How many of the records that cannot be used `config` does not leave out without an error."""
    if config.unusable == "drop":
        return counts.get(OVERLONG, 0)
    return num_unusable(counts, config.min_targets)


def num_unusable(counts: Mapping[str, int], min_targets: int | None) -> int:
    """How many records cannot be used; with `min_targets`, too few targets are another matter.

    Texts without a gold label are none of them: nothing is wrong with these records, and they are left out by rule.
    """
    others = {NO_GOLD_LABEL} if min_targets is None else {NO_GOLD_LABEL, NO_TARGETS}
    return sum(count for reason, count in counts.items() if reason not in others)


class Listing:
    """The findings of a preparation in the order of its input; raises UnusableError when there are enough."""

    def __init__(self, config: DataConfig):
        self._config = config
        self._found: list[tuple[str, str]] = []  # reason and message
        self._count = 0

    def add(self, work: Work, accounts: Collection[PartAccount]) -> None:
        """Add what the settings do not let go of the splits of a part."""
        findings = [one for account in accounts for one in account.unusable if refused({one.reason: 1}, self._config)]
        findings.sort(key=lambda one: (one.piece, one.line))
        self._found += [(finding.reason, labelled(work, finding)) for finding in findings]
        self._count += sum(refused(account.dropped, self._config) for account in accounts)
        if self._count >= MOST_LISTED:
            raise UnusableError(self._lines(complete=False))

    def add_error(self, work: Work, error: BadDataError) -> None:
        """Add what ended the encoding of a part, and raise it, with the findings before it."""
        then = None if isinstance(error, FindingsError) else str(error)
        if isinstance(error, FindingsError):
            self._found += [(finding.reason, labelled(work, finding)) for finding in error.findings]
            self._count += len(error.findings)
            then = error.then
        if not self._found:
            raise error
        raise UnusableError(self._lines(complete=False, then=then))

    def check(self) -> None:
        """Raise UnusableError if there are findings: the whole input has been read."""
        if self._found:
            raise UnusableError(self._lines(complete=True))

    def _lines(self, complete: bool, then: str | None = None) -> list[str]:
        shown = self._found[:MOST_LISTED]
        lines = [text for _, text in shown]
        lines += [] if then is None else [then]
        reasons = {reason for reason, _ in shown}
        if OVERLONG in reasons:
            lines.append(OVERLONG_ADVICE)
        if reasons - {OVERLONG}:
            lines.append(f"{_how_many(self._count, complete)}: {_ADVICE}")
        return lines


def _how_many(count: int, complete: bool) -> str:
    records = "1 record" if count == 1 else f"{count} records"
    return f"{records} cannot be used" if complete else f"{records} cannot be used, and there may be more"


def labelled(work: Work, finding: Finding) -> str:
    """The whole message of a finding, with the name of its file."""
    label = work.pieces[finding.piece][0].label
    return f"{label}{finding.text}" if finding.text.startswith(":") else finding.text


def first_of_source(works: Sequence[Work], findings: Sequence[Sequence[Finding]]) -> list[tuple[str, str, str]]:
    """(reason, place, message) of the first records of a source that were left out, as the manifest keeps them."""
    found: list[tuple[str, str, str]] = []
    seen: Counter[str] = Counter()
    for work, finding in ((work, one) for work, own in zip(works, findings, strict=True) for one in own):
        seen[finding.reason] += 1
        if len(found) < MOST_LISTED or seen[finding.reason] <= _PLACES:
            match = _PLACE.match(finding.text)
            label = work.pieces[finding.piece][0].label
            found.append((finding.reason, f"{label}{match.group()}" if match else label, labelled(work, finding)))
    return found


def check_sources(config: DataConfig, split: str, sources: Sequence[Mapping[str, Any]]) -> None:
    """Raise UnusableError if a store with these `sources` left out records that `config` does not let go."""
    for source in sources:
        count = num_unusable(source["dropped"], config.min_targets)
        if not count:
            continue
        entries = [(reason, text) for reason, _, text in source.get("unusable", ())]
        lines = [text for reason, text in entries if num_unusable({reason: 1}, config.min_targets)][:MOST_LISTED]
        if config.unusable == "error":
            raise UnusableError([*lines, f"{_how_many(count, complete=True)}: {_ADVICE}"])
        _check_share(config, split, source, count, lines)


def _check_share(config: DataConfig, split: str, source: Mapping[str, Any], count: int, lines: list[str]) -> None:
    """Raise UnusableError if `count` records are too large a share of their source."""
    records = source["records_read"] - source["records_of_other_split"]
    given = config.max_unusable_fraction
    most = max(_FEW, records * _FRACTION) if given is None else records * given
    if count <= most:
        return
    share = f"{count:,} of {records:,} records of source {source['name']} ({split}) cannot be used"
    allowed = f"data.max_unusable_fraction {_FRACTION if given is None else given:g} allows"
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in source["dropped"].items())
    advice = f"mend, or set data.max_unusable_fraction={math.ceil(1000 * count / records) / 1000:g}"
    raise UnusableError([*lines, f"{share}, more than {allowed} ({reasons}): {advice}"])
