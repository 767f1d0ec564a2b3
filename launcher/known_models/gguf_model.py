"""Turns SmolLM2's GGUF file into a Hugging Face folder in bfloat16: weights, configuration, tokenizer, chat template.

The numbers are what transformers reads with `gguf_file=`, rounded once. llama.cpp keeps the rows of a head's query and
key in another order, which is undone here. The tokenizer separates digits first, which transformers leaves out.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from gguf import MODEL_ARCH, GGUFReader, ReaderTensor, dequantize, get_tensor_name_map
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from data_prep.tokenizer.folder_files import PLAIN_CLASS
from engine.arithmetic import DEFAULT_SHARD_BYTES
from engine.export.folder import empty_model, model_shapes, read_config, write_json_file, write_weights
from engine.tensor_files.writer import TensorSource, tensor_chunks, write_file

_CONTROL_TOKEN = 3
_ARCHITECTURE = "LlamaForCausalLM"


def write_gguf_model(path: Path, folder: Path) -> None:
    """Write the model of the GGUF file `path` into `folder`. Raises OSError, DataError."""
    reader = GGUFReader(path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    write_json_file(folder / "config.json", _config(facts))
    write_json_file(folder / "generation_config.json", _special_ids(facts))
    _write_tokenizer(facts, folder)
    _, config = read_config(folder)
    model = empty_model(config, _ARCHITECTURE, path)
    weights = _sources(reader, model, config.num_attention_heads, config.num_key_value_heads)
    write_weights(model, weights, folder, torch.bfloat16, DEFAULT_SHARD_BYTES)


def _config(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": [_ARCHITECTURE],
        "dtype": "bfloat16",
        "head_dim": facts["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "max_position_embeddings": facts["llama.context_length"],
        "model_type": "llama",
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "rms_norm_eps": _shortest(facts["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(facts["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
        "vocab_size": facts["llama.vocab_size"],
        **_special_ids(facts),
    }


def _shortest(value: float) -> float:
    """The shortest decimal number that is `value` in single precision, in which GGUF keeps it."""
    return float(str(np.float32(value)))


def _special_ids(facts: Mapping[str, Any]) -> dict[str, int]:
    """Ids of special tokens; the end is what the chat template writes behind each message."""
    return {
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def _sources(reader: GGUFReader, model: Any, num_heads: int, num_key_heads: int) -> dict[str, TensorSource]:
    """A source for each weight of `model`; its values are made when they are written."""
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    heads = {"attn_q.weight": num_heads, "attn_k.weight": num_key_heads}
    sources = {}
    for name, shape in model_shapes(model).items():
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None, name
        tensor = tensors[stored]
        sources[name] = _source(name, shape, tensor, heads.get(stored.split(".", 2)[-1]))
    return sources


def _source(name: str, shape: tuple[int, ...], tensor: ReaderTensor, heads: int | None) -> TensorSource:
    """The weight `name`; the rows of `heads` heads are put back into their order where `heads` is given."""

    def chunks() -> Iterator[torch.Tensor]:
        values = dequantize(tensor.data, tensor.tensor_type)
        if heads is not None:
            # Rows of a head lie in pairs (2 i, 2 i + 1); they belong to i and i + half: [heads, half, 2, in].
            pairs = values.reshape(heads, -1, 2, values.shape[-1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        yield from tensor_chunks(torch.from_numpy(np.array(values, dtype=np.float32).reshape(shape)))

    return TensorSource(name, torch.float32, shape, chunks)


def _write_tokenizer(facts: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template."""
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in facts["tokenizer.ggml.merges"])]
    backend = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    # `tokenizer.ggml.pre: smollm` means: every digit alone, then as GPT-2 does.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = zip(tokens, facts["tokenizer.ggml.token_type"], strict=True)
    control = [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == _CONTROL_TOKEN]
    backend.add_special_tokens(control)
    write_file(folder / "tokenizer.json", backend.to_str(pretty=True).encode())
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    named = {name: tokens[facts[f"tokenizer.ggml.{role}_token_id"]] for name, role in roles.items()}
    write_json_file(
        folder / "tokenizer_config.json",
        {"model_max_length": facts["llama.context_length"], "tokenizer_class": PLAIN_CLASS, **named},
    )
    write_file(folder / "chat_template.jinja", facts["tokenizer.chat_template"].encode())
