"""Small models of several families with the heads of tasks that read whole documents, as transformers makes them."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from equivalence_cases import window_loss
from memory_stores import MemoryRows, MemoryStore, memory_store
from torch.nn.utils.rnn import pad_sequence

from engine.config import RunConfig
from engine.model.attention import PACKED_ATTENTION, register_packed_attention
from engine.row_stream import stream_rows
from engine.tasks import TASKS
from engine.tasks.task import Draw, Task

STEPS, GLOBAL_ROWS, SEED = 20, 7, 5
LEARNING_RATE, BETAS, DECAY, CLIPPING = 1e-3, (0.9, 0.99), 0.1, 1.0
_TOKENS: dict[str, Any] = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3}
_SIZE: dict[str, Any] = _TOKENS | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT = _SIZE | _STILL | {"max_position_embeddings": 64}
_ROBERTA = _BERT | {"pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1}
_DECODER = _SIZE | {"num_key_value_heads": 2, "classifier_dropout": 0.0}
#: The configurations of families that run on flat batches, without dropout, by a name of their own.
FLAT: dict[str, tuple[type, dict[str, Any]]] = {
    "bert": (hf.BertConfig, _BERT),
    "roberta": (hf.RobertaConfig, _ROBERTA),
    "modernbert": (hf.ModernBertConfig, _SIZE | {"local_attention": 8, "classifier_pooling": "cls"}),
    "modernbert-mean": (hf.ModernBertConfig, _SIZE | {"local_attention": 8, "classifier_pooling": "mean"}),
    "distilbert": (
        hf.DistilBertConfig,
        _TOKENS
        | {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
        | {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0},
    ),
    "electra": (hf.ElectraConfig, _BERT | {"embedding_size": 16}),
    "albert": (hf.AlbertConfig, _BERT | {"embedding_size": 16, "classifier_dropout_prob": 0.0}),
    "xlm-roberta": (hf.XLMRobertaConfig, _ROBERTA),
    "gpt2": (
        hf.GPT2Config,
        _TOKENS
        | {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        | {"classifier_dropout": 0.0},
    ),
    "llama": (hf.LlamaConfig, _DECODER),
    "qwen2": (hf.Qwen2Config, _DECODER),
    "qwen3": (hf.Qwen3Config, _DECODER | {"head_dim": 8}),
    "mistral": (hf.MistralConfig, _DECODER | {"sliding_window": 4}),
}  # fmt: skip
#: Families whose batches are padded: attention, or a mixing of positions, of their own, or a head that pools otherwise.
PADDED: dict[str, tuple[type, dict[str, Any]]] = {
    "deberta-v2": (hf.DebertaV2Config, _BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "mpnet": (hf.MPNetConfig, _BERT),
    "fnet": (hf.FNetConfig, _SIZE | {"hidden_dropout_prob": 0.0}),
    "xlnet": (hf.XLNetConfig, _TOKENS | {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "dropout": 0.0}),
    "eurobert": (hf.EuroBertConfig, _DECODER | {"classifier_pooling": "late"}),
}  # fmt: skip


def config_of(family: str) -> Any:
    kind, values = (FLAT | PADDED)[family]
    return kind(**values)


def has_head(family: str, name: str) -> bool:
    """True if transformers has a head of the family for a task."""
    config = config_of(family)
    return type(config) in TASKS[name].auto_class(config)._model_mapping


def head_model(family: str, task: Task) -> Any:
    """A model for the form of a task, with weights that are large enough for what a mistake changes to be seen."""
    register_packed_attention()
    config = config_of(family)
    options = {"attn_implementation": PACKED_ATTENTION} if task.packs else {}
    torch.manual_seed(3)
    model = task.auto_class(config).from_config(config, **options)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def padded_form(name: str) -> Task:
    task = TASKS[name].padded
    assert task is not None
    return task


def head_store(name: str) -> tuple[MemoryStore, MemoryRows]:
    """The documents of `memory_store`; of labelled ones, every third has a second text."""
    store, rows = memory_store(name)
    if name != "sequence_classification":
        return store, rows
    starts = np.where(np.arange(24) % 3 == 1, np.minimum(2, rows.lengths - 1), 0).astype(np.uint32)
    return replace(store, pair_starts=starts), rows


def head_config(name: str, out_dir: Path, stage: int) -> RunConfig:
    """The run file of a task and its DeepSpeed JSON, which each rank writes for itself."""
    path = out_dir / f"ds-{stage}-{os.getpid()}.json"
    zero = {"stage": stage, "reduce_bucket_size": 10_000_000}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 100
    path.write_text(json.dumps({"bf16": {"enabled": False}, "zero_optimization": zero}))
    return RunConfig.model_validate(
        {
            "run_dir": str(out_dir), "task": name, "seed": SEED,
            "data": {"store_dir": "unused", "row_tokens": 64},
            "model": {"path": "unused"},
            "optimizer": {
                "learning_rate": LEARNING_RATE, "betas": BETAS, "weight_decay": DECAY, "gradient_clipping": CLIPPING,
                "schedule": "constant",
            },
            "batch": {"global_rows": GLOBAL_ROWS, "micro_rows": 3},
            "duration": {"steps": STEPS},
            "deepspeed": str(path),
        }
    )  # fmt: skip


def plain_losses(family: str, name: str) -> list[float]:
    """The losses of STEPS steps by one plain process: the stock model on padded batches, and torch's AdamW."""
    task = padded_form(name)
    store, rows = head_store(name)
    model = head_model(family, task).train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if (p.dim() > 1) == is_matrix], "weight_decay": DECAY * is_matrix}
        for is_matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS)
    losses = []
    for step in range(STEPS):
        used = stream_rows(step * GLOBAL_ROWS, GLOBAL_ROWS, rows.sources, SEED)
        loss = _plain_loss(model, name, store, used, step + 1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIPPING)
        optimizer.step()
        losses.append(loss.item())
    return losses


def _plain_loss(model: Any, name: str, store: MemoryStore, used: np.ndarray, step: int) -> torch.Tensor:
    if name == "question_answering":
        return torch.stack([window_loss(model, store, int(document)) for document in used]).mean()
    if name == "masked_lm":
        return _masked_loss(model, store, used, step)
    inputs = padded_inputs(model, store, used, pairs=name == "sequence_classification")
    logits = model(**inputs).logits
    if name == "sequence_classification":
        return F.cross_entropy(logits, torch.from_numpy(store.labels[used]).long())
    tags = pad_sequence([torch.from_numpy(store.tags[row]).long() for row in used], True, -1)
    return F.cross_entropy(logits.flatten(0, 1), tags.flatten(), ignore_index=-1)


def _masked_loss(model: Any, store: MemoryStore, used: np.ndarray, step: int) -> torch.Tensor:
    """A document at a time, with the masks that are drawn for it."""
    _, rows = head_store("masked_lm")
    total, count = torch.zeros(()), 0
    for row in used:
        batch = padded_form("masked_lm").batch(store, rows, np.array([row]), 0, Draw(SEED, step))
        logits = model(batch.input_ids, attention_mask=torch.ones_like(batch.input_ids)).logits[0]
        total = total + F.cross_entropy(logits[batch.target_positions], batch.target_ids, reduction="sum")
        count += len(batch.target_ids)
    return total / count


def padded_inputs(model: Any, store: MemoryStore, used: np.ndarray, pairs: bool) -> dict[str, torch.Tensor]:
    """Inputs of a stock model, padded by hand."""
    documents = [torch.from_numpy(store.documents[row]) for row in used]
    ids = pad_sequence(documents, True, model.config.pad_token_id)
    mask = pad_sequence([torch.ones_like(document) for document in documents], True, 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if pairs and getattr(model.config, "type_vocab_size", 1) > 1:
        starts = torch.from_numpy(store.column("pair_starts")[used].astype(np.int64))[:, None]
        inputs["token_type_ids"] = ((starts > 0) & (torch.arange(ids.shape[1]) >= starts)).long() * mask
    return inputs
