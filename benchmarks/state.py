"""Loading, saving, resuming and exporting beside transformers and DeepSpeed: time, memory, bytes.

    python benchmarks/state.py [--quick] [--work FOLDER] [--output FILE]

Every measurement has its own processes; ranks are DeepSpeed's on the CPU, with the shipped configuration
zero3_offload. accelerate, without which transformers does not load under ZeRO-3, comes with `make bench-deps`;
without it its figures are null. Last line: one JSON object. A run without --quick also writes
benchmarks/results/<date>-state.md. --work wants a folder on the disk that is to be measured.
"""

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from state_measure import cool, prebuild, run_process, run_ranks, warm
from state_report import RULE, print_table, write_report

Figures = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How large the models are, and how often each thing is measured."""

    load: dict[str, int]
    save: dict[str, int]
    small: dict[str, int]
    shard_mb: int
    micro_tokens: int
    load_worlds: tuple[int, ...]
    load_rounds: int
    rounds: int
    states: tuple[str, ...]  # of the page cache


def llama(hidden: int, layers: int, vocab: int) -> dict[str, Any]:
    """A model like Llama: about (11 hidden^2 layers + 2 hidden vocab) parameters."""
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128,
        "vocab_size": vocab, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


FULL = Sizes(
    llama(1536, 28, 32000), llama(1024, 16, 16000), llama(1024, 4, 16000), 500, 512, (2, 4), 3, 3, ("warm", "cold")
)
QUICK = Sizes(llama(1024, 16, 16000), llama(512, 12, 8000), llama(512, 2, 8000), 150, 256, (2, 4), 1, 2, ("warm",))
TINY = Sizes(llama(512, 4, 8000), llama(256, 3, 8000), llama(256, 1, 8000), 15, 64, (2,), 1, 1, ("warm",))


@dataclass
class Bench:
    """Where everything is, and what each measurement reported: by name, a list of rounds of reports by rank."""

    work: Path
    sizes: Sizes
    started: float = field(default_factory=time.perf_counter)
    reports: dict[str, list[list[dict[str, Any]]]] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{time.perf_counter() - self.started:5.0f} s] {text}", flush=True)

    def ranks(self, world_size: int, phase: str, name: str, run: str = "run", **arguments: Any) -> list[dict[str, Any]]:
        """Run a phase of state_worker.py and note it under `name`."""
        given = {"work": str(self.work), "run_dir": str(self.work / run), "rounds": self.sizes.rounds, **arguments}
        self.say(name)
        found = run_ranks(world_size, phase, given)
        self.reports.setdefault(name, []).append(found)
        return found

    def process(self, phase: str, name: str, **arguments: Any) -> dict[str, Any]:
        """Run a phase of state_process.py and note it under `name`."""
        self.say(name)
        found = run_process(phase, {"work": str(self.work), "rounds": self.sizes.rounds, **arguments})
        self.reports.setdefault(name, []).append([found])
        return found


def measure_loads(bench: Bench) -> Figures:
    """Ours and transformers' in turn, at every number of ranks."""
    sizes, folder = bench.sizes, bench.work / "model"
    model = bench.process(
        "model", "model to load", model=str(folder), config=sizes.load, shard_bytes=sizes.shard_mb * 10**6
    )
    given = {"model": str(folder), "config": sizes.load}
    has_peer = importlib.util.find_spec("accelerate") is not None
    if not has_peer:
        print("accelerate is not installed (make bench-deps): transformers' figures are null", file=sys.stderr)
    for world_size in sizes.load_worlds:
        for state in sizes.states:
            for _ in range(sizes.load_rounds):
                for phase, name in (("load", "load"), ("load_transformers", "transformers"))[: 1 + has_peer]:
                    (warm if state == "warm" else cool)(folder)
                    bench.ranks(world_size, phase, f"{name}, {state}, {world_size} ranks", **given)
    shutil.rmtree(folder)
    figures: Figures = {"load_gb": model["model_bytes"] / 1e9, "load_parameters": model["parameters"]}
    for world_size in sizes.load_worlds:
        figures |= _load_figures(bench, model, world_size)
    names = ("read_fraction", "load_extra_mb", "load_transient_mb")
    figures |= {name: max(figures[f"{name}_{world_size}"] for world_size in sizes.load_worlds) for name in names}
    for name in ("load_vs_transformers", "ready_vs_transformers"):
        ratios = [figures[f"{name}_{world_size}"] for world_size in sizes.load_worlds] if has_peer else []
        figures[name] = min(ratios, default=None)
    return figures


def _load_figures(bench: Bench, model: dict[str, Any], world_size: int) -> Figures:
    share, largest = model["model_bytes"] / world_size, model["largest_tensor_bytes"] / 1e6
    figures: Figures = {}
    reports: list[dict[str, Any]] = []
    for state in bench.sizes.states:
        suffix = f"_{world_size}" if state == "warm" else f"_{state}_{world_size}"
        ours = bench.reports[f"load, {state}, {world_size} ranks"]
        reports += [report for found in ours for report in found]
        figures[f"load_s{suffix}"], figures[f"load_ready_s{suffix}"] = _load_seconds(ours)
        theirs = bench.reports.get(f"transformers, {state}, {world_size} ranks")
        if theirs is not None:
            both = [report["first_sum"] for found in (*ours, *theirs) for report in found]
            if max(both) - min(both) > 1e-3 * abs(both[0]):
                raise SystemExit(f"transformers has loaded other weights: {both}")
            loaded, ready = _load_seconds(theirs)
            figures |= {f"transformers_s{suffix}": loaded, f"transformers_ready_s{suffix}": ready}
            figures[f"load_vs_transformers{suffix}"] = loaded / figures[f"load_s{suffix}"]
            figures[f"ready_vs_transformers{suffix}"] = ready / figures[f"load_ready_s{suffix}"]
            figures[f"transformers_peak_mb{suffix}"] = max(report["peak_mb"] for found in theirs for report in found)
    return figures | {
        f"read_fraction_{world_size}": max(report["read_bytes"] for report in reports) / share,
        f"loader_fraction_{world_size}": max(report["loader_bytes"] for report in reports) / share,
        f"load_peak_mb_{world_size}": max(report["peak_mb"] for report in reports),
        f"load_extra_mb_{world_size}": max(r["peak_mb"] - r["held_bytes"] / 1e6 for r in reports) - largest,
        f"load_transient_mb_{world_size}": max(r["peak_mb"] - r["kept_mb"] for r in reports),
    }


def _load_seconds(rounds: list[list[dict[str, Any]]]) -> tuple[float, float]:
    """Seconds of loading without deepspeed.initialize, and with it: medians of the slowest rank's."""
    ready = _median_of_slowest(rounds, "seconds")
    loaded = statistics.median(max(r["seconds"] - r["initialize_seconds"] for r in found) for found in rounds)
    return loaded, ready


def _median_of_slowest(rounds: list[list[dict[str, Any]]], key: str) -> float:
    return statistics.median(max(report[key] for report in found) for found in rounds)


def measure_saves(bench: Bench) -> Figures:
    """Saves beside training and DeepSpeed's own, a resume, exports at two sizes and DeepSpeed's own conversion."""
    sizes, work = bench.sizes, bench.work
    saved = bench.ranks(2, "save", "save", config=sizes.save, micro_tokens=sizes.micro_tokens, shadow=2.0)
    (small,) = bench.ranks(1, "write", "smaller checkpoint", run="small", config=sizes.small)
    first = saved[0]
    warm(work / "run" / "deepspeed")
    theirs = bench.process(
        "zero_to_fp32", "zero_to_fp32", checkpoint=str(work / "run" / "deepspeed"), out=str(work / "converted")
    )
    shutil.rmtree(work / "run" / "deepspeed")
    shutil.rmtree(work / "converted")
    exports = {}
    for name, run, report in (("export", "run", first), ("smaller export", "small", small)):
        warm(Path(report["checkpoint"]))
        exports[name] = bench.process(
            "export", name, checkpoint=report["checkpoint"], model_dir=str(work / run / "model"),
            out=str(work / "exported"),
        )  # fmt: skip
        shutil.rmtree(work / "exported")
    warm(Path(first["checkpoint"]))
    resumed = bench.ranks(2, "resume", "resume", config=sizes.save, checkpoint=first["checkpoint"])
    stall = statistics.median(first["stall_seconds"])
    deepspeed = statistics.median(first["deepspeed_seconds"])
    larger, smaller = exports["export"], exports["smaller export"]
    verified, unverified = (max(r[f"{k}_seconds"] for r in resumed) for k in ("verified", "unverified"))
    extra = [
        larger["peak_mb"] - first["largest_tensor_bytes"] / 1e6,
        smaller["peak_mb"] - small["largest_tensor_bytes"] / 1e6,
    ]
    beyond = max(report["beyond_mb"] for report in resumed)
    return {
        "stall_s": stall,
        "stall_worst_s": max(first["stall_seconds"]),
        "stall_vs_deepspeed": deepspeed / stall,
        "deepspeed_save_s": deepspeed,
        "save_write_s": first["write_seconds"],
        "save_shadow_s": statistics.median(first["plain_seconds"]),
        "throughput_while_writing": sum(first["plain_seconds"]) / sum(first["saving_seconds"]),
        "save_extra_mb": max(value for report in saved for value in report["extra_mb"]),
        "bytes_per_parameter": first["checkpoint_bytes"] / first["parameters"],
        "deepspeed_bytes_per_parameter": first["deepspeed_bytes"] / first["parameters"],
        "saved_parameters": first["parameters"],
        "export_extra_mb": max(extra),
        "export_extra_mb_larger": extra[0],
        "export_extra_mb_smaller": extra[1],
        "export_mb_larger": larger["out_bytes"] / 1e6,
        "export_mb_smaller": smaller["out_bytes"] / 1e6,
        "export_s": larger["seconds"],
        "zero_to_fp32_s": theirs["seconds"],
        "zero_to_fp32_peak_mb": theirs["peak_mb"],
        "export_vs_zero_to_fp32": theirs["seconds"] / larger["seconds"],
        "export_vs_zero_to_fp32_unsynced": theirs["unsynced_seconds"] / larger["unsynced_seconds"],
        "export_vs_zero_to_fp32_unverified": theirs["seconds"] / larger["unverified_seconds"],
        "resume_s": verified,
        "verification_share": verified / unverified - 1,
        "resume_extra_mb": beyond,
        "resume_extra_tensors": beyond * 1e6 / first["largest_tensor_bytes"],
        "resume_largest_tensor_mb": first["largest_tensor_bytes"] / 1e6,
    }


def benchmark(bench: Bench) -> Figures:
    """All figures."""
    figures = measure_loads(bench) | measure_saves(bench)
    figures["seek_1e9_s"] = bench.process("seek", "seek", tokens=10**9)["seconds"]
    return figures


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller models, under three minutes, nothing recorded")
    parser.add_argument("--tiny", action="store_true", help="to see whether everything runs; the figures mean nothing")
    parser.add_argument("--work", type=Path, help="where models and checkpoints go; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="where the record goes; default: benchmarks/results")
    arguments = parser.parse_args()
    sizes = TINY if arguments.tiny else QUICK if arguments.quick else FULL
    print(RULE, flush=True)
    prebuild()
    with tempfile.TemporaryDirectory(prefix="fulltune-state-", dir=arguments.work) as temporary:
        bench = Bench(Path(temporary), sizes)
        figures = benchmark(bench)
    print_table(figures)
    if arguments.output or not (arguments.quick or arguments.tiny):
        write_report(arguments.output, figures, bench.reports)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
