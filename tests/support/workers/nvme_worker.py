"""One rank of the tests of optimizer states on NVMe: trains with real DeepSpeed, saves, loads, writes what it saw.

Whole tensors are gathered with DeepSpeed's own accessors, which swap in, not with the code under
test, which reads the files. Arguments: the folder of the test and phases (functions below).
"""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from checkpoint_worker import gathered
from deepspeed.ops.adam import DeepSpeedCPUAdam
from safetensors.torch import save_file
from torch import nn

from engine.checkpoint.restore import find_checkpoint, load_checkpoint
from engine.checkpoint.save import Owner, begin_save, finish_save, save_checkpoint
from engine.errors import FulltuneError
from engine.ranks.distributed import leave
from engine.zero import nvme_state
from engine.zero.nvme_state import remove_swap_files
from engine.zero.zero_state import (
    begin_swapping,
    clear_padding,
    create_optimizer_state,
    live_state,
    optimizer_steps,
    refresh_weights,
)

SAVED_STEP, LAST_STEP = 3, 6
# How sub-groups are read and written: name -> (what offload_optimizer says besides, aio.intra_op_parallelism)
SWAPPING: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 1),
    "overlapped": ({"pipeline_read": True, "pipeline_write": True, "buffer_count": 12}, 2),
}


class OddModel(nn.Module):
    """3.5M parameters of odd sizes: every second gradient of a sub-group begins where no direct read may."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(1003, 701)
        self.up = nn.Linear(701, 1501)
        self.norm = nn.LayerNorm(1501)
        self.down = nn.Linear(1501, 701)
        self.frozen = nn.Linear(701, 701).requires_grad_(False)
        self.output = nn.Linear(701, 1003)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.down(torch.tanh(self.norm(self.up(self.embedding(tokens[:, :-1]))))))
        return nn.functional.cross_entropy(self.output(hidden).float().flatten(0, 1), tokens[:, 1:].flatten())


class Task(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens)


def build(folder: Path, setting: str, seed: int) -> tuple[Any, dict[str, nn.Parameter]]:
    """An engine with its states in memory ("memory") or on disk, masters exactly those of the fp32 model."""
    model = OddModel(seed)
    parameters = dict(model.named_parameters())
    originals = {name: parameter.detach().clone().view(-1) for name, parameter in parameters.items()}
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    more, intra_op_parallelism = SWAPPING.get(setting, ({}, 1))
    offload = {"device": "nvme", "nvme_path": str(folder / "swap" / f"fulltune-{setting}-1"), **more}
    zero = {
        "stage": 3, "reduce_bucket_size": 1_000_000, "sub_group_size": 800_000 // dist.get_world_size(),
        "stage3_param_persistence_threshold": 3000, "offload_param": {"device": "cpu", "pin_memory": False},
        "offload_optimizer": {"pin_memory": False} | (offload if setting in SWAPPING else {"device": "cpu"}),
    }  # fmt: skip
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "managed_gradient_accumulation": False,
        "gradient_clipping": 1.0, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32", "zero_optimization": zero,
        "aio": {"block_size": 2**20, "intra_op_parallelism": intra_op_parallelism},
    }  # fmt: skip
    optimizer = DeepSpeedCPUAdam(groups, lr=1e-2, betas=(0.9, 0.98))
    engine, *_ = deepspeed.initialize(model=Task(model), optimizer=optimizer, config=config)
    begin_swapping(engine)
    clear_padding(engine)
    for piece in live_state(engine, parameters, "master"):
        piece.values.copy_(originals[piece.name][piece.start : piece.stop])
    refresh_weights(engine)
    return engine, parameters


def train(engine: Any, first: int, last: int, before_update: Callable[[int], Any] = lambda _: None) -> list[Any]:
    """Steps first+1 to last on data that depends on step and rank only; [loss, gradient norm] of each."""
    figures = []
    for step in range(first + 1, last + 1):
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        loss = engine(torch.randint(0, 1003, (2, 9), generator=generator))
        engine.backward(loss)
        before_update(step)
        engine.step()
        figures.append([float(loss.detach()), float(engine.get_global_grad_norm())])
    return figures


def record(folder: Path, name: str, engine: Any, parameters: dict[str, nn.Parameter], figures: Any) -> None:
    state = gathered(engine, parameters)
    if dist.get_rank() == 0:
        save_file(state, folder / f"{name}.safetensors")
        facts = {"figures": figures, "steps": optimizer_steps(engine), "swapped": swapped(engine)}
        (folder / f"{name}.json").write_text(json.dumps(facts))


def swapped(engine: Any) -> Any:
    """What is on the disk: for each sub-group whether it is, and the files there are."""
    optimizer = engine.optimizer
    if not optimizer.swap_optimizer:
        return None
    folder = Path(optimizer.optimizer_swapper.swap_folder)
    return {
        "groups": [optimizer._swappable_optimizer_subgroup(number) for number in range(len(optimizer.fp16_groups))],
        "in_memory": [buffer.numel() for buffer in optimizer.fp32_partitioned_groups_flat],
        "files": {path.name: path.stat().st_size for path in folder.iterdir()},
    }


def phase_straight(folder: Path) -> None:
    """Train without a break, saving half-way in the shadow of a step; with states in memory too."""
    for setting in ("memory", *SWAPPING):
        engine, parameters = build(folder, setting, seed=1)
        first = train(engine, 0, SAVED_STEP)
        record(folder, f"{setting}-saved", engine, parameters, first)
        pending = begin_save(engine, parameters, folder / setting, {"step": SAVED_STEP}, Owner())

        def publish(step: int, pending: Any = pending) -> None:
            if step == SAVED_STEP + 1:
                finish_save(pending)

        record(folder, f"{setting}-last", engine, parameters, train(engine, SAVED_STEP, LAST_STEP, publish))
        close(engine)


def phase_resume(folder: Path) -> None:
    """Go on in a new process: from a checkpoint of the same kind, and from the other kind's."""
    for source, setting in (("plain", "plain"), ("overlapped", "overlapped"), ("memory", "plain")):
        engine, parameters = build(folder, setting, seed=2)
        load_checkpoint(engine, parameters, find_checkpoint(folder / source))
        record(folder, f"{source}-to-{setting}", engine, parameters, train(engine, SAVED_STEP, LAST_STEP))
        close(engine)
    engine, parameters = build(folder, "plain", seed=2)
    train(engine, 0, 1)  # also one that has trained is filled anew
    load_checkpoint(engine, parameters, find_checkpoint(folder / "plain"))
    record(folder, "used-engine", engine, parameters, None)
    close(engine)


def phase_other_size(folder: Path) -> None:
    """Load at this number of ranks, into memory and from disk to disk, save again, and load that."""
    size = dist.get_world_size()
    for setting in ("memory", "plain"):
        engine, parameters = build(folder, setting, seed=2)
        load_checkpoint(engine, parameters, find_checkpoint(folder / "plain"))
        record(folder, f"plain-to-{setting}-at-{size}", engine, parameters, None)
        save_checkpoint(engine, parameters, folder / f"{setting}-at-{size}", {"step": SAVED_STEP})
        close(engine)
    engine, parameters = build(folder, "memory", seed=3)
    load_checkpoint(engine, parameters, find_checkpoint(folder / f"plain-at-{size}"))
    record(folder, f"again-at-{size}", engine, parameters, None)
    close(engine)


def phase_start(folder: Path) -> None:
    """A checkpoint before the first step, and what starts from it."""
    engine, parameters = build(folder, "plain", seed=1)
    save_checkpoint(engine, parameters, folder / "start", {"step": 0})
    close(engine)
    engine, parameters = build(folder, "plain", seed=2)
    load_checkpoint(engine, parameters, find_checkpoint(folder / "start"))
    record(folder, "from-start", engine, parameters, train(engine, 0, SAVED_STEP))
    close(engine)


def phase_as_deepspeed_does(folder: Path) -> None:
    """Without what `begin_swapping` puts right: gradients are swapped, and read back wrongly."""
    nvme_state.keep_gradients_in_memory = lambda _optimizer: None
    engine, parameters = build(folder, "plain", seed=1)
    record(folder, "as-deepspeed-does", engine, parameters, train(engine, 0, SAVED_STEP))
    close(engine)


def phase_refusing_disk(folder: Path) -> None:
    """The system refuses what one rank writes after the first MiB."""
    engine, _ = build(folder, "plain", seed=1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    outcomes = []
    for action in (lambda: create_optimizer_state(engine, 0), lambda: clear_padding(engine)):
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
        outcomes.append(error_of(action))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    (folder / f"refused-{dist.get_rank()}.json").write_text(json.dumps(outcomes))
    close(engine)


def error_of(action: Callable[[], Any]) -> list[str]:
    try:
        action()
    except FulltuneError as error:
        return [type(error).__name__, str(error)]
    return []


def close(engine: Any) -> None:
    dist.barrier()
    remove_swap_files(engine.optimizer)
    engine.destroy()
    dist.barrier()


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_init_required=True, verbose=False)
    for phase in sys.argv[2:]:
        globals()[f"phase_{phase}"](Path(sys.argv[1]))
    dist.barrier()
    leave(0)


if __name__ == "__main__":
    main()
