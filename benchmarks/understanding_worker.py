"""A rank of benchmarks/understanding.py: trains until it is killed, and notes when each step ended.

    understanding_worker.py ours|trainer RUN.yaml STEPS [key=value ...]

`ours` is the engine as `fulltune train` starts it, `trainer` transformers' Trainer in bf16 on the same rows; both read
the token store of the run file. STEPS gets a line a step: seconds of the machine's clock, then tokens and positions
(padding included) so far. Of `trainer` each rank writes its own, of `ours` rank 0 those of all.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from engine.config import RunConfig
from engine.fit.stores import open_stores
from engine.ranks.placement import place_rank
from engine.run_file import RunFile, load_run_file


class Steps:
    """The file of steps."""

    def __init__(self, path: Path):
        self._file = path.open("w", encoding="utf-8")

    def add(self, tokens: int, positions: int) -> None:
        """Note the end of a step."""
        self._file.write(f"{time.monotonic():.6f} {tokens} {positions}\n")
        self._file.flush()


def ours(run_file: RunFile, config: RunConfig, path: Path) -> None:
    """Train through the engine."""
    from engine.ranks.distributed import start_ranks
    from engine.ranks.stop import StopSignal
    from engine.setup import quiet_libraries, set_up
    from engine.train import train
    from engine.zero.ds_config import needs_async_io
    from engine.zero.prebuild import load_ops_once

    load_ops_once(False, needs_async_io(config))
    quiet_libraries()
    ranks = start_ranks(str(config.run_dir))
    training, progress, log = set_up(run_file, config, ranks, fresh=False)
    if ranks.rank == 0:
        steps, write = Steps(path), log.train
        positions = 0.0

        def noted(step: int, figures: dict[str, float]) -> None:
            nonlocal positions
            write(step, figures)
            own = figures["tokens_per_second"] * figures["step_seconds"]
            positions += own / (1.0 - figures["padding_fraction"])
            steps.add(int(figures["tokens"]), round(positions))

        log.train = noted  # type: ignore[method-assign]
    train(training, progress, log, StopSignal())


def trainer(run_file: RunFile, config: RunConfig, path: Path) -> None:
    """Train with transformers' Trainer: two DDP processes, bf16, its own defaults elsewhere."""
    import torch
    import transformers
    from torch.nn.utils.rnn import pad_sequence

    store, rows = open_stores(config, run_file.values["data"]).training
    world_size = int(os.environ["WORLD_SIZE"])

    class Data(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return int(rows.num_rows)

        def __getitem__(self, row: int) -> dict[str, Any]:
            documents, starts, lengths = rows.segments(row)
            ids, _ = store.gather(documents, starts, lengths)
            return {"input_ids": ids, "label": int(store.column("labels")[documents[0]])}

    def padded(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.from_numpy(item["input_ids"]).long() for item in items]
        mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
        labels = torch.tensor([item["label"] for item in items])
        return {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask, "labels": labels}

    class Counting(transformers.Trainer):  # type: ignore[misc]
        tokens = positions = 0

        def training_step(self, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
            self.tokens += int(inputs["attention_mask"].sum())
            self.positions += inputs["attention_mask"].numel()
            return super().training_step(model, inputs, *more, **named)

    steps = Steps(path)

    class Note(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **_named: Any) -> None:
            steps.add(peer.tokens, peer.positions)

    auto, count = transformers.AutoModelForSequenceClassification, len(store.label_names)
    if config.model.path is None:
        settings = dict(config.model.config or {}) | {"num_labels": count}
        model = auto.from_config(transformers.AutoConfig.for_model(**settings))
    else:
        model = auto.from_pretrained(config.model.path, num_labels=count)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    options = transformers.TrainingArguments(
        output_dir=str(config.run_dir), max_steps=10**6, per_device_train_batch_size=config.global_rows // world_size,
        bf16=True, use_cpu=True, ddp_backend="gloo", ddp_find_unused_parameters=False,
        learning_rate=config.optimizer.learning_rate, lr_scheduler_type="constant", save_strategy="no", report_to=[],
        disable_tqdm=True,
    )  # fmt: skip
    peer = Counting(model, options, padded, Data(), callbacks=[Note()])
    peer.train()


def main() -> None:
    """Read the arguments and train."""
    side, run_path, path, *overrides = sys.argv[1:]
    place_rank(os.environ)
    run_file = load_run_file(Path(run_path), overrides)
    config = run_file.parse(RunConfig)
    {"ours": ours, "trainer": trainer}[side](run_file, config, Path(f"{path}.{os.environ['RANK']}"))


if __name__ == "__main__":
    main()
