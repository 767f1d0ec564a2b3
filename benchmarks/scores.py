"""How good models become: MiniLM fine-tuned here, beside transformers' Trainer, a bag of words, and published figures.

    python benchmarks/scores.py [--quick] [--rows NAME ...] [--seeds N] [--data FOLDER] [--work FOLDER] [--output FILE]

Each run trains on two CPU ranks, through `fulltune prepare`, `train`, `export` and `eval`; the Trainer's model is
evaluated by the same `fulltune eval`. Results are kept in scores.jsonl in the work folder, and what stands there is not
run again. --quick runs one seed of the two smallest rows with fewer steps. Needs accelerate and scikit-learn (`make
bench-deps`). Last line: one JSON object. A run without --quick writes benchmarks/results/<date>-scores.md.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from prepare_report import machine, markdown, versions
from scores_data import Parts
from scores_rows import QUICK, ROWS, ROWS_A_STEP, Row
from scores_sides import bag_of_words, evaluated, ours, run_file, trainer
from state_measure import ROOT, prebuild

RULE = """\
Both sides start from MiniLM's fp32 weights and take the same records, 32 rows a step, steps, learning rate (linear, a
tenth of the steps warm-up), AdamW and clipping at 1, on two CPU processes in bf16. A tenth is held out of train, by a
hash of the document, for choosing settings. The last checkpoint counts on both sides; what is scored is scored once.
Scores are in points of 100, with two standard errors of the mean over seeds. "Ours" passes where it is at least the
Trainer's mean less the larger of 0.5 points (1.5 with one seed) and two standard errors of the difference."""
QUICK_STEPS = 120
TINY_STEPS, TINY_RECORDS = 2, 40


@dataclass(frozen=True)
class Bench:
    """The folders of the benchmark, and how much of it is run."""

    model: Path
    data: Path
    work: Path
    most_steps: int | None = None
    most_records: int | None = None


def parts_of(row: Row, bench: Bench) -> Parts:
    """The records of a row."""
    parts = row.read(bench.data)
    most = bench.most_records
    return parts if most is None else Parts(parts.train[:most], parts.tuning[:most], parts.scored[:most])


def write_parts(row: Row, parts: Parts, bench: Bench) -> dict[str, Path]:
    """The records of a row as files."""
    folder = bench.work / row.name
    folder.mkdir(parents=True, exist_ok=True)
    return {name: row.write(folder / name, getattr(parts, name)) for name in ("train", "tuning", "scored")}


class Results:
    """The results so far, a line each; a run with the same settings is not run again."""

    def __init__(self, path: Path):
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._found: dict[str, dict[str, Any]] = {}
        for line in lines:
            one = json.loads(line)
            self._found[one["key"]] = one

    def get(self, key: str) -> dict[str, Any] | None:
        """The result of a run, if there is one."""
        return self._found.get(key)

    def add(self, key: str, result: dict[str, Any]) -> dict[str, Any]:
        """Keep a result."""
        self._found[key] = result | {"key": key}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._found[key]) + "\n")
        return self._found[key]


def run_key(row: Row, side: str, seed: int, steps: int, files: dict[str, Path]) -> str:
    """The name of a run: everything that its score follows from but the model and the program."""
    content = [hashlib.sha256(files[name].read_bytes()).hexdigest() for name in sorted(files)]
    settings = [
        row.task, row.metric, row.learning_rate, row.row_tokens, dict(row.reading), dict(row.data), steps, ROWS_A_STEP,
        content,
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    return f"{row.name}/{side}/seed-{seed}/{steps}-steps/{digest}"


def run_side(row: Row, side: str, seed: int, files: dict[str, Path], steps: int, bench: Bench) -> dict[str, Any]:
    """Train and score one side once."""
    folder = bench.work / row.name / f"{side}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    run = run_file(row, bench.model, files, folder, seed, steps)
    began = time.monotonic()
    model = {"ours": ours, "trainer": trainer}[side](run)
    minutes = (time.monotonic() - began) / 60
    figures = evaluated(row, model, files["scored"], run)
    tuning = evaluated(row, model, files["tuning"], run)
    shutil.rmtree(folder)
    return {
        "row": row.name, "side": side, "seed": seed, "steps": steps, "score": figures[row.metric],
        "tuning": tuning[row.metric], "minutes": minutes, "figures": figures,
    }  # fmt: skip


def run_row(
    row: Row, seeds: Sequence[int], bench: Bench, results: Results, most_train: int | None = None,
    sides: Sequence[str] = ("ours", "trainer"),
) -> dict[str, Any]:  # fmt: skip
    """All runs of a row, on its first records where `most_train` says so; its baseline, and what they come to."""
    parts = parts_of(row, bench)
    parts = replace(parts, train=parts.train[:most_train])
    files = write_parts(row, parts, bench)
    steps = min(row.steps(parts.train), bench.most_steps or 10**9)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for seed in seeds:
        for side, done in found.items():
            key = run_key(row, side, seed, steps, files)
            known = results.get(key)
            result = known or results.add(key, run_side(row, side, seed, files, steps, bench))
            done.append(result)
            how = "kept" if known else f"{result['minutes']:.1f} min"
            score = f"{row.metric} {100 * result['score']:.1f}"
            print(f"{row.name:9s} {side:8s} seed {seed}, {steps} steps: {score} ({how})", flush=True)
    key = run_key(row, "bag-of-words", 0, 0, files)
    baseline = results.get(key) or results.add(key, {"row": row.name, "score": bag_of_words(row, parts)})
    scores = {side: [100 * result["score"] for result in done] for side, done in found.items()}
    return {
        "row": row.name, "records": len(parts.train), "steps": steps, "metric": row.metric, **scores,
        "bag_of_words": None if baseline["score"] is None else 100 * baseline["score"],
        "minutes": {side: statistics.mean(result["minutes"] for result in done) for side, done in found.items()},
    }  # fmt: skip


def run_curve(bench: Bench, results: Results) -> list[dict[str, Any]]:
    """SST-2 with few records and with all of them: how much data is enough. Few are seen more often."""
    row = next(row for row in ROWS if row.name == "sst2")
    found = []
    for most, epochs in ((100, 20.0), (300, 10.0), (1000, 6.0), (None, row.epochs)):
        found.append(run_row(replace(row, epochs=epochs), (1,), bench, results, most, ("ours",)))
    return found


def two_standard_errors(*samples: Sequence[float]) -> float:
    """Twice the standard error of a mean, or of the difference of two means; 0 where there is one seed."""
    return 2 * math.sqrt(sum(statistics.variance(one) / len(one) for one in samples if len(one) > 1))


def passes(ours: Sequence[float], trainer: Sequence[float]) -> bool:
    """True if our mean is as good as the Trainer's, within what seeds explain."""
    slack = max(0.5 if min(len(ours), len(trainer)) > 1 else 1.5, two_standard_errors(ours, trainer))
    return statistics.mean(ours) >= statistics.mean(trainer) - slack


def table(found: Sequence[dict[str, Any]]) -> str:
    """A line a row."""
    rows = {row.name: row for row in ROWS}
    lines = []
    for one in found:
        row = rows[one["row"]]
        shown = {side: _shown(one[side]) for side in ("ours", "trainer")}
        words = "-" if one["bag_of_words"] is None else f"{one['bag_of_words']:.1f}"
        published = "; ".join(f"{other.figure} ({other.source})" for other in row.published) or "-"
        minutes = " / ".join(f"{one['minutes'][side]:.1f}" for side in ("ours", "trainer"))
        lines.append(
            (row.title + (f" ({row.note})" if row.note else ""), row.metric, words, shown["ours"], shown["trainer"],
             "yes" if one["passes"] else "NO", published, f"{row.split}; {one['steps']} steps at {row.learning_rate:g}",
             minutes)
        )  # fmt: skip
    heads = ("data", "score", "bag of words", "ours", "Trainer", "passes", "published", "split and settings",
             "minutes, ours / Trainer")  # fmt: skip
    return markdown(heads, lines)


def _shown(scores: Sequence[float]) -> str:
    error = f" ± {two_standard_errors(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{error}"


def curve_table(curve: Sequence[dict[str, Any]]) -> str:
    """A line for each number of training records."""
    lines = []
    for one in curve:
        figures = (one["bag_of_words"], statistics.mean(one["ours"]), one["minutes"]["ours"])
        lines.append((f"{one['records']:,}", one["steps"], *(f"{figure:.1f}" for figure in figures)))
    return markdown(("training records", "steps", "bag of words", "ours", "minutes"), lines)


def write_report(path: Path, found: Sequence[dict[str, Any]], curve: Sequence[dict[str, Any]]) -> None:
    """Write the record."""
    parts = [
        "# Scores of a small pretrained model",
        f"{date.today().isoformat()}, {machine()}; {versions(('torch', 'deepspeed', 'transformers', 'scikit-learn'))}.",
        f"    {' '.join(['python', 'benchmarks/scores.py', *sys.argv[1:]])}",
        RULE,
        table(found),
        *(["## How much data is enough: SST-2", curve_table(curve)] if curve else []),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"recorded in {path}")


def the_model() -> Path:
    """MiniLM's folder, which `fulltune model get` writes."""
    from launcher.known_models.known import KNOWN_MODELS
    from launcher.known_models.write import get_model

    folder = Path("~/.cache/fulltune/models/minilm").expanduser()
    folder.parent.mkdir(parents=True, exist_ok=True)
    get_model(KNOWN_MODELS["minilm"], folder, print)
    return folder


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    samples = Path(os.environ.get("FULLTUNE_SAMPLES", ROOT.parent / "shared" / "data"))
    names = [row.name for row in ROWS]
    parser.add_argument("--quick", action="store_true", help="one seed of two rows, nothing recorded")
    parser.add_argument("--tiny", action="store_true", help="to see whether everything runs; the figures mean nothing")
    parser.add_argument("--rows", nargs="+", choices=names, help="default: all of them, with --quick two")
    parser.add_argument("--curve", action="store_true", help="also SST-2 with 100, 300 and 1,000 records")
    parser.add_argument("--seeds", type=int, help="default: three or one, as each row says")
    parser.add_argument("--steps", type=int, help="at most so many")
    parser.add_argument("--rate", type=float, help="another learning rate")
    parser.add_argument("--model", type=Path, help="another model's folder than MiniLM's")
    parser.add_argument("--data", type=Path, default=samples, help="folder of the sample data")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/fulltune/scores"), help="results and runs")
    parser.add_argument("--output", type=Path, help="where the record goes; default: benchmarks/results")
    arguments = parser.parse_args()
    short = arguments.quick or arguments.tiny
    steps = arguments.steps or (TINY_STEPS if arguments.tiny else QUICK_STEPS if arguments.quick else None)
    bench = Bench(
        arguments.model or the_model(), arguments.data, arguments.work.expanduser().absolute(), steps,
        TINY_RECORDS if arguments.tiny else None,
    )  # fmt: skip
    bench.work.mkdir(parents=True, exist_ok=True)
    print(RULE, flush=True)
    prebuild()
    results = Results(bench.work / "scores.jsonl")
    found = []
    for row in ROWS:
        if row.name not in (arguments.rows or (QUICK if short else names)):
            continue
        row = replace(row, learning_rate=arguments.rate or row.learning_rate)
        seeds = range(1, 1 + (arguments.seeds or (1 if short else row.num_seeds)))
        result = run_row(row, seeds, bench, results)
        found.append(result | {"passes": passes(result["ours"], result["trainer"])})
    curve = run_curve(bench, results) if arguments.curve or not (short or arguments.rows) else []
    print(table(found))
    if arguments.output or not (short or arguments.rows):
        path = arguments.output or ROOT / "benchmarks" / "results" / f"{date.today().isoformat()}-scores.md"
        write_report(path, found, curve)
    print(json.dumps({"rows": found, "all_pass": all(one["passes"] for one in found), "curve": curve}))


if __name__ == "__main__":
    main()
