"""Builds the Hugging Face model a run trains: from safetensors or from a configuration, nothing else."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.attention import PACKED_ATTENTION, find_leak, register_packed_attention
from engine.batches import Batch
from engine.config import ModelSection, TaskName
from engine.errors import ConfigError, DataError, MissingInputError, RefusedForSecurityError
from engine.tasks import auto_class, causal_logits
from engine.vocabulary import MADE_ROWS, Extension, extend_vocabulary, read_extension


@dataclass(frozen=True)
class StoreFacts:
    """What a model must agree on with the token store it is trained on; its tokenizer may have gained tokens."""

    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_id: int | None
    label_names: tuple[str, ...]
    tokenizer_dir: Path | None = None


def model_folder(section: ModelSection) -> Path | None:
    """The local folder of a pretrained or configured model; downloads a Hub name (safetensors only).

    Call it on one rank of a node first: afterwards it is a look-up. None for an inline configuration.
    """
    if section.path is None:
        return None
    folder = Path(section.path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise MissingInputError(f"model.path: {folder} has no config.json")
        return folder
    if folder.is_absolute() or section.path.startswith(".") or section.path.count("/") != 1:
        raise MissingInputError(f"model.path: {section.path}: no such folder (a Hub name looks like owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json"] if section.init == "random" else ["*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(section.path, revision=section.revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingInputError(
            f"model.path: {section.path} is no local folder, and the Hub did not give it: {reason}"
        ) from error


def build_model(section: ModelSection, task: TaskName, facts: StoreFacts, seed: int) -> Any:
    """The model on the CPU with its starting weights, identical on every rank.

    Weights keep the precision of their file (fp32 ones become exact fp32 masters); fresh ones are
    fp32 from `seed`. Raises DataError when model and store do not fit together.
    """
    folder = model_folder(section)
    extension = _extension(facts)
    model_config = _model_config(section, folder, facts, extension)
    if task == "causal_lm":
        register_packed_attention()
    options = {"attn_implementation": PACKED_ATTENTION} if task == "causal_lm" else {}
    torch.manual_seed(seed)
    try:
        if section.init == "random":
            model = auto_class(task).from_config(model_config, dtype=torch.float32, **options)
        else:
            model = _load_pretrained(folder, model_config, task, options)
    except (ValueError, OSError, SafetensorError) as error:
        # An attention that cannot be replaced, a model type without this task, a damaged file.
        raise DataError(f"model: {section.path or model_config.model_type}: {' '.join(str(error).split())}") from error
    if extension is not None and section.init == "pretrained":
        extend_vocabulary(model, extension)
    if task == "causal_lm":
        _check_isolation(model)
    if section.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(
                f"model.activation_checkpointing: model type {model_config.model_type} does not support it: set false"
            )
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def _extension(facts: StoreFacts) -> Extension | None:
    extension = read_extension(facts.tokenizer_dir)
    if extension is not None and extension.vocab_size != facts.vocab_size:
        raise DataError(
            f"{facts.tokenizer_dir}: extension.json spells tokens up to {extension.vocab_size - 1}, the tokenizer has "
            f"{facts.vocab_size}: add tokens before `fulltune tokenizer extend`, or to the model, and remove the file"
        )
    return extension


def _model_config(section: ModelSection, folder: Path | None, facts: StoreFacts, extension: Extension | None) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if folder is None:
        assert section.config is not None
        values = {"vocab_size": facts.vocab_size} | section.config
        values |= {
            key: value
            for key, value in (
                ("pad_token_id", facts.pad_id), ("bos_token_id", facts.bos_id), ("eos_token_id", facts.eos_id)
            )
            if key not in values
        }  # fmt: skip
        model_type = values.pop("model_type")
        if isinstance(values["vocab_size"], int) and extension is None:
            # Before the configuration is made: transformers would warn of every special token first.
            _check_vocabulary(values["vocab_size"], facts.vocab_size, "model.config")
        try:
            config = AutoConfig.for_model(model_type, **values)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise ConfigError(f"model.config: {' '.join(str(error).split())}") from error
        _check_config_keys(section.config, config)
    else:
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except (ValueError, OSError, StrictDataclassError) as error:
            if "trust_remote_code" in str(error):
                raise RefusedForSecurityError(f"model.path: {folder} brings its own code, which is never run") from None
            raise DataError(f"model.path: {folder}: {str(error).splitlines()[0]}") from error
    vocab_size = config.get_text_config().vocab_size
    if extension is not None and section.init == "random":
        # Fresh rows are as good as any; what is trained from them must never be made anew.
        config.get_text_config().vocab_size = vocab_size = max(vocab_size, facts.vocab_size)
        setattr(config, MADE_ROWS, facts.vocab_size)
    needed = facts.vocab_size if extension is None else extension.base_vocab_size
    _check_vocabulary(vocab_size, needed, "model.config" if folder is None else "model.path")
    if facts.label_names:
        # Both maps at once: num_labels follows from id2label.
        config.id2label = dict(enumerate(facts.label_names))
        config.label2id = {name: index for index, name in enumerate(facts.label_names)}
        if config.get_text_config().pad_token_id is None:
            config.pad_token_id = facts.pad_id
    return config


def _check_vocabulary(vocab_size: int, needed: int, source: str) -> None:
    if vocab_size < needed:
        raise DataError(
            f"{source}: vocabulary mismatch: the store's tokenizer has {needed} tokens, the model "
            f"{vocab_size} embeddings; prepare the data with the model's own tokenizer (data.tokenizer)"
        )


def _check_config_keys(given: dict[str, Any], config: Any) -> None:
    """A configuration class takes any key and ignores the ones it does not know; we do not."""
    known = {*type(config)().to_dict(), *getattr(config, "attribute_map", {}), "num_labels"}
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean `model.config.{near[0]}`?" if near else ""
            raise ConfigError(f"model.config: unknown key `model.config.{key}` for {config.model_type}{hint}")


def _load_pretrained(folder: Path | None, config: Any, task: TaskName, options: dict[str, Any]) -> Any:
    assert folder is not None
    if not any(folder.glob("*.safetensors")):
        raise RefusedForSecurityError(f"model.path: {folder} has no *.safetensors; other weight files can run code")
    model, info = auto_class(task).from_pretrained(
        folder, config=config, dtype="auto", use_safetensors=True, trust_remote_code=False,
        local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **options,
    )  # fmt: skip
    prefix = f"{model.base_model_prefix}."
    # A fresh head for classification is expected; a hole in the body never is.
    missing = [n for n in info["missing_keys"] if task == "causal_lm" or (n.startswith(prefix) and "pooler" not in n)]
    faults = missing or [str(entry) for entry in info["mismatched_keys"]]
    if faults:
        raise DataError(f"model.path: {folder} lacks or mis-shapes {len(faults)} weights, for example {faults[0]}")
    if info["missing_keys"] and os.environ.get("RANK", "0") == "0":
        print(f"new, untrained weights: {', '.join(sorted(info['missing_keys']))}", flush=True)
    return model


def _check_isolation(model: Any) -> None:
    def logits(input_ids: Tensor, position_ids: Tensor, borders: Tensor) -> Tensor:
        every = torch.arange(input_ids.shape[1])
        batch = Batch(input_ids, every, input_ids[0], (), len(every), position_ids, borders, int(borders.diff().max()))
        return causal_logits(model, batch)

    name = model.config.model_type
    try:
        leak = find_leak(model, logits)
    except (NotImplementedError, ValueError) as error:
        raise DataError(f"model type {name} cannot keep packed documents apart: {error}") from error
    if leak:
        raise DataError(f"model type {name} cannot be trained on packed rows: {leak}")


def decay_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices decay, biases and norm weights (one dimension) do not.

    Call it before ZeRO-3 flattens the parameters. Empty groups are left out.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
