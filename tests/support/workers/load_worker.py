"""One rank of the loading test: loads every case, gathers what ZeRO holds, and rank 0 writes it down."""

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from equivalence_cases import Case, case_config
from load_cases import SEED, LoadCase, cases, facts_of, section_of
from safetensors.torch import save_file

from engine.model.build import build_model, fitting_task
from engine.ranks.distributed import leave, start_ranks
from engine.setup import quiet_libraries
from engine.tasks import TASKS
from engine.zero.ds_config import resolve_ds_config
from engine.zero.wrap import fill, wrap
from engine.zero.zero_model import ZeroModel


def gathered(zero: ZeroModel) -> dict[str, torch.Tensor]:
    """Masters, the weights that are computed with, and buffers, whole."""
    state = {}
    for name, parameter in zero.parameters.items():
        if parameter.requires_grad:
            state[f"master/{name}"] = safe_get_full_fp32_param(parameter).clone().view(zero.shapes[name])
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            state[f"weight/{name}"] = parameter.detach().clone()
    for name, buffer in zero.model.named_buffers():
        state[f"buffer/{name}"] = buffer.clone()
    return state


def run(case: LoadCase, folder: Path, out_dir: Path, ranks: Any) -> None:
    config = case_config(Case(case.name, stage=case.stage, offload=case.offload, bf16=case.bf16), out_dir)
    config = config.model_copy(update={"task": case.task})
    ds_config = resolve_ds_config(config, ranks.world_size)
    printed = io.StringIO()
    with redirect_stdout(printed):
        section, facts = section_of(case, folder), facts_of(case, folder)
        task = fitting_task(section, TASKS[case.task], facts, one_document_a_row=False)
        model, weights = build_model(section, task, facts, SEED)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in case.frozen)
        zero = wrap(model, task, config, ds_config)
        read = torch.zeros(ranks.world_size, dtype=torch.int64)
        read[ranks.rank] = fill(zero, weights)
        stored_bytes = weights.num_bytes
        del weights
    dist.all_reduce(read)
    padding = sum(float(values.abs().sum()) for values in _padding(zero))
    state = gathered(zero)
    facts = {"printed": printed.getvalue(), "padding": padding, "bytes": read.tolist(), "stored_bytes": stored_bytes}
    if ranks.rank == 0:
        save_file({name: value.contiguous() for name, value in state.items()}, out_dir / f"{case.name}.safetensors")
        (out_dir / f"{case.name}.json").write_text(json.dumps(facts))
    zero.engine.destroy()


def _padding(zero: ZeroModel) -> list[torch.Tensor]:
    """What the master buffers hold besides this rank's slices."""
    rest = []
    used: dict[int, list[tuple[int, int]]] = {}
    buffers: dict[int, torch.Tensor] = {}
    for piece in zero.live_state("master"):
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
