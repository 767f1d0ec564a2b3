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
from engine.zero.zero_model import ZeroModel

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


def build(folder: Path, setting: str, seed: int) -> ZeroModel:
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
    section = {
        "stage": 3, "reduce_bucket_size": 1_000_000, "sub_group_size": 800_000 // dist.get_world_size(),
        "stage3_param_persistence_threshold": 3000, "offload_param": {"device": "cpu", "pin_memory": False},
        "offload_optimizer": {"pin_memory": False} | (offload if setting in SWAPPING else {"device": "cpu"}),
    }  # fmt: skip
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "managed_gradient_accumulation": False,
        "gradient_clipping": 1.0, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32", "zero_optimization": section,
        "aio": {"block_size": 2**20, "intra_op_parallelism": intra_op_parallelism},
    }  # fmt: skip
    optimizer = DeepSpeedCPUAdam(groups, lr=1e-2, betas=(0.9, 0.98))
    engine, *_ = deepspeed.initialize(model=Task(model), optimizer=optimizer, config=config)
    zero = ZeroModel(engine, parameters)
    zero.begin_swapping()
    zero.clear_padding()
    for piece in zero.live_state("master"):
        piece.values.copy_(originals[piece.name][piece.start : piece.stop])
    zero.refresh_weights()
    return zero


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


def record(folder: Path, name: str, zero: ZeroModel, figures: Any) -> None:
    state = gathered(zero)
    if dist.get_rank() == 0:
        save_file(state, folder / f"{name}.safetensors")
        facts = {"figures": figures, "steps": zero.optimizer_steps(), "swapped": swapped(zero.engine)}
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
        zero = build(folder, setting, seed=1)
        first = train(zero.engine, 0, SAVED_STEP)
        record(folder, f"{setting}-saved", zero, first)
        pending = begin_save(zero, folder / setting, {"step": SAVED_STEP}, Owner())

        def publish(step: int, pending: Any = pending) -> None:
            if step == SAVED_STEP + 1:
                finish_save(pending)

        record(folder, f"{setting}-last", zero, train(zero.engine, SAVED_STEP, LAST_STEP, publish))
        close(zero)


def phase_resume(folder: Path) -> None:
    """Go on in a new process: from a checkpoint of the same kind, and from the other kind's."""
    for source, setting in (("plain", "plain"), ("overlapped", "overlapped"), ("memory", "plain")):
        zero = build(folder, setting, seed=2)
        load_checkpoint(zero, find_checkpoint(folder / source))
        record(folder, f"{source}-to-{setting}", zero, train(zero.engine, SAVED_STEP, LAST_STEP))
        close(zero)
    zero = build(folder, "plain", seed=2)
    train(zero.engine, 0, 1)  # also one that has trained is filled anew
    load_checkpoint(zero, find_checkpoint(folder / "plain"))
    record(folder, "used-engine", zero, None)
    close(zero)


def phase_other_size(folder: Path) -> None:
    """Load at this number of ranks, into memory and from disk to disk, save again, and load that."""
    size = dist.get_world_size()
    for setting in ("memory", "plain"):
        zero = build(folder, setting, seed=2)
        load_checkpoint(zero, find_checkpoint(folder / "plain"))
        record(folder, f"plain-to-{setting}-at-{size}", zero, None)
        save_checkpoint(zero, folder / f"{setting}-at-{size}", {"step": SAVED_STEP})
        close(zero)
    zero = build(folder, "memory", seed=3)
    load_checkpoint(zero, find_checkpoint(folder / f"plain-at-{size}"))
    record(folder, f"again-at-{size}", zero, None)
    close(zero)


def phase_start(folder: Path) -> None:
    """A checkpoint before the first step, and what starts from it."""
    zero = build(folder, "plain", seed=1)
    save_checkpoint(zero, folder / "start", {"step": 0})
    close(zero)
    zero = build(folder, "plain", seed=2)
    load_checkpoint(zero, find_checkpoint(folder / "start"))
    record(folder, "from-start", zero, train(zero.engine, 0, SAVED_STEP))
    close(zero)


def phase_as_deepspeed_does(folder: Path) -> None:
    """Without what `begin_swapping` puts right: gradients are swapped, and read back wrongly."""
    nvme_state.keep_gradients_in_memory = lambda _optimizer: None
    zero = build(folder, "plain", seed=1)
    record(folder, "as-deepspeed-does", zero, train(zero.engine, 0, SAVED_STEP))
    close(zero)


def phase_refusing_disk(folder: Path) -> None:
    """The system refuses what one rank writes after the first MiB."""
    zero = build(folder, "plain", seed=1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    outcomes = []
    for action in (lambda: zero.create_optimizer_state(0), zero.clear_padding):
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
        outcomes.append(error_of(action))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    (folder / f"refused-{dist.get_rank()}.json").write_text(json.dumps(outcomes))
    close(zero)


def error_of(action: Callable[[], Any]) -> list[str]:
    try:
        action()
    except FulltuneError as error:
        return [type(error).__name__, str(error)]
    return []


def close(zero: ZeroModel) -> None:
    dist.barrier()
    zero.remove_swap_files()
    zero.engine.destroy()
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
