"""Progress is a bar on a terminal, lines in a log, and silence where nobody asked."""

import os
import pty
import re
import subprocess
import sys
import termios

import pytest
from repository import ROOT

from data_prep.progress import Progress, clock


def on_terminal(body: str, columns: int) -> tuple[str, str]:
    """What a program writes to a terminal of this width on standard error, and its standard output."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    command = [sys.executable, "-c", f"from data_prep.progress import Progress\n{body}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    written = b""
    try:
        while block := os.read(ours, 1 << 16):
            written += block
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    output, _ = process.communicate()
    assert process.returncode == 0, written
    return written.decode(), output.decode()


@pytest.mark.parametrize("columns", [100, 0])
def test_bar_on_a_terminal(columns: int) -> None:
    body = "with Progress('reading', 4_000_000, True, plain_seconds=0) as bar:\n    for _ in range(4): bar.advance(1_000_000)"
    bar, lines = on_terminal(body, columns)
    assert lines == "", "no plain lines beside a bar"
    last = bar.rstrip().split("\r")[-1]
    assert "reading: 100%" in last and "4.00M/4.00M" in last
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d, .*B/s\]?$", last), "rate and remaining time"


def test_silence(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("reading", 10, False, plain_seconds=0) as progress:
        progress.advance(10)
    assert on_terminal("with Progress('reading', 10, False) as bar: bar.advance(10)", 80) == ("", "")
    with Progress("reading", 10, True) as progress:
        progress.advance(10)
    assert capfd.readouterr() == ("", ""), "work that is done before the first line is due needs none"


def test_lines_in_a_log(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("reading", 3_000_000, True, plain_seconds=0) as progress:
        progress.advance(750_000)
        progress.advance(2_250_000)
    first, second, last = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"reading: 25% of 3\.0 MB, [\d.]+ [kMGT]?B/s, \d+:\d\d(:\d\d)? left", first)
    assert re.fullmatch(r"reading: 100% of 3\.0 MB, [\d.]+ [kMGT]?B/s, 0:00 left", second)
    assert re.fullmatch(r"reading: 3\.0 MB in \d+:\d\d", last)


def test_other_units_and_unknown_totals(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("packing", 20_000, True, unit="documents", plain_seconds=0) as progress:
        progress.advance(10_000)
    assert re.match(r"packing: 50% of 20,000 documents, [\d,.]+ documents/s, ", capfd.readouterr().out)
    with Progress("streaming", None, True, unit="records", plain_seconds=0) as progress:
        progress.advance(1)
    assert re.match(r"streaming: 1 records, [\d,.]+ records/s\n", capfd.readouterr().out)
    with Progress("nothing", 0, True, plain_seconds=0) as progress:
        progress.advance(0)
    assert "nothing: 0 B" in capfd.readouterr().out


def test_an_error_is_no_end(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), Progress("reading", 10, True, plain_seconds=0) as progress:
        progress.advance(5)
        raise ValueError("broken")
    assert len(capfd.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (750, "12:30"), (11100, "3:05:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
