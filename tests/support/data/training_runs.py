"""A small training run: its run file and stores, its metrics, the bytes of its checkpoints."""

import json
import time
from pathlib import Path
from typing import Any

from data_fixtures import byte_level_folder, sentences, write_jsonl
from safetensors.torch import load_file

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from engine.config import RunConfig
from engine.run_file import dump_yaml

STEPS, SAVE_EVERY = 9, 4


def run_file(folder: Path, name: str, **changes: Any) -> Path:
    """Write a run file (and prepare its stores, the same for all) and return its path."""
    texts = [{"text": text} for text in sentences(300)]
    data = {
        "store_dir": str(folder / "stores"),
        "train": str(write_jsonl(folder / "train.jsonl", texts[:270])),
        "validation": str(write_jsonl(folder / "validation.jsonl", texts[270:])),
        "tokenizer": str(byte_level_folder(folder / "tokenizer")),
        "row_tokens": 256,
        "workers": 1,
    }
    values = {
        "run_dir": str(folder / name), "task": "causal_lm", "seed": 3, "data": data,
        "model": {
            "init": "random",
            "config": {
                "model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256,
                "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
            },
        },
        "optimizer": {"learning_rate": 2e-3, "weight_decay": 0.1, "warmup_steps": 2},
        "batch": {"global_rows": 6, "micro_rows": 1},
        "duration": {"steps": STEPS},
        "evaluation": {"eval_every_steps": 5},
        "checkpoint": {"save_every_steps": SAVE_EVERY, "keep_checkpoints": 9},
    }  # fmt: skip
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        values[section] = value if not key else values[section] | {key: value}
    RunConfig.model_validate(values)
    prepare(DataConfig.model_validate(values["data"]), values["data"], "causal_lm", progress=False)
    path = folder / f"{name}.yaml"
    path.write_text(dump_yaml(values))
    return path


def metrics(run_dir: Path, kind: str = "train") -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    chosen = [line for line in lines if line["kind"] == kind]
    assert len({line["step"] for line in chosen}) == len(chosen), "a step is logged twice"
    return {line["step"]: line for line in chosen}


def state_bytes(run_dir: Path, step: int) -> dict[str, bytes]:
    """Masters and moments of a checkpoint as raw bytes, by file and tensor."""
    checkpoint = run_dir / "checkpoints" / f"step-{step:08d}"
    files = sorted(checkpoint.glob("slices-*.safetensors"))
    assert files
    return {
        f"{file.name}:{name}": tensor.numpy().tobytes() for file in files for name, tensor in load_file(file).items()
    }


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        if path.exists() and f'"kind": "train", "step": {step},' in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came")
