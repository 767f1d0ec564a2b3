"""Models, data and cases of the gradient-equivalence test, and the plain computation it is held against."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from memory_stores import VOCABULARY, MemoryRows, MemoryStore, memory_store

from engine.config import RunConfig
from engine.model.attention import PACKED_ATTENTION
from engine.model.frozen import freeze
from engine.tasks import TASKS
from engine.tasks.task import Task

BETA1 = 0.5
GLOBAL_ROWS = 7  # not divisible by the ranks: some micro-batches are short or empty
FREEZE = ("embed_tokens", "layers.0.*", "*.up_proj.weight")
BALANCING, Z_LOSS = 0.3, 0.02


def documents_a_row(family: str) -> int:
    """Packed rows hold three documents; a model that cannot pack has one a row."""
    return 3 if task_of(family) == "causal_lm" and family != "bamba" else 1


def fitting_task(family: str) -> Task:
    """The task as the family can train it, on its store."""
    task = TASKS[task_of(family)].on(store_of(family)[0])
    return task.padded if family in ("bamba", "t5_labels") and task.padded is not None else task


@dataclass(frozen=True)
class Case:
    name: str
    family: str = "llama"
    stage: int = 3
    offload: bool = True
    activation_checkpointing: bool = False
    micro_rows: int = 2
    clipping: float = 0.0
    bf16: bool = False
    freeze: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        return task_of(self.family)


def task_of(family: str) -> str:
    if family in ("llama", "gpt2", "qwen2", "mixtral", "bamba"):
        return "causal_lm"
    if family.endswith("_answers"):
        return "question_answering"
    return "token_classification" if family.endswith("_tags") else "sequence_classification"


def cases(world_size: int) -> list[Case]:
    """Every world size sees offload, checkpointing and accumulation on and off; two see every family."""
    plain = [
        Case("offload"),
        Case("no_offload", offload=False),
        Case("checkpointing", activation_checkpointing=True),
        Case("no_offload_checkpointing", offload=False, activation_checkpointing=True, micro_rows=1),
        Case("one_micro_batch", micro_rows=GLOBAL_ROWS),
        Case("zero2", stage=2, offload=False),
        Case("clipped", clipping=0.1),
        Case("balanced", family="mixtral"),
        Case("balanced_one_micro_batch", family="mixtral", micro_rows=GLOBAL_ROWS, activation_checkpointing=True),
        Case("padded", family="bamba"),
    ]
    if world_size != 2:
        return plain
    families = [Case(family, family=family) for family in (
        "gpt2", "qwen2", "bert", "bert_sets", "bert_scores", "llama_labels", "t5_labels", "bert_tags", "llama_tags", "bert_answers",
        "llama_answers",
    )]  # fmt: skip
    return (
        plain
        + families
        + [
            Case("zero2_offload", stage=2),
            Case("frozen", freeze=FREEZE),
            Case("frozen_zero2", stage=2, freeze=FREEZE, activation_checkpointing=True),
        ]
    )


def case_config(case: Case, out_dir: Path) -> RunConfig:
    """The run file of a case and its DeepSpeed JSON, which each rank writes for itself.

    The ranks do not wait for each other here: a file that they shared would be read half-written.
    """
    zero: dict[str, Any] = {"stage": case.stage, "reduce_bucket_size": 10_000_000}
    if case.stage == 3:
        zero |= {"stage3_param_persistence_threshold": 100}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if case.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    ds_path = out_dir / f"ds-{case.name}-{os.getpid()}.json"
    ds_path.write_text(json.dumps({"bf16": {"enabled": case.bf16}, "zero_optimization": zero}))
    return RunConfig.model_validate(
        {
            "run_dir": str(out_dir), "task": case.task, "seed": 5,
            "data": {"store_dir": "unused", "row_tokens": 64},
            "model": {"path": "unused"},
            "optimizer": {
                "learning_rate": 1e-3, "betas": [BETA1, 0.9], "gradient_clipping": case.clipping, "schedule": "constant",
            },
            "batch": {"global_rows": GLOBAL_ROWS, "micro_rows": case.micro_rows},
            "duration": {"steps": 10},
            "deepspeed": str(ds_path),
        }
    )  # fmt: skip


def make_model(family: str, packed: bool) -> Any:
    """A tiny fp32 model with fixed random weights; `packed` chooses our attention, else the stock one."""
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    size: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    labels = {"num_labels": 3}
    attention = PACKED_ATTENTION if packed else "sdpa"
    torch.manual_seed(3)
    match family:
        case "llama":
            config = transformers.LlamaConfig(**common, **size, num_key_value_heads=2)
        case "qwen2":
            config = transformers.Qwen2Config(**common, **size, num_key_value_heads=2, tie_word_embeddings=True)
        case "mixtral":
            config = transformers.MixtralConfig(
                **common, **size, num_key_value_heads=2, num_local_experts=4, output_router_logits=True,
                router_aux_loss_coef=BALANCING,
            )  # fmt: skip
        case "bamba":
            config = transformers.BambaConfig(
                **common, **size, num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8,
                mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8, z_loss_coefficient=Z_LOSS,
            )  # fmt: skip
        case "gpt2":
            config = transformers.GPT2Config(**common, **still, n_embd=32, n_layer=2, n_head=4)
        case "bert" | "bert_sets" | "bert_scores" | "bert_tags" | "bert_answers":
            labels = {"num_labels": 1} if family == "bert_scores" else labels
            config = transformers.BertConfig(
                **common, **size, **labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
            )
        case "llama_labels" | "llama_tags" | "llama_answers":
            config = transformers.LlamaConfig(**common, **size, **labels, num_key_value_heads=2)
        case "t5_labels":
            config = transformers.T5Config(
                **common, **labels, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
                decoder_start_token_id=0,
            )  # fmt: skip
    match task_of(family):
        case "causal_lm":
            return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        case "question_answering":
            config.num_labels = 2
            return transformers.AutoModelForQuestionAnswering.from_config(config, attn_implementation=attention)
        case "token_classification":
            config.classifier_dropout = 0.0  # Llama's head has a dropout of its own
            return transformers.AutoModelForTokenClassification.from_config(config, attn_implementation=attention)
    return transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)


def store_of(family: str, per_row: int | None = None) -> tuple[MemoryStore, MemoryRows]:
    """The documents for a family: with labels, sets of labels or scores where it classifies."""
    store, rows = memory_store(task_of(family), per_row)
    if family == "bert_sets":
        store = replace(store, columns=("label_sets", "pair_starts"))
    elif family == "bert_scores":
        store = replace(store, columns=("scores", "pair_starts"), label_names=())
    return store, rows


def reference_gradients(
    family: str, rows_used: np.ndarray, frozen: tuple[str, ...] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients and losses by one plain process: stock attention, one document at a time, no padding."""
    task = task_of(family)
    store, _ = store_of(family)
    model = make_model(family, packed=False).train()
    freeze(model, frozen)
    per_row = documents_a_row(family)
    rows = [list(range(row * per_row, (row + 1) * per_row)) for row in rows_used]
    total, targets = torch.zeros(()), 0
    others = (
        {"mixtral": balancing, "bamba": z_loss}[family](model, store, rows) if family in ("mixtral", "bamba") else {}
    )
    for document in (document for row in rows for document in row):
        ids = torch.from_numpy(store.documents[document])[None]
        if task == "causal_lm":
            mark = torch.from_numpy(store.marks[document])[1:]
            logits = model(ids, use_cache=False).logits[0, :-1][mark]
            total = total + F.cross_entropy(logits, ids[0, 1:][mark], reduction="sum")
            targets += int(mark.sum())
        elif task == "question_answering":
            total = total + window_loss(model, store, document)
            targets += 1
        elif task == "token_classification":
            tags = torch.from_numpy(store.tags[document]).long()
            total = total + F.cross_entropy(model(ids).logits[0], tags, ignore_index=-1, reduction="sum")
            targets += int((tags >= 0).sum())
        else:
            total = total + document_loss(model(ids).logits, store, document)
            targets += 1
    losses = {"loss": total / targets} | others
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return gradients, {name: loss.item() for name, loss in losses.items()}


def document_loss(logits: torch.Tensor, store: MemoryStore, document: int) -> torch.Tensor:
    """The loss of a text by its logits (1, L): squared, binary over all labels, or the cross-entropy of its label."""
    if "scores" in store.columns:
        return (logits[0, 0] - float(store.column("scores")[document])) ** 2
    if "label_sets" in store.columns:
        own = torch.zeros_like(logits).index_fill_(1, torch.from_numpy(store.ragged("label_sets", document)).long(), 1)
        return F.binary_cross_entropy_with_logits(logits, own)
    return F.cross_entropy(logits, torch.tensor([int(store.labels[document])]), reduction="sum")


def window_loss(model: Any, store: MemoryStore, document: int) -> torch.Tensor:
    """The stock loss of a window: its answer's first token, and its last, or the window's first token for none."""
    ids = torch.from_numpy(store.documents[document])[None]
    first, behind = store.ragged("answer_spans", document)[:2].tolist() or [0, 1]
    types = {}
    if model.config.model_type == "bert":
        types["token_type_ids"] = (torch.arange(ids.shape[1]) >= 1).long()[None]
    places = {"start_positions": torch.tensor([first]), "end_positions": torch.tensor([behind - 1])}
    return model(ids, **types, **places).loss


def balancing(model: Any, store: MemoryStore, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Mean over rows, weighted by tokens, of experts x sum over experts of (share of choices x mean probability)."""
    total, tokens = torch.zeros(()), 0
    for row in rows:
        layers = [
            logits.float().softmax(-1)
            for document in row
            for logits in model(torch.from_numpy(store.documents[document])[None], use_cache=False).router_logits
        ]
        chosen = torch.cat([F.one_hot(layer.topk(2).indices, 4).sum(1).float() for layer in layers]).mean(0)
        loss = 4 * (chosen * torch.cat(layers).mean(0)).sum()
        count = sum(len(store.documents[document]) for document in row)
        total, tokens = total + count * loss, tokens + count
    return {"balancing_loss": BALANCING * total / tokens}


def z_loss(model: Any, store: MemoryStore, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Mean over targets of the squared logsumexp of their logits."""
    values = []
    for document in (document for row in rows for document in row):
        logits = model(torch.from_numpy(store.documents[document])[None], use_cache=False).logits[0, :-1]
        values.append(logits[torch.from_numpy(store.marks[document])[1:]].logsumexp(-1).square())
    return {"z_loss": Z_LOSS * torch.cat(values).mean()}
