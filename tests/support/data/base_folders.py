"""Model folders with every optional setting turned on, as users bring them, and the runs that start from them."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from data_fixtures import byte_level_folder, sentences, write_jsonl

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from data_prep.tokenizer.open import open_tokenizer
from engine.config import RunConfig
from engine.run_file import dump_yaml

CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
TOOL_USE = "{{- 'tools: ' + messages[0].content }}"
_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 512,
}  # fmt: skip
_GROUPED = _SIZES | {"num_key_value_heads": 1, "head_dim": 16}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
_LAYERS = ["sliding_attention", "full_attention"]
#: Name: (configuration class, its values, rotary settings as transformers 4 wrote them, the task).
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "llama": ("Llama", _GROUPED, {"rope_theta": 500000.0, "rope_scaling": _LLAMA3}, "causal_lm"),
    "qwen2": ("Qwen2", _SIZES | {"num_key_value_heads": 1}, {"rope_theta": 1000000.0, "rope_scaling": None}, "causal_lm"),
    "qwen3": ("Qwen3", _GROUPED, {"rope_theta": 5000000.0, "rope_scaling": None}, "causal_lm"),
    "mistral": ("Mistral", _GROUPED | {"sliding_window": None}, {"rope_theta": 1000000.0}, "causal_lm"),
    "mixtral": (
        "Mixtral", _GROUPED | {"num_local_experts": 2, "sliding_window": None, "output_router_logits": True},
        {"rope_theta": 1000000.0}, "causal_lm",
    ),
    "gemma2": (
        "Gemma2", _GROUPED | {"attn_logit_softcapping": 50.0, "sliding_window": 8}, {"rope_theta": 10000.0}, "causal_lm",
    ),
    "olmo2": ("Olmo2", _SIZES, {"rope_theta": 500000.0, "rope_scaling": None}, "causal_lm"),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}, {}, "causal_lm"),
    "gpt_neox": ("GPTNeoX", _SIZES, {"rotary_emb_base": 25000, "rotary_pct": 0.5}, "causal_lm"),
    "phi3": (
        "Phi3", _SIZES | {"num_key_value_heads": 1, "original_max_position_embeddings": 256, "pad_token_id": 0},
        {"rope_theta": 25000.0, "rope_scaling": {"type": "longrope", "short_factor": [1.5] * 8, "long_factor": [2.0] * 8}},
        "causal_lm",
    ),
    "gemma3": (
        "Gemma3Text", _GROUPED | {"layer_types": _LAYERS, "sliding_window": 8},
        {"rope_theta": 500000.0, "rope_local_base_freq": 25000.0}, "sequence_classification",
    ),
    "modernbert": (
        "ModernBert", _SIZES | {"cls_token_id": 0, "sep_token_id": 1, "layer_types": ["full_attention", "sliding_attention"], "local_attention": 8},
        {"global_rope_theta": 90000.0, "local_rope_theta": 25000.0, "global_attn_every_n_layers": 2},
        "sequence_classification",
    ),
    "bert": ("Bert", _SIZES, {}, "sequence_classification"),
    "roberta": ("Roberta", _SIZES, {}, "sequence_classification"),
    "distilbert": (
        "DistilBert", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2}, {}, "sequence_classification",
    ),
}  # fmt: skip
#: The families whose keys transformers 4 and 5 name in different ways, beside the type of the weights.
UNPACKED = ("gemma2",)  # trained on padded rows alone
RENAMED = ("llama", "gpt_neox", "phi3", "gemma3", "modernbert")
LABELS = ["bad", "good", "great"]


def tokenizer_folder(folder: Path) -> Path:
    """A byte-level tokenizer whose config has what a config may have."""
    byte_level_folder(folder, extra=("<|im_start|>", "<|im_end|>", "<image>"))
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {
        "padding_side": "left", "truncation_side": "left", "model_max_length": 96, "pad_token": "<|end|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "image_token": "<image>",
        "extra_special_tokens": {"image_token": "<image>"}, "clean_up_tokenization_spaces": True,
        "chat_template": [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOL_USE}],
        "unknown_key": {"nested": [1, {"deep": None}]}, "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    path.write_text(json.dumps(values))
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["truncation"] = {"direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 0}
    whole["padding"] = {
        "strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|begin|>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False))
    (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|begin|>", "lstrip": false}}')
    return folder


def base_folder(folder: Path, family: str, older: bool) -> Path:
    """A base of `family` with its tokenizer: its config.json as transformers 4 (`older`) or 5 writes it."""
    kind, sizes, rotary, task = copy.deepcopy(FAMILIES[family])  # configurations change what they are given
    tokenizer_folder(folder)
    size = open_tokenizer(str(folder)).vocab_size
    torch.manual_seed(1)
    ends = {"bos_token_id": 0, "eos_token_id": 1} | ({} if "pad_token_id" in sizes else {"pad_token_id": 1})
    labels = {"num_labels": len(LABELS)} if task != "causal_lm" else {}
    config = getattr(hf, f"{kind}Config")(vocab_size=size, **ends, **sizes, **rotary, **labels)
    head = "ForSequenceClassification" if task != "causal_lm" else "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    class_name = f"{kind}{head}"
    model = getattr(hf, class_name)(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    if older:
        values.pop("rope_parameters", None)
        values["torch_dtype"] = values.pop("dtype")
        values |= FAMILIES[family][2] | {"transformers_version": "4.44.0"}
    values |= {
        "unknown_key": {"nested": [1, {"deep": None}]},
        "_name_or_path": "me/mine",
        "auto_map": {"AutoModel": "x.X"},
    }
    values |= {"problem_type": "multi_label_classification"} if task != "causal_lm" else {}
    path.write_text(json.dumps(values))
    generation = {
        "do_sample": False,
        "temperature": 0.7,
        "eos_token_id": 1,
        "unknown_key": [1],
        "_from_model_config": True,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "LICENSE").write_text("terms")
    (folder / "preprocessor_config.json").write_text('{"size": 4}')
    (folder / "modeling_mine.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


def run_of(base: Path, folder: Path) -> Path:
    """A run file in `folder` that trains `base`, its data prepared."""
    task = "causal_lm" if "ForCausalLM" in _class_of(base) or "LMHead" in _class_of(base) else "sequence_classification"
    folder.mkdir(parents=True, exist_ok=True)
    if task == "causal_lm":
        records: list[dict[str, Any]] = [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]}
            for text in sentences(12)
        ]
    else:
        texts = sentences(12)
        records = [
            {"text": text, "text_pair": texts[-place], "label": LABELS[place % 3]} for place, text in enumerate(texts)
        ]
    data: dict[str, Any] = {
        "store_dir": str(folder / "stores"), "train": str(write_jsonl(folder / "train.jsonl", records)),
        "tokenizer": str(base), "row_tokens": 512, "workers": 1,
    }  # fmt: skip
    if json.loads((base / "config.json").read_text())["model_type"] in UNPACKED:
        data["packing"] = "none"
    values = {
        "run_dir": str(folder / "run"), "task": task, "seed": 3, "data": data, "model": {"path": str(base)},
        "optimizer": {"learning_rate": 1e-3}, "batch": {"global_rows": 2, "micro_rows": 1}, "duration": {"steps": 2},
        "log": {"tensorboard": False},
    }  # fmt: skip
    values["model"] = {"path": str(base), "activation_checkpointing": False}
    RunConfig.model_validate(values)
    shutil.rmtree(folder / "stores", ignore_errors=True)
    prepare(DataConfig.model_validate(data), data, task, progress=False)
    path = folder / "run.yaml"
    path.write_text(dump_yaml(values))
    return path


#: Keys of config.json that an export may have otherwise than its base.
_ORIGIN = {"_name_or_path", "auto_map"}
_BOTH_FORMS = {
    "dtype", "torch_dtype", "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_emb_base",
    "rotary_pct", "rope_local_base_freq", "global_rope_theta", "local_rope_theta", "global_attn_every_n_layers",
    "sliding_window_pattern",
}  # fmt: skip
_NEW_LABELS = {"id2label", "label2id", "problem_type", "num_labels"}


def read(path: Path) -> dict[str, Any]:
    """The values of a JSON file."""
    return dict(json.loads(path.read_text()))


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The keys in which two mappings differ."""
    missing = object()
    return {key for key in before.keys() | after.keys() if before.get(key, missing) != after.get(key, missing)}


def check_export(base: Path, out: Path, family: str, dtype: str) -> None:
    """AssertionError unless every difference between the config.json of a base and of its export is explained."""
    task = FAMILIES[family][3]
    before, after = read(base / "config.json"), read(out / "config.json")
    assert changed(before, after) <= _ORIGIN | _BOTH_FORMS | (_NEW_LABELS if task != "causal_lm" else set())
    assert all(after[key] == before[key] for key in _BOTH_FORMS & before.keys() if "dtype" not in key)
    assert _ORIGIN.isdisjoint(after)
    assert after["dtype"] == after["torch_dtype"] == dtype
    if task != "causal_lm":
        assert sorted(after["id2label"].values()) == sorted(LABELS)
        assert after["problem_type"] == "single_label_classification"
    for key, value in FAMILIES[family][2].items():  # as transformers 4 wrote it, whichever wrote the base
        assert after[key] == value


def _class_of(base: Path) -> str:
    return str(json.loads((base / "config.json").read_text())["architectures"][0])
