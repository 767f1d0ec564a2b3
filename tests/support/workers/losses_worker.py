"""One rank of the test of losses over steps: trains every case with DeepSpeed and writes the loss of each step.

Arguments: the folder for the results, the DeepSpeed stage, and cases as family:task.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from head_cases import STEPS, head_config, head_model, head_store

from engine.checkpoint.save import Owner
from engine.checkpoint.schedule import Saves
from engine.evaluate import evaluate
from engine.micro_batches import MicroBatches
from engine.model.starting_weights import StartingWeights
from engine.ranks.distributed import leave, start_ranks
from engine.ranks.stop import StopSignal
from engine.setup import quiet_libraries
from engine.step import Progress, Training, train_step
from engine.zero.ds_config import resolve_ds_config
from engine.zero.gradient_watch import GradientWatch
from engine.zero.wrap import fill, wrap


def run_case(family: str, name: str, out_dir: Path, stage: int, ranks: Any) -> dict[str, Any]:
    store, rows = head_store(name)
    config = head_config(name, out_dir, stage)
    task = config.trained_task
    model = head_model(family, task)
    weights = StartingWeights.of(model)
    zero = wrap(model, task, config, resolve_ds_config(config, ranks.world_size))
    fill(zero, weights)
    training = Training(
        config=config, ranks=ranks, zero=zero, gradients=GradientWatch(zero.parameters),
        saves=Saves(zero, out_dir, Owner(), config.checkpoint), store=store, rows=rows, total_steps=STEPS,
    )  # fmt: skip
    figures = evaluate(zero.engine, task, store, rows, ranks, MicroBatches(5))
    assert figures is not None
    del figures["seconds"]
    zero.engine.train()
    progress, steps = Progress(), []
    for _ in range(STEPS):
        steps.append(train_step(training, progress, StopSignal()).figures)
    zero.engine.destroy()
    padding = max(step["padding_fraction"] for step in steps)
    return {"losses": [step["loss"] for step in steps], "padding": padding, "held_out": figures}


def main() -> None:
    torch.set_num_threads(1)
    ranks = start_ranks()
    quiet_libraries()
    out_dir, stage = Path(sys.argv[1]), int(sys.argv[2])
    results = {case: run_case(*case.split(":"), out_dir, stage, ranks) for case in sys.argv[3:]}
    if ranks.rank == 0:
        (out_dir / f"losses-{stage}-{ranks.world_size}.json").write_text(json.dumps(results))
    dist.barrier()
    leave(0)


main()
