"""The table of benchmarks/prepare.py, on the terminal and as a record."""

import os
import platform
import statistics
import sys
import textwrap
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prepare_measure import ROOT, Usage

RULE = """\
CPU seconds are user + system of a process and all it started. Start-up does not count where a figure is about
throughput, for both sides alike: fulltune's is the same command on one record; TRL's its imports, its tokenizer and
the preparation of one record; of a raw tokenizer only the encoding itself counts. One worker, one thread; medians."""

#: figure: what it is, the goal in words, its bound, and whether the figure has to be at least that (or at most)
Goals = dict[str, tuple[str, str, float, bool]]
GOALS: Goals = {
    "text_vs_ceiling": ("plain text beside raw encode_batch_fast", ">= 0.90", 0.90, True),
    "chat_vs_trl": ("chat beside TRL, same tokenizer library", ">= 2.5", 2.5, True),
    "chat_fast_vs_trl": ("chat with gigatoken beside TRL", ">= 15", 15.0, True),
    "text_fast_vs_ceiling": ("plain text with gigatoken beside it raw", ">= 0.60", 0.60, True),
    "jsonl_fast_vs_ceiling": ("the same documents from JSON lines", "", 0.0, True),
    "files_fast_vs_ceiling": ("a tenth of them, a file each", "", 0.0, True),
    "fill_2048": ("rows of 2,048 filled", ">= 0.999", 0.999, True),
    "fill_8192": ("rows of 8,192 filled", ">= 0.999", 0.999, True),
    "fill_32768": ("rows of 32,768 filled", ">= 0.999", 0.999, True),
    "fill_131072": ("rows of 131,072 filled", ">= 0.999", 0.999, True),
    "bytes_per_token": ("bytes a token, marks and index included", "<= 2.2", 2.2, False),
    "mean_length": ("mean length of these documents, tokens", "", 0.0, True),
    "peak_rss_ratio": ("peak memory, 10 times the input", "about 1", 1.15, False),
    "peak_growth": ("MB more of it for each MB more of input", "<= 0.2", 0.2, False),
    "peak_rss_mb": ("peak memory of the largest process, MB", "", 0.0, True),
    "pack_1e7_8k_seconds": ("packing 10^7 lengths, rows of 8,192, s", "<= 0.6", 0.6, False),
    "pack_1e7_128k_seconds": ("packing 10^7 lengths, rows of 131,072, s", "<= 3", 3.0, False),
    "repack_1e6_seconds": ("another row length, s per 10^6 documents", "<= 1", 1.0, False),
    "first_document_seconds": ("start of the command to a plain text encoded, s", "<= 0.5", 0.5, False),
    "first_conversation_seconds": ("the same for a conversation, its template proven", "", 0.0, True),
    "one_record_seconds": ("a whole preparation of one conversation, s", "", 0.0, True),
    "gather_8192_microseconds": ("a batch at a random place, us per 8,192 tokens", "<= 120", 120.0, False),
    "seek_1e9_milliseconds": ("512 rows at position 10^9, ms", "<= 1", 1.0, False),
    "turns_linearity": ("cost a token, 32 turns beside 2", "about 1", 1.15, False),
    "identical_bytes_1_2_5_workers": ("bytes equal for 1, 2 and 5 workers", "true", 1.0, True),
    "heavy_imports": ("torch or transformers imported", "none", 0.0, False),
}


def print_table(figures: dict[str, Any], goals: Goals = GOALS) -> None:
    """Figures beside their goals."""
    for name, what, value, goal, verdict in judged(figures, goals):
        print(f"{name:30s} {value:>10s}  {goal:10s} {verdict:6s} {what}")


def judged(figures: dict[str, Any], goals: Goals) -> Iterator[tuple[str, str, str, str, str]]:
    """Each figure's name, what it is, its value, its goal, and whether it reaches that."""
    for name, (what, goal, bound, at_least) in goals.items():
        if name not in figures:
            continue
        value = figures[name]
        number = len(value) if isinstance(value, list) else value
        if value is None:
            verdict = "-"
        elif not goal:
            verdict = ""
        else:
            verdict = "yes" if (number >= bound if at_least else number <= bound) else "NO"
        yield name, what, _shown(value), goal, verdict


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "-", True: "true", False: "false"}[value]
    return f"{value:.4f}" if 0.9 < value < 1 else f"{value:.4g}"


def write_report(
    path: Path | None,
    figures: dict[str, Any],
    runs: dict[str, list[Usage]],
    counts: dict[str, int],
    peers: dict[str, Any],
) -> None:
    """Write the record: machine, versions, command, table, and every preparation that was measured."""
    today = date.today().isoformat()
    path = path or ROOT / "benchmarks" / "results" / f"{today}-prepare.md"
    parts = [
        "# Data preparation",
        f"{today}, {machine()}; {versions()}.",
        f"    {' '.join(['python', 'benchmarks/prepare.py', *sys.argv[1:]])}",
        RULE,
        textwrap.fill(
            f"{counts['few']} conversations beside TRL and {counts['many']} with gigatoken: GSM8K, Alpaca (en, zh) and"
            " three chat sets, a number put before the first turn of every copy so that no two are equal. Plain text:"
            f" {counts['documents']} documents, the sample texts and source files of installed packages, blank lines"
            " between them. GPT-2 vocabulary, a ChatML template with `{% generation %}`.",
            width=118,
        ),
        markdown(
            ("figure", "what", "value", "goal", "met"),
            [(name, what, value, goal, verdict) for name, what, value, goal, verdict in judged(figures, GOALS)],
        ),
        markdown(
            ("fulltune, whole process", "CPU s", "s", "peak MB", "documents", "tokens"),
            [_measured(name, usages) for name, usages in runs.items()],
        ),
        markdown(
            ("peer, without start-up", "CPU s", "tokens"),
            [(name, f"{found['seconds']:.2f}", found["tokens"]) for name, found in peers.items()],
        ),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"recorded in {path}")


def markdown(heads: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _measured(name: str, usages: list[Usage]) -> tuple[Any, ...]:
    """Medians of one preparation, its start-up included."""
    cpu, wall, peak = (
        statistics.median(values)
        for values in zip(*((usage.cpu_seconds, usage.wall_seconds, usage.peak_mb) for usage in usages), strict=True)
    )
    output = usages[-1].output
    return name, f"{cpu:.2f}", f"{wall:.2f}", f"{peak:.0f}", output.get("documents", ""), output.get("tokens", "")


def machine() -> str:
    """Cores, their model and the memory of this machine."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores {model}, {gib:.0f} GiB, Python {platform.python_version()}"


def versions(names: Sequence[str] = ("numpy", "tokenizers", "transformers", "datasets", "trl", "gigatoken")) -> str:
    """Versions of what was compared."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)
