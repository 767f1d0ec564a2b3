"""The three sides of a row of benchmarks/scores.py: `fulltune`, transformers' Trainer, and a bag of words."""

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scores_data import Parts
from scores_rows import ROWS_A_STEP, Row
from state_measure import HERE, ROOT, rank_environment

_TIMEOUT_SECONDS = 1800
_RANKS = 2


def run_file(row: Row, model: Path, files: dict[str, Path], folder: Path, seed: int, steps: int) -> Path:
    """The run file of both sides: the recipe's DeepSpeed configuration, a linear schedule, the last checkpoint."""
    recipe = yaml.safe_load((ROOT / "launcher" / "recipes" / "classify.yaml").read_text(encoding="utf-8"))
    values = {
        "run_dir": str(folder / "run"), "task": row.task, "seed": seed,
        "data": {
            "store_dir": str(files["train"].parent / "stores"), "train": {"path": str(files["train"]), **row.reading},
            "validation": {"path": str(files["tuning"]), **row.reading}, "tokenizer": str(model),
            "row_tokens": row.row_tokens, **row.data,
        },
        "model": {"path": str(model), "activation_checkpointing": False},
        "optimizer": {
            "learning_rate": row.learning_rate, "schedule": "linear", "warmup_steps": steps // 10,
        },
        "batch": {"global_rows": ROWS_A_STEP, "micro_rows": ROWS_A_STEP // _RANKS},
        "duration": {"steps": steps},
        "evaluation": {"micro_rows": 64},
        "deepspeed": recipe["deepspeed"],
        "log": {"tensorboard": False, "log_every_steps": 20},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")  # which is YAML too
    return path


def ours(run: Path) -> Path:
    """Train with `fulltune train`; the folder of the exported model, in fp32."""
    _fulltune("train", str(run), "--ranks", str(_RANKS), "--fresh")
    out = run.parent / "model"
    _fulltune("export", str(run.parent / "run"), str(out), "--dtype", "float32")
    return out


def trainer(run: Path) -> Path:
    """Train with transformers' Trainer on the same rows, two DDP processes; the folder of the model it saved."""
    _fulltune("prepare", str(run))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    out = run.parent / "model"
    place = {
        "WORLD_SIZE": str(_RANKS),
        "LOCAL_WORLD_SIZE": str(_RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    processes = []
    logs = [run.parent / f"trainer.{rank}.log" for rank in range(_RANKS)]
    try:
        for rank, log in enumerate(logs):
            environment = rank_environment(_RANKS) | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, str(HERE / "scores_trainer.py"), str(run), str(out)]
            with log.open("wb") as file:
                processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
                )
        until = time.monotonic() + _TIMEOUT_SECONDS
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes) or time.monotonic() > until:
                break
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, log in zip(processes, logs, strict=True):
        if process.returncode:
            raise SystemExit(f"the Trainer ended with {process.returncode}:\n{log.read_text(errors='replace')[-3000:]}")
    return out


def evaluated(row: Row, model: Path, scored: Path, run: Path) -> dict[str, float]:
    """The figures of a model folder on the scored records, by `fulltune eval`, whichever side made it."""
    text = _fulltune(
        "eval",
        str(model),
        "--task",
        row.task,
        "--like",
        str(run),
        "--data",
        str(scored),
        "--micro-rows",
        "64",
        "--json",
    )
    found: dict[str, float] = json.loads(text.splitlines()[-1])
    return found


def _fulltune(*words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", *words], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False, timeout=_TIMEOUT_SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(
            f"fulltune {' '.join(words)}: code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        )
    return done.stdout


def bag_of_words(row: Row, parts: Parts) -> float | None:
    """The score of a linear model on words, its penalty chosen on the tenth; None where words alone say nothing."""
    three = (parts.train, parts.tuning, parts.scored)
    if row.task == "token_classification" and row.metric == "accuracy":
        places = [[(record["tokens"], at) for record in part for at in range(len(record["tokens"]))] for part in three]
        features = [[_word_features(*place) for place in part] for part in places]
        return _classified(features, [[tag for record in part for tag in record["tags"]] for part in three])
    if row.task != "sequence_classification":
        return None
    features = [[_text_features(record) for record in part] for part in three]
    if row.metric == "pearson":
        return _correlated(features, [[record["score"] for record in part] for part in three])
    return _classified(features, [[record["label"] for record in part] for part in three])


def _word_features(words: Sequence[str], at: int) -> dict[str, float]:
    """A word, its end and its neighbours."""
    before, after = words[at - 1] if at else "", words[at + 1] if at + 1 < len(words) else ""
    word = words[at]
    named = (f"is {word.lower()}", f"ends {word[-3:]}", f"after {before.lower()}", f"before {after.lower()}")
    return dict.fromkeys(named, 1.0)


def _text_features(record: dict[str, Any]) -> dict[str, float]:
    """The words of one text and their pairs; of two texts the words of the second, those of only one, and how alike."""
    if "text" in record:
        words = record["text"].lower().split()
        return dict.fromkeys((*words, *map(" ".join, itertools.pairwise(words))), 1.0)
    first, second = ({*record[key].lower().split()} for key in list(record)[:2])
    named = (*(f"second {word}" for word in second), *(f"one {word}" for word in first ^ second))
    return {"alike": len(first & second) / max(1, len(first | second))} | dict.fromkeys(named, 1.0)


def _matrices(features: list[list[dict[str, float]]]) -> list[Any]:
    from sklearn.feature_extraction import DictVectorizer

    vectorizer = DictVectorizer()
    made = [vectorizer.fit_transform(features[0]), *(vectorizer.transform(part) for part in features[1:])]
    for matrix in made:  # the solvers take no wider indices
        matrix.indices, matrix.indptr = matrix.indices.astype(np.int32), matrix.indptr.astype(np.int32)
    return made


def _classified(features: list[list[dict[str, float]]], labels: list[list[str]]) -> float:
    from sklearn.linear_model import LogisticRegression

    train, tuning, scored = _matrices(features)
    models = [LogisticRegression(C=strength, max_iter=200).fit(train, labels[0]) for strength in (0.3, 3.0)]
    best = max(models, key=lambda model: float(model.score(tuning, labels[1])))
    return float(best.score(scored, labels[2]))


def _correlated(features: list[list[dict[str, float]]], scores: list[list[float]]) -> float:
    from sklearn.linear_model import Ridge

    train, tuning, scored = _matrices(features)
    models = [Ridge(alpha=strength, random_state=0).fit(train, scores[0]) for strength in (1.0, 10.0, 100.0)]
    best = max(models, key=lambda model: float(np.corrcoef(model.predict(tuning), scores[1])[0, 1]))
    return float(np.corrcoef(best.predict(scored), scores[2])[0, 1])
