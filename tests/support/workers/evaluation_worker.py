"""One rank of the evaluation tests: evaluates every case of `evaluation_cases`; rank 0 writes the figures as JSON."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from equivalence_cases import Case, case_config, fitting_task, make_model, store_of

from data_prep.token_store import RowSource
from engine.errors import NumericalStopError
from engine.evaluate import evaluate
from engine.micro_batches import MicroBatches
from engine.model.attention import register_packed_attention
from engine.model.starting_weights import StartingWeights
from engine.ranks.agreement import all_gather_json
from engine.ranks.distributed import leave, start_ranks
from engine.setup import quiet_libraries
from engine.zero.ds_config import resolve_ds_config
from engine.zero.wrap import fill, wrap

FAMILIES = sys.argv[2].split(",")


class Stop:
    """A stop that one rank is asked for when it has run some micro-batches."""

    def __init__(self, rank: int):
        self.rank, self.rounds = rank, 0

    @property
    def asked(self) -> bool:
        self.rounds += 1
        return self.rank == 0 and self.rounds > 2


def evaluations(family: str, out_dir: Path, ranks: Any) -> dict[str, Any]:
    """Figures at several micro-batch sizes; 8 packs and 24 texts do not divide evenly. And of two sources."""
    case = Case("evaluation", family=family)
    config = case_config(case, out_dir)
    store, rows = store_of(family)
    task = fitting_task(family)
    model = make_model(family, packed=task.packs)
    weights = StartingWeights.of(model)
    zero = wrap(model, task, config, resolve_ds_config(config, ranks.world_size))
    fill(zero, weights)
    engine = zero.engine
    engine.train()
    results: dict[str, Any] = {}
    seen: list[tuple[int, ...]] = []
    hook = engine.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].rows))
    for size in (MicroBatches(1), MicroBatches(3), MicroBatches(100), MicroBatches(tokens=60)):
        seen.clear()
        figures = evaluate(engine, task, store, rows, ranks, size)
        results[str(size.tokens or size.rows)] = figures
        results[f"groups {size.tokens or size.rows}"] = all_gather_json(seen)
    hook.remove()
    cut = rows.num_rows // 3
    parts = (RowSource("first", 0, cut, cut), RowSource("second", cut, rows.num_rows - cut, 1))
    sources = dataclasses.replace(rows, sources=parts)
    results["sources"] = evaluate(engine, task, store, sources, ranks, MicroBatches(2))
    stop = Stop(ranks.rank)
    results["stopped"] = evaluate(engine, task, store, rows, ranks, MicroBatches(1), stop)
    results["rounds"] = stop.rounds
    results["trains_again"] = engine.module.training
    weight = next(model.parameters())
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        weight.data.fill_(float("nan"))
    try:
        evaluate(engine, task, store, rows, ranks, MicroBatches(3))
    except NumericalStopError as error:
        results["not finite"] = str(error)
    engine.destroy()
    return results


def main() -> None:
    torch.set_num_threads(1)
    register_packed_attention()
    ranks = start_ranks()
    quiet_libraries()
    out_dir = Path(sys.argv[1])
    results = {family: evaluations(family, out_dir, ranks) for family in FAMILIES}
    if ranks.rank == 0:
        (out_dir / f"evaluations-{ranks.world_size}.json").write_text(json.dumps(results))
    dist.barrier()
    leave(0)


main()
