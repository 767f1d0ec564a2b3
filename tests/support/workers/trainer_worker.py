"""One rank of another tool: transformers' Trainer with DeepSpeed, which saves a checkpoint. Arguments: ZeRO stage, folder."""

import sys

import torch
from checkpoint_worker import hugging_face_model
from transformers import Trainer, TrainingArguments

from engine.ranks.distributed import leave


def main(stage: int, folder: str) -> None:
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    settings = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "bf16": {"enabled": True},
        "zero_optimization": zero, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=folder, deepspeed=settings, use_cpu=True, bf16=True, max_steps=2, save_steps=2, report_to=[],
        per_device_train_batch_size=2, lr_scheduler_type="cosine", warmup_steps=1, optim="adamw_torch",
    )  # fmt: skip
    rows = torch.randint(0, 37, (16, 9), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=hugging_face_model("llama"), args=arguments, train_dataset=data).train()
    torch.distributed.barrier()
    leave(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
