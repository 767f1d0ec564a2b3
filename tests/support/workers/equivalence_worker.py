"""One rank of the gradient-equivalence test: trains one real step for every case and writes its gradients.

Adam's first moment after the first update is (1 - beta1) x the gradient that was applied, so the
gradient is read from the state the optimizer really used, whatever DeepSpeed did to it before.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from equivalence_cases import BETA1, Case, case_config, cases, documents_a_row, fitting_task, make_model, store_of
from safetensors.torch import save_file

from engine.checkpoint.save import Owner
from engine.checkpoint.schedule import Saves
from engine.model.attention import register_packed_attention
from engine.model.frozen import freeze
from engine.model.starting_weights import StartingWeights
from engine.ranks.distributed import leave, start_ranks
from engine.ranks.stop import StopSignal
from engine.setup import quiet_libraries
from engine.step import Progress, Training, train_step
from engine.zero.ds_config import resolve_ds_config
from engine.zero.gradient_watch import GradientWatch
from engine.zero.wrap import fill, wrap


def run_case(case: Case, out_dir: Path, ranks) -> None:
    store, rows = store_of(case.family, documents_a_row(case.family))
    config = case_config(case, out_dir)
    ds_config = resolve_ds_config(config, ranks.world_size)
    task = fitting_task(case.family)
    model = make_model(case.family, packed=task.packs)
    freeze(model, case.freeze)
    if case.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    weights = StartingWeights.of(model)
    zero = wrap(model, task, config, ds_config)
    fill(zero, weights)
    training = Training(
        config=config, ranks=ranks, zero=zero, gradients=GradientWatch(zero.parameters),
        saves=Saves(zero, out_dir, Owner(), config.checkpoint), store=store, rows=rows, total_steps=10,
    )  # fmt: skip
    zero.engine.train()
    figures = train_step(training, Progress(), StopSignal()).figures
    trained = {name: shape for name, shape in zero.shapes.items() if name not in zero.frozen}
    gradients = {name: torch.zeros(math.prod(shape)) for name, shape in trained.items()}
    for piece in zero.live_state("exp_avg"):
        gradients[piece.name][piece.start : piece.stop] = piece.values.cpu() / (1 - BETA1)
    for name, shape in trained.items():
        dist.all_reduce(gradients[name])
        gradients[name] = gradients[name].reshape(shape)
    if ranks.rank == 0:
        save_file(gradients, out_dir / f"{case.name}-{ranks.world_size}.safetensors")
        (out_dir / f"{case.name}-{ranks.world_size}.json").write_text(json.dumps(figures))
    zero.engine.destroy()


def main() -> None:
    torch.set_num_threads(1)
    register_packed_attention()
    ranks = start_ranks()
    quiet_libraries()
    for case in cases(ranks.world_size):
        run_case(case, Path(sys.argv[1]), ranks)
    dist.barrier()
    leave(0)


main()
