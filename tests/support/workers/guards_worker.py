"""One rank of the guard tests; rank 0 writes what happened as JSON."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from equivalence_cases import Case, case_config, make_model
from memory_stores import MemoryStore, memory_store
from safetensors.torch import load_file

from data_prep.token_store import StoreError, TokenStore, open_rows
from engine.checkpoint.save import Owner, save_checkpoint
from engine.checkpoint.schedule import Saves
from engine.config import RunConfig
from engine.errors import NumericalStopError
from engine.micro_rows import longest_rows, try_rows
from engine.model.attention import register_packed_attention
from engine.model.build import StoreFacts, build_model
from engine.model.starting_weights import StartingWeights
from engine.ranks.distributed import leave, start_ranks
from engine.ranks.stop import StopSignal
from engine.sections import ModelSection
from engine.setup import quiet_libraries
from engine.step import Progress, Training, train_step
from engine.tasks import TASKS
from engine.tasks.task import STILL
from engine.zero.ds_config import resolve_ds_config, shipped_ds_configs
from engine.zero.gradient_watch import GradientWatch
from engine.zero.wrap import fill, wrap


def training_of(case: Case, out_dir: Path, ranks, model: Any = None, **changes: Any) -> Training:
    store, rows = memory_store(case.task)
    config = case_config(case, out_dir).model_copy(update=changes)
    model = model or make_model(case.family, packed=config.trained_task.packs)
    return training_on(config, model, StartingWeights.of(model), store, rows, ranks)


def training_on(config: RunConfig, model: Any, weights: StartingWeights, store: Any, rows: Any, ranks: Any) -> Training:
    """Ten steps of `model` from `weights` on the rows of a store."""
    zero = wrap(model, config.trained_task, config, resolve_ds_config(config, ranks.world_size))
    fill(zero, weights)
    zero.engine.train()
    return Training(
        config=config, ranks=ranks, zero=zero, gradients=GradientWatch(zero.parameters),
        saves=Saves(zero, config.run_dir, Owner(), config.checkpoint), store=store, rows=rows, total_steps=10,
    )  # fmt: skip


def masters(training: Training) -> torch.Tensor:
    return torch.cat([piece.values.clone() for piece in training.zero.live_state("master")])


def refused_step(training: Training) -> dict[str, Any]:
    """Run one step that must be refused; what was said, and whether weights stayed bit-equal everywhere."""
    before, message = masters(training), ""
    try:
        train_step(training, Progress(), StopSignal())
    except (NumericalStopError, StoreError) as error:
        message = str(error)
    unchanged = torch.tensor([int(torch.equal(before, masters(training)) and message != "")])
    dist.all_reduce(unchanged)
    return {"message": message, "ranks_unchanged": int(unchanged)}


class ChangedStore(MemoryStore):
    """A store whose files were replaced."""

    def check_unchanged(self) -> None:
        raise StoreError("memory.npy: changed, replaced or removed while it was in use")


def changed_store(out_dir: Path, ranks) -> dict[str, Any]:
    """A step on a store that changed since it was opened."""
    training = training_of(Case("guards"), out_dir, ranks)
    store = ChangedStore(training.store.documents, training.store.marks, training.store.labels)
    result = refused_step(dataclasses.replace(training, store=store))
    training.zero.engine.destroy()
    return result


def bad_loss(out_dir: Path, ranks) -> dict[str, Any]:
    """The loss of one micro-batch of rank 1 becomes NaN."""
    training = training_of(Case("guards"), out_dir, ranks)
    calls = []

    def spoil(_module: Any, arguments: Any, output: Any) -> Any:
        calls.append(arguments[0].rows)
        is_spoilt = ranks.rank == 1 and len(calls) == 2
        return output._replace(loss_sum=output.loss_sum * float("nan")) if is_spoilt else output

    training.zero.engine.module.register_forward_hook(spoil)
    result = refused_step(training)
    result["rows_of_rank_1"] = ranks.gather([*calls[1], *[-1] * (2 - len(calls[1]))])[1]
    training.zero.engine.destroy()
    return result


def bad_gradient(out_dir: Path, ranks) -> dict[str, Any]:
    """The loss is finite; a gradient of rank 1 is not. Every stage and precision has its own check in DeepSpeed."""
    cases = {
        "zero3_offload": Case("guards"), "zero3_offload_bf16": Case("guards", bf16=True),
        "zero3_bf16": Case("guards", bf16=True, offload=False),
        "zero2": Case("guards", stage=2, offload=False), "zero2_bf16": Case("guards", stage=2, offload=False, bf16=True),
        "zero2_offload_bf16": Case("guards", stage=2, bf16=True),
    }  # fmt: skip
    return {name: refused_gradient(case, out_dir, ranks) for name, case in cases.items()}


def refused_gradient(case: Case, out_dir: Path, ranks) -> dict[str, Any]:
    training = training_of(case, out_dir, ranks)

    def spoil(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if ranks.rank == 1:
            output.register_hook(lambda gradient: gradient * float("inf"))

    training.zero.engine.module.model.model.norm.register_forward_hook(spoil)
    result = refused_step(training)
    training.zero.engine.destroy()
    return result


def missing_gradient(out_dir: Path, ranks) -> dict[str, Any]:
    """A trainable parameter that the task does not use."""
    model = make_model("llama", packed=True)
    model.forgotten = torch.nn.Parameter(torch.ones(8, 8))
    training = training_of(Case("guards"), out_dir, ranks, model)
    result = refused_step(training)
    training.zero.engine.destroy()
    return result


def fp32_masters(out_dir: Path, ranks) -> dict[str, Any]:
    """Training in bf16 from fp32 weights: are the masters the file's values, and the weights their rounding?"""
    config = case_config(Case("masters", bf16=True), out_dir)
    model = make_model("llama", packed=True)
    originals = {name: parameter.detach().clone().flatten() for name, parameter in model.named_parameters()}
    rotary = model.model.rotary_emb.inv_freq.clone()
    weights = StartingWeights.of(model)
    zero = wrap(model, config.trained_task, config, resolve_ds_config(config, ranks.world_size))
    fill(zero, weights)
    masters_equal = all(
        torch.equal(piece.values.cpu(), originals[piece.name][piece.start : piece.stop])
        for piece in zero.live_state("master")
    )
    weights_equal = True
    for name, parameter in zero.parameters.items():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights_equal &= torch.equal(parameter.detach().flatten().cpu(), originals[name].bfloat16())
    result = {
        "masters_equal": masters_equal, "weights_equal": weights_equal,
        "lossy": any(not torch.equal(value, value.bfloat16().float()) for value in originals.values()),
        "rotary_kept": torch.equal(model.model.rotary_emb.inv_freq.cpu(), rotary),
    }  # fmt: skip
    zero.engine.destroy()
    return result


def dropout(out_dir: Path, ranks) -> dict[str, Any]:
    """The same step twice is bit-equal; another step, or no dropout, is not."""
    losses = []
    for step, probability in ((0, 0.3), (0, 0.3), (1, 0.3), (0, 0.0)):
        model = make_model("gpt2", packed=True)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = probability
        training = training_of(Case("gpt2", family="gpt2"), out_dir, ranks, model)
        losses.append(train_step(training, Progress(step=step), StopSignal()).figures["loss"])
        training.zero.engine.destroy()
    return {"losses": losses}


def shipped(out_dir: Path, ranks) -> dict[str, Any]:
    """Three steps in bf16 with every configuration of ds_configs/ but that for NVMe, which test_nvme.py runs."""
    losses = {}
    for name in shipped_ds_configs():
        if name == "zero3_offload_nvme":
            continue
        training = training_of(Case("shipped"), out_dir, ranks, deepspeed=name)
        progress = Progress()
        losses[name] = [train_step(training, progress, StopSignal()).figures["loss"] for _ in range(3)]
        training.zero.engine.destroy()
    return losses


def trials(out_dir: Path, ranks) -> dict[str, Any]:
    """Two steps with trials of micro-batches before them, and without: are the masters bit-equal on every rank?"""
    result = {}
    for name, case in {
        "zero3_offload": Case("guards"), "zero3_bf16": Case("guards", bf16=True, offload=False),
        "zero2_bf16": Case("guards", stage=2, offload=False, bf16=True),
    }.items():  # fmt: skip
        after = []
        for sizes in ((), (1, 2, 4)):
            training = training_of(case, out_dir, ranks)
            start = masters(training)
            for size in sizes:
                rows = longest_rows(training.rows, size)
                try_rows(training.zero, training.store, training.rows, rows, ranks, STILL)
            unchanged = torch.equal(start, masters(training)) and training.zero.engine.global_steps == 0
            progress = Progress()
            for _ in range(2):
                train_step(training, progress, StopSignal())
            after.append(masters(training))
            training.zero.engine.destroy()
        same = unchanged and torch.equal(*after) and not torch.equal(start, after[0])
        result[name] = sum(part[0] for part in ranks.gather([int(same)]))
    return result


def golden(out_dir: Path, ranks) -> dict[str, Any]:
    """Losses and gradient norms of eight real steps in fp32, for one model of each task."""
    results: dict[str, Any] = {}
    for family in ("llama", "bert"):
        training = training_of(Case("golden", family=family), out_dir, ranks)
        progress, figures = Progress(), []
        for _ in range(8):
            step = train_step(training, progress, StopSignal()).figures
            figures.append([step["loss"], step["gradient_norm"]])
        results[family] = figures
        training.zero.engine.destroy()
    return results


def new_rows(out_dir: Path, ranks) -> dict[str, Any]:
    """Train from an extended tokenizer: the gathered first rows against the means, and how far steps move them."""
    store = TokenStore.open(Path((out_dir / "store.txt").read_text()))
    facts = StoreFacts(store.vocab_size, store.pad_id, store.bos_id, store.eos_id, (), store.tokenizer_dir)
    section = ModelSection(path=str(out_dir / "model"), activation_checkpointing=False)
    model, weights = build_model(section, TASKS["causal_lm"], facts, 5)
    old = load_file(out_dir / "model" / "model.safetensors")
    pieces = json.loads((store.tokenizer_dir / "extension.json").read_text())["pieces"]
    first = min(map(int, pieces))
    config = case_config(Case("new_rows", bf16=True), out_dir)
    training = training_on(config, model, weights, store, open_rows(store, 64), ranks)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    expected = {
        name: torch.stack(
            [old[name][ids].double().mean(0) for _, ids in sorted(pieces.items(), key=lambda p: int(p[0]))]
        )
        for name in names
    }
    start = {name: gathered_masters(training, name)[first : store.vocab_size] for name in names}
    progress = Progress()
    losses = [train_step(training, progress, StopSignal()).figures["loss"] for _ in range(3)]
    stop = {name: gathered_masters(training, name)[first : store.vocab_size] for name in names}
    save_checkpoint(training.zero, out_dir / "new_rows", {"step": 3})
    if ranks.rank == 0:
        model.config.save_pretrained(out_dir / "new_rows" / "model")
    used = np.concatenate([store.tokens(document) for document in range(store.num_documents)])
    result = {
        "new": len(pieces), "rows": model.config.vocab_size, "vocab_size": store.vocab_size, "losses": losses,
        "used_in_store": len(np.unique(used[used >= first])),
        "differences": {name: float((start[name] - expected[name]).abs().max()) for name in names},
        "moved": {name: float((stop[name] - start[name]).abs().max()) for name in names},
        "last_embedding": stop[names[0]][-1].tolist(),
    }  # fmt: skip
    training.zero.engine.destroy()
    return result


def gathered_masters(training: Training, name: str) -> torch.Tensor:
    """The whole fp32 master of a matrix, from the parts of all ranks."""
    shape = training.zero.shapes[name]
    whole = torch.zeros(math.prod(shape))
    for piece in training.zero.live_state("master"):
        if piece.name == name:
            whole[piece.start : piece.stop] = piece.values.cpu()
    dist.all_reduce(whole)
    return whole.reshape(shape)


def main() -> None:
    torch.set_num_threads(1)
    register_packed_attention()
    out_dir = Path(sys.argv[1])
    ranks = start_ranks()
    quiet_libraries()
    np.seterr(all="raise")
    results = {
        scenario.__name__: scenario(out_dir, ranks)
        for scenario in (
            changed_store,
            bad_loss,
            bad_gradient,
            missing_gradient,
            fp32_masters,
            dropout,
            shipped,
            trials,
            golden,
            new_rows,
        )
    }
    if ranks.rank == 0:
        (out_dir / "results.json").write_text(json.dumps(results))
    dist.barrier()
    leave(0)


main()
