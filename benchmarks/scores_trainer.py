"""A process of transformers' Trainer in benchmarks/scores.py: trains on the rows of a run file's token store.

    scores_trainer.py RUN.yaml OUT

It takes the same records, batch, steps, learning rate, schedule and seed as `fulltune train` with this file, in bf16
(fp32 weights under autocast); data order, dropout and the new head are its own. Rank 0 saves the model in OUT.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from engine.config import RunConfig
from engine.fit.stores import open_stores
from engine.ranks.placement import place_rank
from engine.run_file import load_run_file

_IGNORED = -100


class Data(torch.utils.data.Dataset[dict[str, Any]]):
    """The rows of a store as the inputs and labels that transformers' models take."""

    def __init__(self, store: Any, rows: Any):
        self._store, self._rows = store, rows

    def __len__(self) -> int:
        return int(self._rows.num_rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        store = self._store
        documents, starts, lengths = self._rows.segments(row)
        document = int(documents[0])
        ids, _ = store.gather(documents, starts, lengths)
        found = {"input_ids": torch.from_numpy(ids.astype(np.int64))}
        if "predicate_types" in store.columns:
            types = store.token_column("predicate_types", document, 0, len(ids))
            found["token_type_ids"] = torch.from_numpy(types.astype(np.int64))
        elif "pair_starts" in store.columns:
            start = int(store.column("pair_starts")[document])
            found["token_type_ids"] = (torch.arange(len(ids)) >= start).long() * int(start > 0)
        return found | _learned(store, document, len(ids))


def _learned(store: Any, document: int, length: int) -> dict[str, torch.Tensor]:
    if "labels" in store.columns:
        return {"labels": torch.tensor(int(store.column("labels")[document]))}
    if "scores" in store.columns:
        return {"labels": torch.tensor(float(store.column("scores")[document]))}
    if "tags" in store.columns:
        tags = torch.from_numpy(store.token_column("tags", document, 0, length).astype(np.int64))
        return {"labels": torch.where(tags < 0, _IGNORED, tags)}
    first, stop = (store.ragged("answer_spans", document).tolist() or [0, 1])[:2]  # no answer: the first token
    return {"start_positions": torch.tensor(first), "end_positions": torch.tensor(stop - 1)}


def padded(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch: rows as long as the longest."""
    fill = {"input_ids": 0, "token_type_ids": 0, "labels": _IGNORED}
    batch = {
        name: pad_sequence([item[name] for item in items], True, fill[name])
        if items[0][name].dim()
        else torch.stack([item[name] for item in items])
        for name in items[0]
    }
    mask = pad_sequence([torch.ones_like(item["input_ids"]) for item in items], batch_first=True)
    return batch | {"attention_mask": mask}


def model_for(config: RunConfig, store: Any) -> Any:
    """MiniLM with a new head for the store."""
    if "answer_spans" in store.columns:
        return transformers.AutoModelForQuestionAnswering.from_pretrained(config.model.path)
    auto = transformers.AutoModelForTokenClassification if "tags" in store.columns else (
        transformers.AutoModelForSequenceClassification
    )  # fmt: skip
    if "scores" in store.columns:
        return auto.from_pretrained(config.model.path, num_labels=1, problem_type="regression")
    names = dict(enumerate(store.label_names))
    numbers = {name: number for number, name in names.items()}
    return auto.from_pretrained(config.model.path, num_labels=len(names), id2label=names, label2id=numbers)


def main() -> None:
    """Train and save."""
    run_path, out = map(Path, sys.argv[1:])
    place_rank(os.environ)
    run = load_run_file(run_path, [])
    config = run.parse(RunConfig)
    store, rows = open_stores(config, run.values["data"]).training
    transformers.set_seed(config.seed)
    optimizer = config.optimizer
    options = transformers.TrainingArguments(
        output_dir=str(out.parent / "trainer"), max_steps=config.duration.steps, seed=config.seed, bf16=True,
        per_device_train_batch_size=config.global_rows // int(os.environ["WORLD_SIZE"]), use_cpu=True,
        ddp_backend="gloo", ddp_find_unused_parameters="answer_spans" in store.columns,
        learning_rate=optimizer.learning_rate, weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.gradient_clipping, lr_scheduler_type="linear", warmup_steps=optimizer.warmup_steps,
        save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=50, remove_unused_columns=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model_for(config, store), options, padded, Data(store, rows))
    trainer.train()
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        transformers.AutoTokenizer.from_pretrained(config.model.path).save_pretrained(out)


if __name__ == "__main__":
    main()
