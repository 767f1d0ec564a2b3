"""Model folders that loading is tested with, each what a user may bring, and the cases over them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from engine.model.build import StoreFacts
from engine.sections import ModelSection
from engine.tasks import TASKS

SEED = 5
VOCABULARY = 37
PIECES = [[5, 6], [7], [3, 4, 36, 9], [37, 8]]


@dataclass(frozen=True)
class LoadCase:
    """`source` is a folder of `make_folders`. Bias vectors of odd length leave whole ranks empty and others padded."""

    name: str
    source: str
    task: str = "causal_lm"
    stage: int = 3
    offload: bool = False
    bf16: bool = True
    frozen: tuple[str, ...] = ()
    extended: bool = False


CASES = [
    LoadCase("llama", "llama"),
    LoadCase("llama-fp32", "llama", bf16=False),
    LoadCase("llama-offload", "llama", offload=True),
    LoadCase("llama-zero2", "llama", stage=2),
    LoadCase("llama-zero2-fp32", "llama", stage=2, bf16=False, offload=True),
    LoadCase("llama-bf16", "llama-bf16", offload=True),
    LoadCase("llama-fp16", "llama-fp16"),
    LoadCase("llama-sharded", "llama-sharded"),
    LoadCase("gpt2", "gpt2"),
    LoadCase("gpt2-old-names", "gpt2-old-names"),
    LoadCase("qwen2", "qwen2"),
    LoadCase("qwen2-both-copies", "qwen2-both-copies", offload=True),
    LoadCase("qwen2-frozen", "qwen2", frozen=("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight")),
    LoadCase("qwen2-frozen-zero2", "qwen2", frozen=("model.layers.0.self_attn.q_proj.bias",), stage=2),
    LoadCase("mixtral", "mixtral"),
    LoadCase("mixtral-fp32", "mixtral-bf16", bf16=False, offload=True),
    LoadCase("qwen2-moe", "qwen2-moe"),
    LoadCase("bert-labels", "bert-labels", task="sequence_classification"),
    LoadCase("bert-base", "bert-base", task="sequence_classification", bf16=False),
    LoadCase("bert-masked", "bert-masked", task="sequence_classification", bf16=False, offload=True),
    LoadCase("llama-labels", "llama-bf16", task="sequence_classification", stage=2),
    LoadCase("t5-labels", "t5-labels", task="sequence_classification"),
    LoadCase("t5-base", "t5-base", task="sequence_classification", bf16=False),
    LoadCase("llama-extended", "llama", extended=True),
    LoadCase("qwen2-extended", "qwen2-bf16", extended=True, offload=True),
    LoadCase("t5-extended", "t5-base", task="sequence_classification", extended=True),
]  # fmt: skip
#: Every case at two ranks; elsewhere one of each kind.
ALWAYS = {
    "llama-fp32", "llama-zero2", "llama-bf16", "qwen2-frozen", "mixtral", "bert-base", "t5-base", "qwen2-extended",
}  # fmt: skip


def cases(world_size: int) -> list[LoadCase]:
    return [case for case in CASES if world_size == 2 or case.name in ALWAYS]


def section_of(case: LoadCase, folder: Path) -> ModelSection:
    return ModelSection.model_validate({"path": str(folder / case.source), "activation_checkpointing": False})


def facts_of(case: LoadCase, folder: Path) -> StoreFacts:
    labels = ("bad", "good", "great") if TASKS[case.task].new_head else ()
    if case.extended:
        size = VOCABULARY + len(PIECES)
        return StoreFacts(size, 0, 1, 2, labels, tokenizer_dir=folder / "tokenizer")
    return StoreFacts(VOCABULARY, 0, 1, 2, labels)


def make_folders(folder: Path) -> None:
    """Write every model, with random values everywhere, and the extended tokenizer's file."""
    for name, model in _models().items():
        model.save_pretrained(folder / name)
        if name in ("llama", "qwen2"):
            model.to(torch.bfloat16).save_pretrained(folder / f"{name}-bf16")
    model = _models()["llama"]
    model.to(torch.float16).save_pretrained(folder / "llama-fp16")
    _models()["llama"].save_pretrained(folder / "llama-sharded", max_shard_size="8KB")
    _models()["mixtral"].to(torch.bfloat16).save_pretrained(folder / "mixtral-bf16")
    _with_both_copies(folder)
    _with_old_names(folder)
    (folder / "tokenizer").mkdir()
    pieces = {str(VOCABULARY + place): ids for place, ids in enumerate(PIECES)}
    values = {"format": 1, "base_vocab_size": VOCABULARY, "pieces": pieces}
    (folder / "tokenizer" / "extension.json").write_text(json.dumps(values))


def _models() -> dict[str, Any]:
    tokens: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 12, "intermediate_size": 17, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_hidden_layers": 1, "moe_intermediate_size": 7}
    labels = {"num_labels": 3}
    t5 = {"d_model": 12, "d_kv": 6, "d_ff": 17, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    bert = hf.BertConfig(**tokens, **sizes, max_position_embeddings=19, **labels)
    torch.manual_seed(3)
    models: dict[str, Any] = {
        "llama": hf.LlamaForCausalLM(hf.LlamaConfig(**tokens, **sizes)),
        "gpt2": hf.GPT2LMHeadModel(hf.GPT2Config(**tokens, n_embd=12, n_layer=2, n_head=2, n_positions=19)),
        "qwen2": hf.Qwen2ForCausalLM(hf.Qwen2Config(**tokens, **sizes, num_key_value_heads=1, tie_word_embeddings=True)),
        "mixtral": hf.MixtralForCausalLM(hf.MixtralConfig(**tokens, **sizes, num_local_experts=3, num_key_value_heads=1)),
        "qwen2-moe": hf.Qwen2MoeForCausalLM(
            hf.Qwen2MoeConfig(
                **tokens, **(sizes | experts), num_experts=3, num_experts_per_tok=2, num_key_value_heads=1,
                shared_expert_intermediate_size=5,
            )
        ),
        "bert-labels": hf.BertForSequenceClassification(bert),
        "bert-base": hf.BertModel(bert),
        "bert-masked": hf.BertForMaskedLM(bert),
        "t5-labels": hf.T5ForSequenceClassification(hf.T5Config(**tokens, **t5, **labels)),
        "t5-base": hf.T5ForConditionalGeneration(hf.T5Config(**tokens, **t5, tie_word_embeddings=False)),
    }  # fmt: skip
    for model in models.values():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # also where a family starts from ones or zeros
    return models


def _with_both_copies(folder: Path) -> None:
    """A tied model whose file has the weight twice, as other tools write it."""
    from safetensors.torch import load_file, save_file

    _models()["qwen2"].save_pretrained(folder / "qwen2-both-copies")
    path = folder / "qwen2-both-copies" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})


def _with_old_names(folder: Path) -> None:
    """GPT-2 as its first files were: no prefix, and the causal mask among the weights."""
    from safetensors.torch import load_file, save_file

    _models()["gpt2"].save_pretrained(folder / "gpt2-old-names")
    path = folder / "gpt2-old-names" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 19, 19).tril()
    save_file(tensors, path, metadata={"format": "pt"})
