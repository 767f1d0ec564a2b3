"""``fulltune demo``: the whole way on this machine, from raw text to generated text.

Nothing here is special to the demo: it writes ordinary run files and does with them what
``fulltune train``, ``export`` and ``generate`` do. Done steps are found again and said so.
"""

import json
import math
import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.prepare import unigram_entropy
from data_prep.token_store import TokenStore, open_rows, resolve_store
from engine.arithmetic import DEFAULT_SHARD_BYTES
from engine.errors import FulltuneError
from engine.run_file import dump_yaml
from launcher.commands.demo_corpus import corpus_files, write_corpus
from launcher.commands.export import export_run
from launcher.job.run_config import load_run
from launcher.start.start import plan_job, start

VOCABULARY = 2000
_ROW_TOKENS = 256
_NUM_SAMPLES = 3


class DemoStoppedError(FulltuneError):
    """A stage did not end with 0; carries the stage's own exit code."""

    def __init__(self, stage: str, exit_code: int, reason: str):
        super().__init__(f"{stage}: {reason.rstrip('.')}; `fulltune demo` again goes on from here")
        self.exit_code = exit_code


def run_demo(folder: Path) -> int:
    """Run every step that is not done yet and print what came out. Everything lies in `folder`."""
    began = time.monotonic()
    folder = folder.absolute()
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
    from data_prep.tokenizer.train import train_sentencepiece

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
    from launcher.commands.generate import generate

    held_out = corpus_files(folder / "corpus")[3].read_text(encoding="utf-8").splitlines()
    records = sorted(map(json.loads, held_out), key=lambda record: len(record["prompt"]))
    chosen = [records[len(records) * place // 8] for place in range(1, _NUM_SAMPLES + 1)]
    model = folder / "models" / "2-docstrings"
    print(f"\n{model} read by plain transformers; functions it has never seen:")
    answers = generate(str(model), [record["prompt"] for record in chosen], False, 40, 0.0, 0)
    for record, answer in zip(chosen, answers, strict=True):
        source = record["prompt"].rstrip().rpartition("\n")[0]
        print(f"\n{source}\n  says the library: {record['response']}\n  says the model:   {answer.strip()}")
