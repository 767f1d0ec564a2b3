"""``fulltune demo``: the whole way on this machine, from raw text to generated text.

The demo writes ordinary run files and does with them what ``fulltune train``, ``export`` and ``generate`` do.
A step whose result is there from an earlier run is not repeated.

Nothing is downloaded: the corpus is this Python's own standard library. Stage 1 reads source text; stage 2 reads
functions and answers with the first paragraph of their docstring. Every tenth file is held out of both, so nothing
held out was seen in any form.
"""

import argparse
import ast
import hashlib
import inspect
import json
import math
import shlex
import sysconfig
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.prepare import unigram_entropy
from data_prep.token_store import TokenStore, open_rows, resolve_store
from data_prep.tokenizer.train import train_sentencepiece
from engine.arithmetic import DEFAULT_SHARD_BYTES
from engine.errors import FulltuneError
from engine.run_file import dump_yaml
from launcher.commands.export import export_run
from launcher.commands.generate import generate
from launcher.job.run_config import load_run
from launcher.start.start import plan_job, start

VOCABULARY = 2000
_ROW_TOKENS = 256
_NUM_SAMPLES = 3
ANSWER_HEADING = "\n# What it does:\n"
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "turtledemo", "idlelib"}
# More than a demo trains on, and just enough held out to measure with.
_TEXT_CHARACTERS = 1_500_000
_HELD_OUT_CHARACTERS = 40_000
_RECORD_CHARACTERS = 600


class DemoStoppedError(FulltuneError):
    """A stage did not end with 0; carries the stage's own exit code."""

    def __init__(self, stage: str, exit_code: int, reason: str):
        super().__init__(f"{stage}: {reason.rstrip('.')}; `fulltune demo` again goes on from here")
        self.exit_code = exit_code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder to work in."""
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="where everything goes (default: ./demo)")


def run(arguments: argparse.Namespace) -> int:
    """Run every step that is not done yet and print the results. Everything lies in the given folder."""
    began = time.monotonic()
    folder: Path = arguments.dir.absolute()
    corpus, tokenizer = folder / "corpus", folder / "tokenizer"
    print(f"fulltune demo, in {folder} (remove it to start over)\n", flush=True)
    _step("corpus: this Python's standard library", corpus / "done", lambda: _make_corpus(corpus))
    _step(f"sentencepiece tokenizer of {VOCABULARY} tokens", tokenizer, lambda: _make_tokenizer(corpus, tokenizer))
    _step("run files", folder / "2-docstrings.yaml", lambda: _write_run_files(folder))
    for stage in ("1-text", "2-docstrings"):
        run_dir, model = folder / "runs" / stage, folder / "models" / stage
        export = partial(export_run, run_dir, model, None, False, "bfloat16", DEFAULT_SHARD_BYTES)
        _step(f"stage {stage}: train", run_dir / "demo-done", partial(_train, folder, stage))
        _step(f"stage {stage}: export to {model}", model / "config.json", export)
    _report(folder)
    _show_samples(folder)
    tensorboard = shlex.join(["tensorboard", "--logdir", str(folder / "runs")])
    again = shlex.join(["fulltune", "train", str(folder / "2-docstrings.yaml"), "--fresh"])
    print(f"\ncurves: {tensorboard}\nagain by hand: {again}")
    print(f"whole demo: {time.monotonic() - began:.0f} s")
    return 0


def _step(title: str, result: Path, make: Callable[[], object]) -> None:
    """Do a step unless its result is there from an earlier run; say which, and how long it took."""
    if result.exists():
        print(f"== {title}: done before, reused", flush=True)
        return
    print(f"== {title}", flush=True)
    began = time.monotonic()
    make()
    print(f"   {time.monotonic() - began:.0f} s", flush=True)


def _make_corpus(corpus: Path) -> None:
    num_files = write_corpus(corpus)
    (corpus / "done").write_text(f"{num_files} source files\n", encoding="utf-8")


def _make_tokenizer(corpus: Path, tokenizer: Path) -> None:
    text, _, docstrings, _ = corpus_files(corpus)
    train_sentencepiece([text, docstrings], tokenizer, VOCABULARY)


def _write_run_files(folder: Path) -> None:
    """Two ordinary run files with absolute paths; the second is written last, as the sign of both."""
    text, text_held_out, docstrings, docstrings_held_out = corpus_files(folder / "corpus")
    random_llama = {
        "init": "random",
        "config": {
            "model_type": "llama",
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        },
    }
    first_stage = {"path": str(folder / "models" / "1-text")}
    stages = (
        ("1-text", "Stage 1: plain source text, every token a target.", text, text_held_out, random_llama),
        (
            "2-docstrings",
            "Stage 2: source -> docstring; only the docstring is a target. Starts from stage 1's export.",
            docstrings,
            docstrings_held_out,
            first_stage,
        ),
    )
    for name, about, train, held_out, model in stages:
        values = _run_values(folder, name, train, held_out, model)
        (folder / f"{name}.yaml").write_text(f"# {about}\n{dump_yaml(values)}", encoding="utf-8")


def _run_values(folder: Path, name: str, train: Path, held_out: Path, model: dict[str, Any]) -> dict[str, Any]:
    return {
        "run_dir": str(folder / "runs" / name),
        "task": "causal_lm",
        "data": {
            "store_dir": str(folder / "stores" / name),
            "train": str(train),
            "validation": str(held_out),
            "tokenizer": str(folder / "tokenizer"),
            "row_tokens": _ROW_TOKENS,
            "overlong": "split" if name == "1-text" else "drop",
        },
        "model": model,
        "optimizer": {
            "learning_rate": 3e-3,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "schedule": "cosine",
            "warmup_steps": 5,
            "final_fraction": 0.1,
        },
        "batch": {"global_rows": 4, "micro_rows": 2},
        "duration": {"steps": 240},
        "deepspeed": "zero3_offload",
        "evaluation": {"micro_rows": 8},
        "log": {"log_every_steps": 20},
    }


def _train(folder: Path, stage: str) -> None:
    run = load_run(folder / f"{stage}.yaml", [])
    job = plan_job(run)
    print(f"   {shlex.join(job.command)}", flush=True)
    code, message = start(run, job)
    if code:
        raise DemoStoppedError(f"stage {stage}", code, message)
    (run.config.run_dir / "demo-done").touch()


def _report(folder: Path) -> None:
    """Held-out loss and perplexity before and after each stage, and what counting words would give."""
    print("\nheld-out, per target           loss   perplexity")
    for stage in ("1-text", "2-docstrings"):
        lines = (folder / "runs" / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        evaluations = [line for line in map(json.loads, lines) if line["kind"] == "evaluation"]
        for when, line in (("before", evaluations[0]), ("after", evaluations[-1])):
            print(f"  stage {stage:<13} {when:<7} {line['loss']:7.3f} {line['perplexity']:12.1f}")
        data = load_run(folder / f"{stage}.yaml", []).config.data
        store = resolve_store(data.store_dir, "validation")
        assert store is not None
        opened = TokenStore.open(store)
        entropy = unigram_entropy(opened, open_rows(opened, data.row_tokens))
        verdict = "below" if evaluations[-1]["loss"] < entropy else "NOT below"
        print(f"  {'':<13} unigram entropy {entropy:5.3f} {math.exp(entropy):12.1f}   the loss after is {verdict} it")


def _show_samples(folder: Path) -> None:
    held_out = corpus_files(folder / "corpus")[3].read_text(encoding="utf-8").splitlines()
    records = sorted(map(json.loads, held_out), key=lambda record: len(record["prompt"]))
    chosen = [records[len(records) * place // 8] for place in range(1, _NUM_SAMPLES + 1)]
    model = folder / "models" / "2-docstrings"
    print(f"\n{model} read by plain transformers; functions it has never seen:")
    answers = generate(str(model), [record["prompt"] for record in chosen], False, 40, 0.0, 0)
    for record, answer in zip(chosen, answers, strict=True):
        source = record["prompt"].rstrip().rpartition("\n")[0]
        print(f"\n{source}\n  says the library: {record['response']}\n  says the model:   {answer.strip()}")


def corpus_files(folder: Path) -> tuple[Path, Path, Path, Path]:
    """Paths of text, held-out text, docstrings and held-out docstrings."""
    names = ("text", "text-held-out", "docstrings", "docstrings-held-out")
    text, text_held_out, docstrings, docstrings_held_out = (folder / f"{name}.jsonl" for name in names)
    return text, text_held_out, docstrings, docstrings_held_out


def write_corpus(folder: Path) -> int:
    """Write the four JSONL files into `folder`; returns the number of source files read.

    Files come in the order of a hash of their name: the same on every machine with this Python.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records: dict[Path, list[dict[str, str]]] = {path: [] for path in corpus_files(folder)}
    text, text_held_out, docstrings, docstrings_held_out = records
    num_files = 0
    for path, is_held_out in _source_files():
        try:
            source = path.read_text(encoding="utf-8")
            module = ast.parse(source)
        except (SyntaxError, ValueError, OSError):
            continue  # a few files are broken on purpose or in an old encoding
        lines = source.splitlines()
        records[text_held_out if is_held_out else text] += _top_level_pieces(lines, module)
        records[docstrings_held_out if is_held_out else docstrings] += _docstring_records(lines, module)
        num_files += 1
    seen = {record["prompt"] for record in records[docstrings]}  # modules copy functions from each other
    records[docstrings_held_out] = [record for record in records[docstrings_held_out] if record["prompt"] not in seen]
    for path, values in records.items():
        wanted = _TEXT_CHARACTERS if path in (text, docstrings) else _HELD_OUT_CHARACTERS
        temporary = path.with_suffix(".new")
        temporary.write_text("".join(_first_lines(values, wanted)), encoding="utf-8")
        temporary.replace(path)
    return num_files


def _first_lines(records: list[dict[str, str]], num_characters: int) -> Iterator[str]:
    """JSON lines of the first records, until they have `num_characters`."""
    for record in records:
        if num_characters <= 0:
            return
        line = json.dumps(record, ensure_ascii=False) + "\n"
        num_characters -= len(line)
        yield line


def _source_files() -> Iterator[tuple[Path, bool]]:
    """Standard library modules in the order of a hash of their name, and whether each is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    places = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if not _LEFT_OUT & set(name.split("/")):
            places.append((int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]), path))
    return ((path, place % 10 == 0) for place, path in sorted(places))


def _top_level_pieces(lines: list[str], module: ast.Module) -> Iterator[dict[str, str]]:
    """The module's docstring, then the source of each top-level function and class."""
    docstring = ast.get_docstring(module)
    if docstring:
        yield {"text": docstring}
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield {"text": "\n".join(lines[node.lineno - 1 : node.end_lineno])}


def _docstring_records(lines: list[str], module: ast.Module) -> list[dict[str, str]]:
    """A record for each function whose body says something beside its docstring and is short enough."""
    records = []
    for node in ast.walk(module):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node, clean=False)
        if not docstring or len(node.body) < 2:
            continue
        answer = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
        first = node.body[0]
        kept = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
        prompt = textwrap.dedent("\n".join(kept))
        if answer and len(prompt) + len(answer) <= _RECORD_CHARACTERS:
            records.append({"prompt": prompt + ANSWER_HEADING, "response": answer})
    return records
