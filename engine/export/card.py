"""README.md of an exported model: what was trained, on what, how far, and how well. No paths, no hosts."""

import datetime
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.arithmetic import is_hub_name
from engine.tasks import TASKS

_VERSIONS = ("torch", "deepspeed", "transformers")


def model_card(
    run_dir: Path, config: Mapping[str, Any], state: Mapping[str, Any] | None, manifest: Mapping[str, Any]
) -> str:
    """The text of the card.

    `config` is the resolved run file, `state` the training state of the exported step (see
    `engine.train.save`; None: nothing was trained yet), `manifest` that of the training store.
    Evaluations come from `run_dir`'s metrics.
    """
    step = int(state["step"]) if state is not None else 0
    base = _base_model(config["model"])
    head = ["---", "library_name: transformers", f"pipeline_tag: {TASKS[config['task']].pipeline}"]
    if base is not None and "/" in base:
        head.append(f"base_model: {json.dumps(base)}")
    head += ["tags:", "- fulltune", "- full-fine-tuning", "---", ""]
    sections = [
        f"# {run_dir.absolute().name}, step {step}",
        "",
        _origin(config, base) if state is not None else _untrained(base),
        *(["", "## Training", "", *_table(_training(config, state))] if state is not None else []),
        "",
        "## Data",
        "",
        "| source | records | documents | tokens | targets |",
        "|---|---|---|---|---|",
        *(_source_row(entry) for entry in manifest["ledger"]["sources"]),
    ]
    evaluations = _evaluations(run_dir, step)
    if evaluations:
        sections += ["", "## Evaluation on held-out data", "", *_table(evaluations)]
    sections += ["", "## Made with", "", *_table(_made_with())]
    return "\n".join([*head, *sections]) + "\n"


def _base_model(section: Mapping[str, Any]) -> str | None:
    """The starting weights' name: a Hub name whole, of a folder its last part; None for fresh weights."""
    path = section.get("path")
    if section.get("init") == "random" or path is None:
        return None
    return path if is_hub_name(path) and not Path(path).is_dir() else Path(path).name


def _origin(config: Mapping[str, Any], base: str | None) -> str:
    task = str(config["task"]).replace("_", " ")
    start = f"starting from {base}" if base is not None else "starting from random weights"
    return f"Every weight trained for {task}, {start}."


def _untrained(base: str | None) -> str:
    return f"The starting weights of a run{f' from {base}' if base is not None else ''}: nothing is trained yet."


def _training(config: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    optimizer, batch, progress = config["optimizer"], config["batch"], state["progress"]
    size = f"{batch['global_rows']} rows" if batch.get("global_rows") else f"{batch['global_tokens']} tokens"
    return {
        "steps": state["step"],
        "tokens": f"{progress['tokens']:,}",
        "targets": f"{progress['targets']:,}",
        "batch": f"{size} of up to {config['data']['row_tokens']} tokens",
        "optimizer": f"AdamW, betas {tuple(optimizer['betas'])}, eps {optimizer['eps']}, weight decay "
        f"{optimizer['weight_decay']}, clipping at {optimizer['gradient_clipping']}",
        "learning rate": f"{optimizer['learning_rate']}, {optimizer['schedule']}, {optimizer['warmup_steps']} steps of "
        "warm-up",
        "seed": config["seed"],
        "precision": "bf16 weights, fp32 masters and moments"
        if state["circumstances"]["deepspeed"]["bf16"]["enabled"]
        else "fp32",
        "ranks": state["circumstances"]["ranks"],
    }


def _source_row(entry: Mapping[str, Any]) -> str:
    # A source's name may be a path of the machine that prepared it.
    name = Path(str(entry["name"])).name.replace("|", "\\|")
    numbers = (entry["records_read"], entry["documents"], entry["tokens_in_rows"], entry["targets_in_rows"])
    return f"| {name} | " + " | ".join(f"{number:,}" for number in numbers) + " |"


def _evaluations(run_dir: Path, step: int) -> dict[str, Any]:
    """The figures of the last evaluation up to `step`."""
    last: dict[str, Any] = {}
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            figures = json.loads(line)
        except ValueError:
            continue
        if figures.get("kind") == "evaluation" and figures.get("step", step + 1) <= step:
            last = figures
    shown = {key: value for key, value in last.items() if key not in ("kind", "step", "seconds")}
    rounded = {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in shown.items()}
    return ({"after step": last["step"]} | rounded) if last else {}


def _made_with() -> dict[str, Any]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _VERSIONS)
    return {"software": f"fulltune, {versions}", "date": datetime.datetime.now(datetime.UTC).date().isoformat()}


def _table(values: Mapping[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in values.items())]
