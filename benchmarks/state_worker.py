"""One rank of benchmarks/state.py: loads, saves, resumes, and reports what that took.

    torchrun ... benchmarks/state_worker.py PHASE '{"work": ..., "model": ..., ...}'

A phase is a function below. DeepSpeed with the shipped configuration zero3_offload on CPU ranks:
bf16 weights, DeepSpeedCPUAdam with fp32 masters and moments.
"""

import contextlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import deepspeed
import torch
import torch.distributed as dist
from state_measure import Meter, folder_bytes, write_report

from engine.batches import Batch
from engine.checkpoint import restore
from engine.checkpoint.reader import CheckpointReader
from engine.checkpoint.save import Owner, save_checkpoint
from engine.checkpoint.schedule import Saves
from engine.config import RunConfig
from engine.model.build import StoreFacts, build_model
from engine.model.starting_weights import StartingWeights
from engine.ranks.distributed import Ranks, leave, start_ranks
from engine.setup import quiet_libraries
from engine.tensor_files.range_reader import read_ranges
from engine.tensor_files.slices import LiveSlice
from engine.zero.ds_config import resolve_ds_config
from engine.zero.prebuild import load_ops_once
from engine.zero.wrap import fill, wrap
from engine.zero.zero_model import ZeroModel

Arguments = dict[str, Any]


def run_config(arguments: Arguments, model: dict[str, Any]) -> RunConfig:
    """A run on `model`; its data section names no store, because no data is read."""
    return RunConfig.model_validate(
        {
            "run_dir": arguments["run_dir"], "task": "causal_lm", "data": {"store_dir": "none", "row_tokens": 512},
            "model": {"activation_checkpointing": False, **model}, "optimizer": {"learning_rate": 1e-5},
            "batch": {"global_rows": 1024}, "duration": {"steps": 1000}, "deepspeed": "zero3_offload",
            "checkpoint": {"keep_checkpoints": 1},
        }
    )  # fmt: skip


def ready_engine(config: RunConfig, ranks: Ranks, vocab_size: int) -> tuple[ZeroModel, dict[str, float]]:
    """An engine with its starting weights, as a training run makes it; the bytes its loader says it read."""
    facts = StoreFacts(vocab_size, 0, None, None, ())
    model, weights = build_model(config.model, config.trained_task, facts, config.seed)
    counted = _CountingWeights(**vars(weights))
    ds_config = resolve_ds_config(config, ranks.world_size)
    with InitializeSeconds() as initialize:
        zero = wrap(model, config.trained_task, config, ds_config)
    fill(zero, counted, lambda _line: None)
    return zero, {"loader_bytes": counted.num_read, "initialize_seconds": initialize.seconds}


class InitializeSeconds:
    """Seconds spent in `deepspeed.initialize` within a `with` block, which every loader has to call."""

    seconds = 0.0

    def __enter__(self) -> Self:
        self._real = deepspeed.initialize
        deepspeed.initialize = self._timed
        return self

    def __exit__(self, *_: object) -> None:
        deepspeed.initialize = self._real

    def _timed(self, *arguments: Any, **options: Any) -> Any:
        dist.barrier()
        started = time.perf_counter()
        result = self._real(*arguments, **options)
        dist.barrier()
        self.seconds += time.perf_counter() - started
        return result


class _CountingWeights(StartingWeights):
    """Starting weights that remember how many bytes were read of them."""

    num_read = 0

    def read_into(self, pieces: Iterable[LiveSlice]) -> int:
        """As in StartingWeights."""
        count = super().read_into(pieces)
        self.num_read += count
        return count

    def check_copies(self, pieces: Iterable[LiveSlice]) -> int:
        """As in StartingWeights."""
        count = super().check_copies(pieces)
        self.num_read += count
        return count


def warm_up(arguments: Arguments, ranks: Ranks) -> None:
    """Make and drop a tiny engine: imports and compiled ops are then neither timed nor counted as reads or memory.

    Nor is the table of all families' conversions, which transformers compiles at the first load (0.8 s).
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping(arguments["config"]["model_type"])
    small = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = run_config(arguments, {"config": arguments["config"] | small, "init": "random"})
    zero, _ = ready_engine(config, ranks, 64)
    zero.engine.destroy()


def phase_load(arguments: Arguments, ranks: Ranks) -> dict[str, Any]:
    """Weights of a folder into a ready engine: masters filled, weights made of them."""
    warm_up(arguments, ranks)
    config = run_config(arguments, {"path": arguments["model"]})
    dist.barrier()
    with Meter() as meter:
        zero, notes = ready_engine(config, ranks, arguments["config"]["vocab_size"])
        dist.barrier()
    return meter.report() | notes | held(zero)


def phase_load_transformers(arguments: Arguments, ranks: Ranks) -> dict[str, Any]:
    """The same with transformers: from_pretrained under ZeRO-3, then deepspeed.initialize."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    warm_up(arguments, ranks)
    ds_config = resolve_ds_config(run_config(arguments, {"path": arguments["model"]}), ranks.world_size)
    dist.barrier()
    with Meter() as meter:
        known = HfDeepSpeedConfig(ds_config)  # transformers keeps a weak reference only
        model = AutoModelForCausalLM.from_pretrained(arguments["model"], dtype=torch.bfloat16)
        optimizer = DeepSpeedCPUAdam(model.parameters(), lr=1e-5)
        with InitializeSeconds() as initialize:
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    del known
    notes = {"initialize_seconds": initialize.seconds}
    return meter.report() | notes | held(ZeroModel(engine, dict(model.named_parameters())))


def held(zero: ZeroModel) -> dict[str, Any]:
    """Bytes of this rank's share of weights and optimizer state, and what proves that the weights are there."""
    from deepspeed.utils import safe_get_full_fp32_param

    optimizer = zero.engine.optimizer
    masters = optimizer.fp32_partitioned_groups_flat
    tensors = [parameter.ds_tensor for parameter in zero.parameters.values()] + masters
    tensors += [master.grad for master in masters] + [optimizer.grad_partitions_flat_buffer]
    tensors += [value for state in optimizer.optimizer.state.values() for value in state.values()]
    live = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    first = safe_get_full_fp32_param(next(iter(zero.parameters.values())))
    return {
        "held_bytes": sum(tensor.numel() * tensor.element_size() for tensor in live),
        "first_sum": float(first.double().sum()),
    }


def make_batch(arguments: Arguments, number: int) -> Batch:
    """One packed micro-batch of random tokens, another for every rank."""
    count = arguments["micro_tokens"]
    generator = torch.Generator().manual_seed(1000 * number + dist.get_rank())
    tokens = torch.randint(0, arguments["config"]["vocab_size"], (count,), generator=generator)
    return Batch(
        input_ids=tokens[None], position_ids=torch.arange(count)[None], rows=(0,), num_tokens=count,
        document_ends=torch.tensor([0, count], dtype=torch.int32), longest_document_tokens=count,
        target_positions=torch.arange(count - 1), target_ids=tokens[1:],
        target_owners=torch.zeros(count - 1, dtype=torch.int64),
    )  # fmt: skip


def forward_backward(zero: ZeroModel, arguments: Arguments, count: int) -> float:
    """`count` micro-batches; their seconds on the slowest rank."""
    dist.barrier()
    started = time.perf_counter()
    for number in range(count):
        loss_sum, *_ = zero.engine(make_batch(arguments, number))
        zero.engine.backward(loss_sum / arguments["micro_tokens"], scale_wrt_gas=False)
    dist.barrier()
    return time.perf_counter() - started


def agreed(value: float, ranks: Ranks) -> float:
    """The largest of all ranks' values, as they must agree on what follows from it."""
    tensor = torch.tensor([value], dtype=torch.float64, device=ranks.device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def timed(ranks: Ranks, action: Callable[[], Any]) -> float:
    """Seconds that `action` takes on the slowest rank."""
    dist.barrier()
    started = time.perf_counter()
    action()
    return agreed(time.perf_counter() - started, ranks)


def phase_save(arguments: Arguments, ranks: Ranks) -> dict[str, Any]:
    """Saves beside the training and DeepSpeed's own, of one state."""
    config = run_config(arguments, {"config": arguments["config"], "init": "random"})
    zero, _ = ready_engine(config, ranks, arguments["config"]["vocab_size"])
    if ranks.rank == 0:
        zero.model.config.save_pretrained(config.run_dir / "model")
    saves = Saves(zero, config.run_dir, Owner("benchmark"), config.checkpoint)
    forward_backward(zero, arguments, 1)
    zero.engine.step()
    micro_seconds = agreed(forward_backward(zero, arguments, 2) / 2, ranks)
    zero.engine.step()
    write_seconds = timed(ranks, lambda: saves.save_now({"step": 1}))
    saves.close(verify=True)
    # Twice as long as a write that has the disk and the cores for itself: both are shared now.
    count = max(2, int(arguments["shadow"] * write_seconds / micro_seconds) + 1)
    plain, saving, stalls, peaks, waits = [], [], [], [], []
    step = 1
    for _ in range(arguments["rounds"]):
        with Meter() as meter:
            plain.append(agreed(forward_backward(zero, arguments, count), ranks))
        peaks.append(meter.report()["peak_mb"])
        zero.engine.step()
        step += 2
        with Meter() as meter:
            saves.begin({"step": step})
            begun = saves.take_stall_seconds()
            saving.append(agreed(forward_backward(zero, arguments, count), ranks))
            saves.before_update(all_verified=True)
            finished = saves.take_stall_seconds()
        zero.engine.step()
        stalls.append(agreed(begun + finished, ranks))
        waits.append(finished)
        peaks[-1] = meter.report()["peak_mb"] - peaks[-1]
        while agreed(float(saves.is_verifying), ranks):
            time.sleep(0.1)
    saves.close(verify=True)
    tag_dir = Path(arguments["run_dir"]) / "deepspeed"
    theirs = []
    for number in range(arguments["rounds"]):
        theirs.append(timed(ranks, lambda tag=f"step{number}": zero.engine.save_checkpoint(tag_dir, tag=tag)))
        if number and ranks.rank == 0:
            shutil.rmtree(tag_dir / f"step{number - 1}")
    checkpoint = restore.find_checkpoint(config.run_dir)
    return sizes(zero, checkpoint) | {
        "micro_batches": count, "write_seconds": write_seconds, "plain_seconds": plain, "saving_seconds": saving,
        "stall_seconds": stalls, "finish_seconds": waits, "extra_mb": peaks, "deepspeed_seconds": theirs,
        "deepspeed_bytes": folder_bytes(tag_dir),
    }  # fmt: skip


def phase_write(arguments: Arguments, ranks: Ranks) -> dict[str, Any]:
    """One checkpoint, to be exported."""
    config = run_config(arguments, {"config": arguments["config"], "init": "random"})
    zero, _ = ready_engine(config, ranks, arguments["config"]["vocab_size"])
    if ranks.rank == 0:
        zero.model.config.save_pretrained(config.run_dir / "model")
    return sizes(zero, save_checkpoint(zero, config.run_dir, {"step": 1}))


def sizes(zero: ZeroModel, checkpoint: Path | None) -> dict[str, Any]:
    """Of a checkpoint and what it holds."""
    assert checkpoint is not None
    counts = [parameter.ds_numel for parameter in zero.parameters.values()]
    return {
        "checkpoint": str(checkpoint), "checkpoint_bytes": folder_bytes(checkpoint), "parameters": sum(counts),
        "largest_tensor_bytes": 4 * max(counts), "world_size": dist.get_world_size(),
    }  # fmt: skip


def phase_resume(arguments: Arguments, ranks: Ranks) -> dict[str, Any]:
    """A checkpoint into a fresh engine: memory once, then time with and without comparing hashes."""
    config = run_config(arguments, {"config": arguments["config"], "init": "random"})
    zero, _ = ready_engine(config, ranks, arguments["config"]["vocab_size"])
    path = Path(arguments["checkpoint"])
    with Meter() as meter:
        restore.load_checkpoint(zero, path)
    beyond = meter.peak_bytes - max(meter.before_bytes, meter.after_bytes)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * arguments["rounds"]):
        for verified in (True, False) if number % 2 else (False, True):
            with hashes(verified):
                seconds[verified].append(timed(ranks, lambda: restore.load_checkpoint(zero, path)))
    return meter.report() | {
        "beyond_mb": beyond / 1e6,
        "share_bytes": 12 * sum(piece.stop - piece.start for piece in zero.owned_slices()),
        "verified_seconds": statistics.median(seconds[True]),
        "unverified_seconds": statistics.median(seconds[False]),
    }


@contextlib.contextmanager
def hashes(compared: bool) -> Iterator[None]:
    """Whether a checkpoint's blocks are compared with their hashes within the block."""
    real = CheckpointReader.read_into, CheckpointReader.verify_rest
    if not compared:
        CheckpointReader.read_into = lambda _self, wanted: read_ranges(wanted)  # type: ignore[method-assign]
        CheckpointReader.verify_rest = lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        CheckpointReader.read_into, CheckpointReader.verify_rest = real  # type: ignore[method-assign]


PHASES = {
    "load": phase_load,
    "load_transformers": phase_load_transformers,
    "save": phase_save,
    "write": phase_write,
    "resume": phase_resume,
}


def main() -> None:
    """Run one phase and report."""
    arguments = json.loads(sys.argv[2])
    load_ops_once(False)
    quiet_libraries()
    ranks = start_ranks()
    report = PHASES[sys.argv[1]](arguments, ranks)
    write_report(arguments, ranks.rank, report)
    dist.barrier()
    leave(0)


if __name__ == "__main__":
    main()
