"""The table of benchmarks/state.py, on the terminal and as a record."""

import statistics
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import prepare_report
from prepare_report import Goals, judged, machine, markdown, versions
from state_measure import ROOT

RULE = """\
Every measurement has its own processes; ranks share this machine's cores; DeepSpeed's zero3_offload on the CPU, bf16
weights with fp32 masters and moments. Anonymous memory is RssAnon, looked at every 5 ms: files that are mapped and
the page cache do not count. Seconds are those of the slowest rank, medians over rounds; imports, compiled ops and
tables that transformers makes once a process do not count, for both sides alike.

Loading: from an empty process group to an engine that could train, twice: without deepspeed.initialize, which both
sides call for the same buffers (load_vs_transformers: for transformers that leaves from_pretrained under ZeRO-3, for
ours building the model, partitioning, filling fp32 masters from the files and making the bf16 weights of
them), and with it (ready_vs_transformers). Bytes read are rchar of /proc/self/io between the two instants, whatever
they were read for. What a rank holds (partitions, masters, gradients, moments) is counted from the live tensors.

Saving: seconds in which training stands still, at the begin of a save and before the next update, while its files are
written, flushed to the disk and read back beside forward and backward; DeepSpeed's save_checkpoint of the same state
does not flush. Exporting: fp32 shards from warm files, both sides until the files are on the disk, ours until they
have been read back from it and compared, too; models of less than 150 MB are also opened and computed with. The first
export of a process, with all that it imports, gives the memory, later ones the time."""

GOALS: Goals = {
    "read_fraction": ("bytes read by a rank, as a share of model / ranks", "<= 1.01", 1.01, False),
    "load_vs_transformers": ("loading beside transformers, without deepspeed.initialize", ">= 3", 3.0, True),
    "ready_vs_transformers": ("the same with it", "", 0.0, True),
    "load_extra_mb": (
        "peak while loading, without what a rank holds and its largest tensor, MB",
        "<= 300",
        300.0,
        False,
    ),
    "stall_s": ("training stands still for a save, s", "<= 0.3", 0.3, False),
    "stall_vs_deepspeed": ("DeepSpeed's save_checkpoint beside it", ">= 5", 5.0, True),
    "bytes_per_parameter": ("bytes of a checkpoint per trained parameter", "<= 12.1", 12.1, False),
    "export_extra_mb": (
        "peak of an export without its largest tensor, MB, the larger of two models",
        "<= 500",
        500.0,
        False,
    ),
    "export_vs_zero_to_fp32": ("export to fp32 beside zero_to_fp32", ">= 1", 1.0, True),
    "export_vs_zero_to_fp32_unsynced": ("the same without waiting for the disk", "", 0.0, True),
    "export_vs_zero_to_fp32_unverified": (
        "the same without verification, of which zero_to_fp32 has none",
        "",
        0.0,
        True,
    ),
    "verification_share": ("a resume with hashes beside one without, minus 1", "<= 0.10", 0.10, False),
    "resume_extra_tensors": ("peak while resuming beyond what is kept, in largest tensors", "<= 1", 1.0, False),
    "seek_1e9_s": ("rows and micro-batches of any step of 10^9 tokens, s", "< 1", 1.0, False),
    "throughput_while_writing": ("speed of steps beside which a save is written", "", 0.0, True),
    "save_extra_mb": ("peak of such a step beyond that of another, MB", "", 0.0, True),
}


def print_table(figures: dict[str, Any]) -> None:
    """Figures beside their goals, then what they were made from."""
    prepare_report.print_table(figures, GOALS)
    for name, value in _others(figures):
        print(f"{name:45s} {value:>12s}")


def _others(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in figures.items():
        if name not in GOALS:
            yield name, "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def write_report(path: Path | None, figures: dict[str, Any], reports: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Write the record: machine, versions, command, tables."""
    today = date.today().isoformat()
    path = path or ROOT / "benchmarks" / "results" / f"{today}-state.md"
    names = ("torch", "deepspeed", "transformers", "accelerate", "safetensors")
    parts = [
        "# Loading, saving, resuming, exporting",
        f"{today}, {machine()}; {versions(names)}.",
        f"    {' '.join(['python', 'benchmarks/state.py', *sys.argv[1:]])}",
        RULE,
        markdown(("figure", "what", "value", "goal", "met"), list(judged(figures, GOALS))),
        markdown(("figure", "value"), list(_others(figures))),
        markdown(
            ("measurement", "rounds", "s", "peak MB of a rank", "kept MB", "MB read"),
            [_measured(name, rounds) for name, rounds in reports.items() if "peak_mb" in rounds[0][0]],
        ),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"recorded in {path}")


def _measured(name: str, rounds: list[list[dict[str, Any]]]) -> tuple[Any, ...]:
    """One measurement: the slowest rank's median, the largest of all ranks' peaks."""
    seconds = statistics.median(max(report["seconds"] for report in found) for found in rounds)
    largest = (max(r.get(key, 0) for found in rounds for r in found) for key in ("peak_mb", "kept_mb", "read_bytes"))
    peak, kept, read = largest
    return name, len(rounds), f"{seconds:.2f}", f"{peak:.0f}", f"{kept:.0f}", f"{read / 1e6:.0f}"
