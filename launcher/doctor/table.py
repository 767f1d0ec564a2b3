"""The table that `fulltune doctor` prints; it has colours on a terminal only."""

import dataclasses
import os
from collections.abc import Sequence
from typing import TextIO

from launcher.job.finding import Finding

_COLOURS = {"ok": "32", "warning": "33", "error": "31;1", "skipped": "2"}


def print_table(findings: Sequence[Finding], nodes: Sequence[str], out: TextIO) -> None:
    """Write the table to `out`."""
    colours = has_colours(out)
    rows = merged(findings, nodes)
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        place = f"{row.node}: " if row.node else ""
        print(f"{_verdict(row, colours)}  {row.name:<{width}}  {place}{_text(row)}", file=out)


def has_colours(out: TextIO) -> bool:
    """Whether `out` is a terminal whose user has not asked for plain text (https://no-color.org)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _verdict(row: Finding, colours: bool) -> str:
    text = f"{row.verdict:<7}"
    return f"\x1b[{_COLOURS[row.verdict]}m{text}\x1b[0m" if colours else text


def _text(row: Finding) -> str:
    text = f"{row.found}; {row.to_do}" if row.to_do else row.found
    # Other machines and files have a say in it: nothing in it may act on the terminal.
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def merged(findings: Sequence[Finding], nodes: Sequence[str]) -> list[Finding]:
    """Equal findings of several nodes as one, in the order of the first; a lone node needs no name."""
    places: dict[Finding, list[str]] = {}
    for finding in findings:
        places.setdefault(dataclasses.replace(finding, node=""), []).append(finding.node)
    rows = []
    for finding, where in places.items():
        named = [node for node in where if node]
        if len(nodes) < 2 or not named:
            label = ""
        elif len(named) == len(nodes):
            label = f"all {len(nodes)} nodes"
        else:
            label = ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")
        rows.append(dataclasses.replace(finding, node=label))
    return rows
