"""One rank of the import tests: trains small models and saves them with DeepSpeed's own `save_checkpoint`.

Beside each save lie the whole weights, gathered with DeepSpeed's accessors. Arguments: the folder of the
test, and the phases (functions below).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from checkpoint_worker import SmallModel, Task, export_tokens, hugging_face_model
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from torch import nn

from engine.ranks.distributed import leave


@dataclass(frozen=True)
class Setting:
    stage: int
    dtype: str = "bf16"
    offload_optimizer: bool = False
    offload_param: bool = False
    zero: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


SETTINGS = {
    "zero1": Setting(1),
    "zero1-offload": Setting(1, offload_optimizer=True),
    "zero1-fp32-accumulation": Setting(1, more={"data_types": {"grad_accum_dtype": "fp32"}}),
    "zero2": Setting(2),
    "zero2-offload": Setting(2, offload_optimizer=True),
    "zero2-aligned": Setting(2, zero={"parameter_alignment": True}),
    "zero2-round-robin": Setting(2, "fp32", zero={"round_robin_gradients": True}),
    "zero3": Setting(3, zero={"sub_group_size": 200}),
    "zero3-offload": Setting(3, offload_optimizer=True, offload_param=True, zero={"sub_group_size": 200}),
    "zero3-fp32": Setting(3, "fp32"),
}
#: Hugging Face models, each saved in one setting.
FAMILIES = {
    "llama": "zero3-offload",
    "gpt2": "zero2",
    "qwen2": "zero3",  # tied, one weight frozen
    "bert-classification": "zero1",
    "t5-classification": "zero2-offload",
    "mixtral": "zero2",  # stored in another layout than its modules
}


def build(setting: Setting, model: nn.Module) -> tuple[Any, dict[str, nn.Parameter]]:
    """An engine around `Task(model)`: every name in its checkpoints begins with `model.`."""
    task = Task(model)
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    zero: dict[str, Any] = {"stage": setting.stage, "reduce_bucket_size": 10_000, **setting.zero}
    if setting.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if setting.offload_param:
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    if setting.stage == 3:
        zero["stage3_param_persistence_threshold"] = 30
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "bf16": {"enabled": setting.dtype == "bf16"}, "zero_optimization": zero, "zero_allow_untested_optimizer": True,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}, **setting.more,
    }  # fmt: skip
    optimizer = (DeepSpeedCPUAdam if setting.offload_optimizer else torch.optim.AdamW)(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=config)
    return engine, dict(task.named_parameters())


def train(engine: Any, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        tokens = torch.randint(2, 37, (2, 9), generator=generator)
        tokens[:, -1] = 1
        engine.backward(engine(tokens))
        engine.step()


def gathered(engine: Any, setting: Setting, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """fp32 masters of what is trained, frozen parameters and persistent buffers as they are."""
    state = {}
    for name, parameter in parameters.items():
        # In fp32 the weights are the masters. With round_robin_gradients the accessors mix up parameters of one size.
        if parameter.requires_grad and not setting.zero.get("round_robin_gradients"):
            state[name] = safe_get_full_fp32_param(parameter).clone()
        else:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                state[name] = parameter.detach().clone()
    kept = engine.module.state_dict().keys()
    state |= {name: buffer.clone() for name, buffer in engine.module.named_buffers() if name in kept}
    if hasattr(engine.optimizer, "persistent_parameters"):  # the gathers above left these partitioned
        engine.optimizer.checkpoint_event_epilogue()
    return state


def save(folder: Path, name: str, engine: Any, setting: Setting, parameters: dict[str, nn.Parameter]) -> None:
    engine.save_checkpoint(str(folder / name), client_state={"note": name, "numbers": [1, 2.5, None]})
    state = gathered(engine, setting, parameters)
    if dist.get_rank() == 0:
        save_file(state, folder / f"{name}.safetensors")


def save_small_models(folder: Path) -> None:
    for name, setting in SETTINGS.items():
        engine, parameters = build(setting, SmallModel(1))
        train(engine, 3)
        save(folder, name, engine, setting, parameters)
        engine.destroy()


def save_families(folder: Path) -> None:
    for family, name in FAMILIES.items():
        model: Any = hugging_face_model(family)
        engine, parameters = build(SETTINGS[name], model)
        train(engine, 0 if family == "mixtral" else 2)  # its experts do not all see a token
        save(folder, family, engine, SETTINGS[name], parameters)
        engine.eval()
        with torch.no_grad():
            logits = engine(export_tokens(), logits_only=True)
        if dist.get_rank() == 0:
            save_file({"logits": logits}, folder / f"{family}-engine.safetensors")
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder / f"{family}-model")
        engine.destroy()


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_init_required=True, verbose=False)
    for phase in sys.argv[2:]:
        globals()[phase](Path(sys.argv[1]))
    dist.barrier()
    leave(0)


if __name__ == "__main__":
    main()
