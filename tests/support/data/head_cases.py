"""Small models of several families with the heads of tasks that read whole documents, as transformers makes them."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers as hf
from equivalence_cases import MemoryRows, MemoryStore, memory_store

from engine.model.attention import PACKED_ATTENTION, register_packed_attention
from engine.tasks import TASKS
from engine.tasks.task import Task

_TOKENS: dict[str, Any] = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3}
_SIZE: dict[str, Any] = _TOKENS | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT = _SIZE | _STILL | {"max_position_embeddings": 64}
_DECODER = _SIZE | {"num_key_value_heads": 2, "classifier_dropout": 0.0}
#: The configurations of families that run on flat batches, without dropout, by a name of their own.
FLAT: dict[str, tuple[type, dict[str, Any]]] = {
    "bert": (hf.BertConfig, _BERT),
    "roberta": (hf.RobertaConfig, _BERT | {"pad_token_id": 1, "bos_token_id": 0}),
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
    "xlm-roberta": (hf.XLMRobertaConfig, _BERT | {"pad_token_id": 1, "bos_token_id": 0}),
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
    """The documents of `memory_store`, with second texts here and there."""
    store, rows = memory_store(name)
    starts = np.where(np.arange(24) % 3 == 1, np.minimum(2, rows.lengths - 1), 0).astype(np.uint32)
    return replace(store, pair_starts=starts), rows
