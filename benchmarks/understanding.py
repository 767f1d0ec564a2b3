"""Throughput of a small encoder beside transformers' Trainer, on SST-2 and CLINC-150.

    python benchmarks/understanding.py [--quick] [--model FOLDER] [--data FOLDER] [--output FILE]

MiniLM (BERT, 6 x 384, 22.7 million parameters) with the recipe of classification, 32 sentences a step, two CPU ranks.
A run without --quick also measures the other shipped DeepSpeed configurations, and writes
benchmarks/results/<date>-understanding.md. The Trainer needs accelerate (`make bench-deps`).
Last line: one JSON object.
"""

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from prepare_report import Goals, judged, machine, markdown, print_table, versions
from state_measure import HERE, ROOT, prebuild, rank_environment

RULE = """\
Two processes a side, one core each, the same token store, 32 sentences a step, gradient clipping 1, AdamW. The Trainer
runs DDP in bf16 (fp32 weights under autocast) with the fused AdamW that it takes by itself; ours is the engine as
`fulltune train` starts it. All sides are started, make ten steps, and stand still (SIGSTOP); then they take turns of
some seconds. Counted are the steps that lie wholly within a turn, and of these the tokens of sentences: padding is
no token. A ratio is the median over rounds of ours beside the Trainer's turn of the same round."""
ROWS = 32
WARM_STEPS = 10
RECIPE = "recipe"
CONFIGURATIONS = ("zero2", "zero3", "zero3_offload_optimizer", "zero3_offload", "zero3_offload_nvme")
GOALS: Goals = {
    "vs_trainer_sst2": ("SST-2, the recipe beside the Trainer", ">= 1.5", 1.5, True),
    "vs_trainer_clinc": ("CLINC-150, the recipe beside the Trainer", ">= 1.5", 1.5, True),
    "padding_fraction": ("padding in the recipe's micro-batches", "<= 0.01", 0.01, False),
} | {
    f"vs_trainer_{data}_{name}": (f"{data}, {name} beside the Trainer", "" if "nvme" in name else ">= 1", 1.0, True)
    for data in ("sst2", "clinc")
    for name in CONFIGURATIONS
}
WORDS = "the of and to a in that is was he for it with as his on be at by i".split()
#: The shape of MiniLM, for machines without its weights: as fast, and nothing else.
RANDOM: dict[str, Any] = {
    "model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536, "vocab_size": 30522,
}  # fmt: skip


@dataclass
class Side:
    """Two processes that train, or stand still."""

    name: str
    steps: Path
    processes: list[subprocess.Popen[bytes]]
    turns: list[tuple[float, float]] = field(default_factory=list)

    def signal(self, number: int) -> None:
        """Send both a signal."""
        for process in self.processes:
            process.send_signal(number)

    def check(self) -> None:
        """SystemExit with what a process said that has ended."""
        for rank, process in enumerate(self.processes):
            if process.poll() is not None:
                said = self.steps.with_name(f"{self.name}.{rank}.log").read_text(errors="replace")[-4000:]
                raise SystemExit(f"{self.name}: rank {rank} ended with {process.returncode}:\n{said}")

    def warm_up(self) -> None:
        """Wait for the first steps, and stand still."""
        until = time.monotonic() + 300
        while len(self.lines()) < WARM_STEPS:
            self.check()
            if time.monotonic() > until:
                raise SystemExit(f"{self.name}: no {WARM_STEPS} steps within 300 s")
            time.sleep(0.1)
        self.signal(signal.SIGSTOP)

    def take_turn(self, seconds: float) -> None:
        """Train for some seconds."""
        begin = time.monotonic()
        self.signal(signal.SIGCONT)
        time.sleep(seconds)
        self.signal(signal.SIGSTOP)
        self.turns.append((begin, time.monotonic()))
        self.check()

    def end(self) -> None:
        """Kill both."""
        for process in self.processes:
            process.kill()
            process.wait()

    def lines(self) -> list[tuple[float, int, int]]:
        """Of each step its end, and tokens and positions so far on all ranks that have written it."""
        files = [path.read_text().splitlines() for path in sorted(self.steps.parent.glob(f"{self.steps.name}.[01]"))]
        found = []
        for lines in zip(*files, strict=False):
            parts = [line.split() for line in lines]
            if all(len(part) == 3 for part in parts):
                found.append((float(parts[0][0]), sum(int(p[1]) for p in parts), sum(int(p[2]) for p in parts)))
        return found

    def rates(self) -> list[float]:
        """Tokens a second in each turn."""
        lines, rates = self.lines(), []
        for begin, end in self.turns:
            inside = [line for line in lines if begin <= line[0] <= end]
            if len(inside) < 2:
                raise SystemExit(f"{self.name}: fewer than two steps in a turn: take longer turns")
            rates.append((inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0]))
        return rates

    def padding(self) -> float:
        """Padding in all positions."""
        _, tokens, positions = self.lines()[-1]
        return 1.0 - tokens / positions


@dataclass(frozen=True)
class Bench:
    """The folders of the benchmark, and how long its turns are."""

    work: Path
    model: Path | None
    data: Path
    rounds: int
    turn_seconds: float
    configurations: tuple[str, ...]


def minilm(folder: Path) -> Path | None:
    """MiniLM, fetched into `folder`; None, which is said, where there is none to be had."""
    command = [sys.executable, "-m", "launcher.cli", "model", "get", "minilm", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
        print(f"MiniLM's weights cannot be had here, so random ones of its shape stand for them: {reason}", flush=True)
        return None
    return folder


def sentences(data: Path, name: str) -> list[tuple[str, str]]:
    """Texts with labels: the real ones where they are, else made ones of the same lengths."""
    sst2, clinc = data / "classification/sst2/train.tsv", data / "classification/clinc150/data_small.json"
    if name == "sst2" and sst2.is_file():
        lines = sst2.read_text(encoding="utf-8").splitlines()
        return [(text, label) for text, _, label in (line.rpartition("\t") for line in lines)]
    if name == "clinc" and clinc.is_file():
        return [(text, label) for text, label in json.loads(clinc.read_text(encoding="utf-8"))["train"]]
    print(f"{name}: not in {data}, so made-up sentences of the same lengths stand for it", flush=True)
    rng = random.Random(name)  # noqa: S311
    mean, spread, labels = (19.3, 9.3, 2) if name == "sst2" else (8.4, 3.3, 150)  # words
    lengths = [max(1, round(rng.gammavariate((mean / spread) ** 2, spread**2 / mean))) for _ in range(7000)]
    return [(" ".join(rng.choices(WORDS, k=length)), f"label {n % labels}") for n, length in enumerate(lengths)]


def prepare(bench: Bench, name: str) -> tuple[Path, list[str]]:
    """The recipe, and what is changed of it: the data, which are prepared, the model and the number of steps."""
    folder = bench.work / name
    folder.mkdir()
    records = ({"text": text, "label": label} for text, label in sentences(bench.data, name))
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    recipe = ROOT / "launcher" / "recipes" / "classify.yaml"
    model: dict[str, Any] = {"model.config": json.dumps(RANDOM)}
    tokenizer = bench.data / "tokenizers" / "bert_uncased_en" / "google_uncased_en_vocab.txt"
    if not tokenizer.is_file():
        tokenizer = folder / "vocab.txt"
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        pieces += [f"[unused{number}]" for number in range(RANDOM["vocab_size"] - len(pieces))]
        tokenizer.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    if bench.model is not None:
        model = {"model.config": "null", "model.init": "pretrained", "model.path": bench.model}
        tokenizer = bench.model / "vocab.txt"
    changed = {
        "data.store_dir": folder / "stores", "data.train": folder / "train.jsonl", "data.validation": "null",
        "data.tokenizer": tokenizer, "optimizer.learning_rate": "2e-5", "duration.epochs": "null",
        "duration.steps": 10**6, "batch.global_rows": ROWS, "evaluation.patience": "null", **model,
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in changed.items()]
    command = [sys.executable, "-m", "launcher.cli", "prepare", str(recipe), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: prepare ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return recipe, overrides


def start(folder: Path, name: str, recipe: Path, overrides: list[str]) -> Side:
    """Start two processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    own = [f"run_dir={folder / name}"]
    if name in CONFIGURATIONS:
        own += [f"deepspeed={name}", *([f"nvme_path={folder / 'nvme'}"] if "nvme" in name else [])]
    steps = folder / f"{name}.steps"
    program = [sys.executable, str(HERE / "understanding_worker.py"), "trainer" if name == "trainer" else "ours"]
    side = Side(name, steps, [])
    for rank in range(2):
        place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = rank_environment(2) | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"{name}.{rank}.log").open("wb") as log:
            command = [*program, str(recipe), str(steps), *overrides, *own]
            side.processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    return side


def measure(bench: Bench, data: str) -> dict[str, Side]:
    """All sides on one data set, in turns."""
    recipe, overrides = prepare(bench, data)
    folder = bench.work / data
    (folder / "nvme").mkdir()
    sides: list[Side] = []
    try:
        for name in ("trainer", RECIPE, *bench.configurations):
            sides.append(start(folder, name, recipe, overrides))
            sides[-1].warm_up()
        for _ in range(bench.rounds):
            for side in sides:
                side.take_turn(bench.turn_seconds)
    finally:
        for side in sides:
            side.end()
    for side in sides:
        shown = " ".join(f"{rate:7,.0f}" for rate in side.rates())
        print(f"{data:6s} {side.name:24s} tokens/s {shown}   padding {side.padding():.2f}", flush=True)
    return {side.name: side for side in sides}


def figures_of(found: dict[str, dict[str, Side]]) -> dict[str, Any]:
    """Every figure, by name."""
    figures: dict[str, Any] = {}
    for data, sides in found.items():
        theirs = sides["trainer"].rates()
        for name, side in sides.items():
            suffix = data if name == RECIPE else f"{data}_{name}"
            figures[f"tokens_per_second_{suffix}"] = statistics.median(side.rates())
            if name != "trainer":
                ratios = [mine / other for mine, other in zip(side.rates(), theirs, strict=True)]
                figures[f"vs_trainer_{suffix}"] = statistics.median(ratios)
    figures["padding_fraction"] = max(sides[RECIPE].padding() for sides in found.values())
    figures["padding_fraction_trainer"] = max(sides["trainer"].padding() for sides in found.values())
    return figures


def write_report(path: Path | None, bench: Bench, figures: dict[str, Any], found: dict[str, dict[str, Side]]) -> None:
    """Write the record: machine, versions, command, tables."""
    today = date.today().isoformat()
    path = path or ROOT / "benchmarks" / "results" / f"{today}-understanding.md"
    rows = [
        (data, name, ", ".join(f"{rate:,.0f}" for rate in side.rates()), f"{side.padding():.2f}")
        for data, sides in found.items()
        for name, side in sides.items()
    ]
    weights = "MiniLM's own weights" if bench.model else "a random BERT of MiniLM's shape"
    parts = [
        "# Small encoders beside transformers' Trainer",
        f"{today}, {machine()}; {versions(('torch', 'deepspeed', 'transformers', 'accelerate'))}; {weights}.",
        f"    {' '.join(['python', 'benchmarks/understanding.py', *sys.argv[1:]])}",
        RULE,
        markdown(("figure", "what", "value", "goal", "met"), list(judged(figures, GOALS))),
        markdown(("data", "side", "tokens/s, turn by turn", "padding"), rows),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"recorded in {path}")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    samples = Path(os.environ.get("FULLTUNE_SAMPLES", ROOT.parent / "shared" / "data"))
    parser.add_argument("--quick", action="store_true", help="only the recipe, under four minutes, nothing recorded")
    parser.add_argument("--tiny", action="store_true", help="to see whether everything runs; the figures mean nothing")
    parser.add_argument("--model", type=Path, help="MiniLM's folder; default: fetched")
    parser.add_argument("--data", type=Path, default=samples, help="folder with classification/ and tokenizers/")
    parser.add_argument("--configurations", nargs="*", choices=CONFIGURATIONS, help="default: all, with --quick none")
    parser.add_argument("--work", type=Path, help="where to train; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="where the record goes; default: benchmarks/results")
    arguments = parser.parse_args()
    short = arguments.quick or arguments.tiny
    configurations = arguments.configurations
    if configurations is None:
        configurations = () if short else CONFIGURATIONS
    print(RULE, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that processes that stand still are ended
    prebuild()
    with tempfile.TemporaryDirectory(prefix="fulltune-understanding-", dir=arguments.work) as temporary:
        rounds, seconds = (1, 4.0) if arguments.tiny else (4, 6.0) if arguments.quick else (6, 8.0)
        model = arguments.model or (None if arguments.tiny else minilm(Path(temporary) / "minilm"))
        bench = Bench(Path(temporary), model, arguments.data, rounds, seconds, tuple(configurations))
        found = {data: measure(bench, data) for data in ("sst2", "clinc")}
        figures = figures_of(found)
        print_table(figures, GOALS)
        if arguments.output or not short:
            write_report(arguments.output, bench, figures, found)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
