"""One rank of the loading test: loads every case, gathers what ZeRO holds, and rank 0 writes it down."""

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import zero
from deepspeed.utils import safe_get_full_fp32_param
from equivalence_cases import Case, case_config
from load_cases import SEED, LoadCase, cases, facts_of, section_of
from safetensors.torch import save_file

from engine.model.build import build_model
from engine.ranks.distributed import leave, start_ranks
from engine.setup import build_engine, quiet_libraries
from engine.tasks import TASKS
from engine.zero.ds_config import resolve_ds_config
from engine.zero.zero_state import full_shape, live_state


def gathered(engine: Any, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Masters, the weights that are computed with, and buffers, whole."""
    state = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            state[f"master/{name}"] = safe_get_full_fp32_param(parameter).clone().view(full_shape(parameter))
        with zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            state[f"weight/{name}"] = parameter.detach().clone()
    for name, buffer in engine.module.model.named_buffers():
        state[f"buffer/{name}"] = buffer.clone()
    return state


def run(case: LoadCase, folder: Path, out_dir: Path, ranks: Any) -> None:
    config = case_config(Case(case.name, stage=case.stage, offload=case.offload, bf16=case.bf16), out_dir)
    config = config.model_copy(update={"task": case.task})
    ds_config = resolve_ds_config(config, ranks.world_size)
    printed = io.StringIO()
    with redirect_stdout(printed):
        model, weights = build_model(section_of(case, folder), TASKS[case.task], facts_of(case, folder), SEED)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in case.frozen)
        engine, parameters, fill = build_engine(config, ds_config, model, weights)
        stored_bytes = weights.num_bytes
        del weights
        read = torch.zeros(ranks.world_size, dtype=torch.int64)
        read[ranks.rank] = fill()
    dist.all_reduce(read)
    padding = sum(float(values.abs().sum()) for values in _padding(engine, parameters))
    state = gathered(engine, parameters)
    facts = {"printed": printed.getvalue(), "padding": padding, "bytes": read.tolist(), "stored_bytes": stored_bytes}
    if ranks.rank == 0:
        save_file({name: value.contiguous() for name, value in state.items()}, out_dir / f"{case.name}.safetensors")
        (out_dir / f"{case.name}.json").write_text(json.dumps(facts))
    engine.destroy()


def _padding(engine: Any, parameters: dict[str, torch.nn.Parameter]) -> list[torch.Tensor]:
    """What the master buffers hold besides this rank's slices."""
    rest = []
    used: dict[int, list[tuple[int, int]]] = {}
    buffers: dict[int, torch.Tensor] = {}
    for piece in live_state(engine, parameters, "master"):
        base = piece.values.untyped_storage().data_ptr()
        start = piece.values.storage_offset()
        used.setdefault(base, []).append((start, start + len(piece.values)))
        buffers[base] = torch.empty(0).set_(piece.values.untyped_storage())
    for base, ranges in used.items():
        mask = torch.ones(len(buffers[base]), dtype=torch.bool)
        for start, stop in ranges:
            mask[start:stop] = False
        rest.append(buffers[base][mask])
    return rest


def main() -> None:
    torch.set_num_threads(1)
    folder, out_dir = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = start_ranks()
    quiet_libraries()
    for case in cases(ranks.world_size):
        run(case, folder, out_dir, ranks)
    dist.barrier()
    leave(0)


if __name__ == "__main__":
    main()
