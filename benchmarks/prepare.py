"""Data preparation beside TRL, the raw tokenizers and gigatoken: CPU seconds, memory, packing, size.

    python benchmarks/prepare.py [--quick] [--data FOLDER] [--work FOLDER] [--output FILE]

Everything is run from here, every preparation in a new process, round after round, on the texts of ../shared/data and
source files of installed packages. What is not installed (`make bench-deps`) is left out: its figures are null.
Last line: one JSON object. A run without --quick also writes benchmarks/results/<date>-prepare.md.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prepare_measure import ROOT, Usage, run, same_files, store_bytes
from prepare_report import RULE, print_table, write_report

HERE = Path(__file__).resolve().parent
CHAT_ROW_TOKENS, GATHER_ROW_TOKENS, OTHER_ROW_TOKENS, TEXT_ROW_TOKENS, TURNS_ROW_TOKENS = 2048, 8192, 4096, 8192, 65536


@dataclass(frozen=True)
class Sizes:
    """How much input, and how often it is measured."""

    rounds: int
    conversations: int
    copies: int
    slow_text_mb: float
    text_mb: float
    short_documents: int
    row_lengths: tuple[int, ...]
    pack_documents: int
    sub_batches: tuple[int, ...]
    containers: bool  # the plain text also as JSON lines, and a file a document


QUICK = Sizes(3, 2000, 1, 0.8, 16.0, 100_000, (8192,), 10**7, (64,), False)
FULL = Sizes(3, 10_000, 8, 6.0, 100.0, 1_000_000, (2048, 8192, 32768, 131072), 10**7, (16, 64, 256), True)


@dataclass
class Bench:
    """Where inputs and results of one benchmark are. `runs` has the usages of every named preparation."""

    work: Path
    sizes: Sizes
    fast: bool
    runs: dict[str, list[Usage]] = field(default_factory=dict)
    peers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)

    @property
    def many(self) -> str:
        """The preparation of all conversations."""
        return "chat gigatoken" if self.fast else "chat many"

    def prepare(
        self, name: str, source: str, backend: str, row_tokens: int, words: tuple[str, ...] = (), **options: Any
    ) -> Usage:
        """Prepare `source` in a new process and store, and note what it took under `name`."""
        folder = self.work / "stores" / options.pop("store", name)
        section = {
            "store_dir": str(folder), "train": [self._source(source)], "tokenizer": str(self.work / "tokenizer"),
            "row_tokens": row_tokens, "overlong": "truncate" if source.startswith("chat") else "split",
            "workers": 1, "backend": backend, **options,
        }  # fmt: skip
        usage = run([sys.executable, str(HERE / "prepare_run.py"), json.dumps(section), *words])
        self.runs.setdefault(name, []).append(usage)
        print(
            f"  {name:22s} {usage.cpu_seconds:6.2f} CPU s  {usage.wall_seconds:6.2f} s  {usage.peak_mb:5.0f} MB",
            flush=True,
        )
        return usage

    def _source(self, name: str) -> dict[str, str]:
        path = self.work / name
        if not name.startswith("text") or path.is_file():
            return {"path": str(path)}
        return {"path": str(path), "format": "text", "document": "file" if name == "text_files" else "blank_line"}

    def forget(self, name: str) -> None:
        """Remove the store of `name`, so that the next one is not found made."""
        shutil.rmtree(self.work / "stores" / name, ignore_errors=True)

    def peer(self, what: str, source: str, rounds: int) -> None:
        """Note what a peer takes without its start-up; with a reason on stderr that it is not installed."""
        if importlib.util.find_spec(what) is None:
            if what not in self.missing:
                print(f"{what} is not installed (make bench-deps): its figures are null", file=sys.stderr)
            self.missing.add(what)
            return
        words = [what, str(self.work), str(self.work / source), "--rounds", str(rounds)]
        words += ["--sub-batches", *map(str, self.sizes.sub_batches)]
        output = run([sys.executable, str(HERE / "prepare_peers.py"), *words]).output
        self.peers.setdefault(what, []).append(output)
        print(f"  {what:22s} {output['seconds']:6.2f} CPU s without start-up", flush=True)

    def raw(self, what: str) -> dict[str, Any] | None:
        """What a peer took, its median seconds among it; None if it is not installed."""
        if what not in self.peers:
            return None
        seconds = statistics.median(output["seconds"] for output in self.peers[what])
        return {**self.peers[what][-1], "seconds": seconds}

    def beyond(self, name: str, start: str) -> float:
        """Median CPU seconds of `name` beyond the median of `start`, the same preparation of one record."""
        both = (statistics.median(usage.cpu_seconds for usage in self.runs[key]) for key in (name, start))
        return next(both) - next(both)

    def ratio(self, seconds: float, name: str, start: str) -> float | None:
        """`seconds` over those of `name` beyond `start`; None with a reason on stderr if start-up hides them."""
        ours = self.beyond(name, start)
        if ours > 0:
            return seconds / ours
        print(f"{name}: too little input to tell from start-up", file=sys.stderr)
        return None


def make_inputs(work: Path, data: Path, sizes: Sizes) -> dict[str, int]:
    """Write tokenizer and inputs; how many of each there are."""
    arguments = {
        "--conversations": sizes.conversations, "--copies": sizes.copies, "--slow-text-mb": sizes.slow_text_mb,
        "--text-mb": sizes.text_mb, "--short-documents": sizes.short_documents,
    }  # fmt: skip
    words = [str(word) for pair in arguments.items() for word in pair]
    counts: dict[str, int] = run([sys.executable, str(HERE / "prepare_inputs.py"), str(data), str(work), *words]).output
    return counts


def measure_rounds(bench: Bench) -> None:
    """Every preparation once a round, one after the other."""
    plan = [
        ("start chat tokenizers", "chat_tiny.jsonl", "tokenizers", CHAT_ROW_TOKENS),
        ("chat tokenizers", "chat_parts", "tokenizers", CHAT_ROW_TOKENS),
        ("start text tokenizers", "text_tiny", "tokenizers", TEXT_ROW_TOKENS),
        ("text tokenizers", "text_few", "tokenizers", TEXT_ROW_TOKENS),
    ]
    if bench.fast:
        plan += [
            ("start chat gigatoken", "chat_tiny.jsonl", "gigatoken", CHAT_ROW_TOKENS),
            ("chat gigatoken", "chat_many.jsonl", "gigatoken", CHAT_ROW_TOKENS),
            ("start text gigatoken", "text_tiny", "gigatoken", TEXT_ROW_TOKENS),
            ("text gigatoken", "text_many", "gigatoken", TEXT_ROW_TOKENS),
        ]
    for number in range(bench.sizes.rounds):
        print(f"round {number + 1} of {bench.sizes.rounds}", flush=True)
        for name, source, backend, row_tokens in plan:
            bench.forget(name)
            bench.prepare(name, source, backend, row_tokens)
        bench.peer("tokenizers", "text_few", 1)
        bench.peer("gigatoken", "text_many", 1)
        if number == bench.sizes.rounds // 2:  # its imports take longest, so it does all its rounds in one process
            bench.peer("trl", "chat_few.jsonl", bench.sizes.rounds)


def compare(bench: Bench, counts: dict[str, int]) -> dict[str, float | None]:
    """The ratios that the goals are about."""
    ratios = ("text_vs_ceiling", "chat_vs_trl", "chat_fast_vs_trl", "text_fast_vs_ceiling")
    figures: dict[str, float | None] = dict.fromkeys(ratios)
    trl, tokenizers, gigatoken = map(bench.raw, ("trl", "tokenizers", "gigatoken"))
    for name, raw in (("tokenizers", tokenizers), ("gigatoken", gigatoken)):
        ours = bench.runs[f"text {name}"][-1].output if raw is not None else None
        if raw and ours and ours["tokens"] != raw["tokens"] + raw["documents"]:  # an end token behind each
            raise SystemExit(f"text {name}: {ours['tokens']} tokens beside {raw['tokens']}: not the same documents")
    if tokenizers is not None:
        figures["text_vs_ceiling"] = bench.ratio(tokenizers["seconds"], "text tokenizers", "start text tokenizers")
    if trl is not None:
        figures["chat_vs_trl"] = bench.ratio(trl["seconds"], "chat tokenizers", "start chat tokenizers")
    if bench.fast and trl is not None:
        as_many = trl["seconds"] / counts["few"] * counts["many"]
        figures["chat_fast_vs_trl"] = bench.ratio(as_many, "chat gigatoken", "start chat gigatoken")
    if gigatoken is not None:
        for name in ("text", "jsonl", "files") if bench.sizes.containers else ("text",):
            tokens = bench.runs[f"{name} gigatoken"][-1].output["tokens"]
            raw = gigatoken["seconds"] * tokens / gigatoken["tokens"]
            figures[f"{name}_fast_vs_ceiling"] = bench.ratio(raw, f"{name} gigatoken", "start text gigatoken")
    return figures


def measure_others(bench: Bench) -> None:
    """Preparations that are measured once: other containers, long conversations, workers, memory, rows."""
    backend = "gigatoken" if bench.fast else "tokenizers"
    if bench.fast and bench.sizes.containers:
        bench.prepare("jsonl gigatoken", "text.jsonl", backend, TEXT_ROW_TOKENS)
        bench.prepare("files gigatoken", "text_files", backend, TEXT_ROW_TOKENS)
    if not bench.fast:
        bench.prepare("chat many", "chat_many.jsonl", backend, CHAT_ROW_TOKENS)
    for _ in range(bench.sizes.rounds):
        for name, source in (("first document", "text_tiny"), ("first conversation", "chat_tiny.jsonl")):
            bench.forget(name)
            bench.prepare(name, source, backend, CHAT_ROW_TOKENS, ("encode",))
    bench.prepare("chat turns", "chat_turns.jsonl", backend, TURNS_ROW_TOKENS)
    for workers in (2, 5):
        bench.prepare(f"workers {workers}", "chat_parts", "tokenizers", CHAT_ROW_TOKENS, workers=workers)
    for name in ("text_tenth", "text_many"):
        bench.prepare(f"memory {name}", name, backend, TEXT_ROW_TOKENS, workers=2)
    bench.prepare("chat rows", "chat_many.jsonl", backend, GATHER_ROW_TOKENS, store=bench.many)
    for name in ("short_tiny", "short"):
        bench.prepare(name, f"{name}.jsonl", backend, CHAT_ROW_TOKENS)
        for _ in range(bench.sizes.rounds):
            made = bench.prepare(f"repack {name}", f"{name}.jsonl", backend, OTHER_ROW_TOKENS, store=name)
            shutil.rmtree(made.output["store"])


def other_figures(bench: Bench) -> dict[str, Any]:
    """Size, memory, linearity, packing, repacking, identical bytes."""
    start = "start chat gigatoken" if bench.fast else "start chat tokenizers"
    seconds = bench.beyond("chat turns", start) / bench.runs["chat turns"][-1].output["tokens"]
    turns = bench.ratio(seconds * bench.runs[bench.many][-1].output["tokens"], bench.many, start)
    chat = bench.runs["chat rows"][-1].output
    tenth, whole = (bench.runs[f"memory {name}"][-1].peak_mb for name in ("text_tenth", "text_many"))
    more = sum(_megabytes(bench.work / name) * sign for name, sign in (("text_many", 1), ("text_tenth", -1)))
    stores = [Path(bench.runs[name][-1].output["store"]) for name in ("chat tokenizers", "workers 2", "workers 5")]
    words = ["--rounds", str(bench.sizes.rounds), "--pack-documents", str(bench.sizes.pack_documents)]
    words += ["--row-lengths", *map(str, bench.sizes.row_lengths)]
    packing = run([sys.executable, str(HERE / "prepare_packing.py"), chat["store"], *words]).output
    documents = bench.sizes.short_documents
    heavy = {name for usages in bench.runs.values() for usage in usages for name in usage.output["heavy_imports"]}
    return {
        **packing,
        "bytes_per_token": store_bytes(Path(chat["store"])) / chat["tokens"],
        "peak_rss_ratio": whole / tenth,
        "peak_growth": (whole - tenth) / more,
        "peak_rss_mb": whole,
        "repack_1e6_seconds": max(0.0, bench.beyond("repack short", "repack short_tiny")) * 1e6 / documents,
        "first_document_seconds": statistics.median(usage.wall_seconds for usage in bench.runs["first document"]),
        "first_conversation_seconds": statistics.median(
            usage.wall_seconds for usage in bench.runs["first conversation"]
        ),
        "one_record_seconds": statistics.median(usage.wall_seconds for usage in bench.runs[start]),
        "turns_linearity": turns,
        "identical_bytes_1_2_5_workers": same_files(stores),
        "heavy_imports": sorted(heavy),
    }


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def benchmark(work: Path, data: Path, sizes: Sizes) -> tuple[dict[str, Any], Bench, dict[str, int]]:
    """All figures, and what they were made from."""
    counts = make_inputs(work, data, sizes)
    bench = Bench(work, sizes, importlib.util.find_spec("gigatoken") is not None)
    measure_rounds(bench)
    measure_others(bench)
    figures = compare(bench, counts) | other_figures(bench)
    return figures, bench, counts


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    samples = Path(os.environ.get("FULLTUNE_SAMPLES", ROOT.parent / "shared" / "data"))
    parser.add_argument("--quick", action="store_true", help="less input, a minute in all, nothing recorded")
    parser.add_argument("--data", type=Path, default=samples, help="folder with generation/, pretraining/, tokenizers/")
    parser.add_argument("--work", type=Path, help="where inputs and stores go; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="where the record goes; default: benchmarks/results")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the input, to see whether everything runs")
    parser.add_argument("--rounds", type=int, help="how often each is measured")
    arguments = parser.parse_args()
    sizes = scaled(QUICK if arguments.quick else FULL, arguments.scale, arguments.rounds)
    print(RULE, flush=True)
    with tempfile.TemporaryDirectory(prefix="fulltune-prepare-") as temporary:
        work = arguments.work or Path(temporary)
        figures, bench, counts = benchmark(work, arguments.data, sizes)
    print_table(figures)
    if arguments.output or not arguments.quick:
        peers = {name: bench.raw(name) for name in bench.peers}
        write_report(arguments.output, figures, bench.runs, counts, peers)
    print(json.dumps(figures))


def scaled(sizes: Sizes, scale: float, rounds: int | None) -> Sizes:
    """Less (or more) input, in fewer (or more) rounds."""
    return Sizes(
        rounds or sizes.rounds, max(20, int(sizes.conversations * scale)), max(1, int(sizes.copies * scale)),
        sizes.slow_text_mb * scale, sizes.text_mb * scale, int(sizes.short_documents * scale), sizes.row_lengths,
        int(sizes.pack_documents * scale), sizes.sub_batches, sizes.containers,
    )  # fmt: skip


if __name__ == "__main__":
    main()
