"""The model of a run, looked at by a child process with torch before anything is started (see engine.model.examine)."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine.fit
import engine.model
import engine.tasks
from engine.arithmetic import is_hub_name, list_checkpoints
from engine.finding import Finding
from engine.fit.model_facts import ModelFacts, Positions
from engine.zero.prebuild import extensions_dir
from launcher.job.run_config import Run

_PATIENCE_SECONDS = 300
_NAME = "model"
#: A child that only reads needs no device, and must not be taken for a rank that prints.
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "RANK": "-1"}


def examine_model(run: Run, vocab_size: int | None, may_download: bool) -> tuple[ModelFacts | None, list[Finding]]:
    """The facts of a run's model, and everything that would stop ranks from building it.

    `vocab_size` is that of the tokenizer, which a model without a folder takes; None where it is not known.
    No facts where the model cannot be built or looked at; a finding says why.
    """
    section = run.config.model
    values = section.model_dump(mode="json")
    if section.config is not None:
        if vocab_size is None:
            return None, [Finding(_NAME, "skipped", "its size follows from a tokenizer that is not here")]
        values["config"] = {"vocab_size": vocab_size} | section.config
    elif not Path(str(section.path)).is_dir() and not (may_download and is_hub_name(str(section.path))):
        return None, [Finding(_NAME, "skipped", f"{section.path} comes from the Hub")]
    # With a checkpoint, the starting weights are not opened.
    request = {
        "model": values, "task": run.config.task, "needs_weights": not list_checkpoints(run.config.run_dir),
        "one_document_a_row": run.config.data.one_document_a_row,
    }  # fmt: skip
    answer = _answer(json.dumps(request), _stamp(section.path))
    if isinstance(answer, str):
        return None, [Finding(_NAME, "skipped", f"could not be looked at: {answer}")]
    facts = answer["facts"]
    if facts is not None:
        positions = facts["positions"]
        facts = ModelFacts(
            facts["name"], facts["embedding_rows"], None if positions is None else Positions(**positions),
            tuple(facts["label_names"]), facts["has_head"],
        )  # fmt: skip
    return facts, [Finding(**finding) for finding in answer["findings"]]


def _stamp(path: str | None) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a model folder's files: what was found holds for these."""
    folder = Path(path) if path is not None else None
    if folder is None or not folder.is_dir():
        return ()
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".safetensors") and file.is_file()]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@functools.cache
def _answer(request: str, stamp: tuple[tuple[str, int, int], ...]) -> dict[str, Any] | str:
    """The answer to a request, or the reason why there is none. A start needs it before and after preparation.

    A model that had no faults is remembered beside the compiled ops: starting its process takes seconds.
    """
    try:
        remembered = extensions_dir() / "models" / f"{_key(request, stamp)}.json"
    except importlib.metadata.PackageNotFoundError as error:
        return f"{error.name} is not installed"
    with contextlib.suppress(OSError, ValueError):
        known: dict[str, Any] = json.loads(remembered.read_text(encoding="utf-8"))
        return known
    try:
        done = subprocess.run(
            [sys.executable, "-m", "engine.model.examine"], input=request, env=os.environ | _ENVIRONMENT,
            capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {_PATIENCE_SECONDS} s"
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]
    values: dict[str, Any] = json.loads(lines[-1])
    if not values["findings"]:
        with contextlib.suppress(OSError):
            remembered.parent.mkdir(parents=True, exist_ok=True)
            temporary = remembered.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(values), encoding="utf-8")
            temporary.replace(remembered)
    return values


def _key(request: str, stamp: tuple[tuple[str, int, int], ...]) -> str:
    """Everything that an answer follows from: the request, the model's files, this program and transformers."""
    rooms = [Path(room.__file__).parent for room in (engine.fit, engine.model, engine.tasks) if room.__file__]
    files = [file.stat() for room in rooms for file in sorted(room.glob("*.py"))]
    program = [importlib.metadata.version("transformers"), *((file.st_size, file.st_mtime_ns) for file in files)]
    return hashlib.sha256(json.dumps([request, stamp, program]).encode()).hexdigest()
