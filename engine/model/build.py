"""Which Hugging Face model a run trains: its configuration, and the model without or with its weights."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.arithmetic import is_hub_name
from engine.config import ModelSection, TaskName
from engine.errors import ConfigError, DataError, MissingInputError, RefusedForSecurityError
from engine.model.attention import PACKED_ATTENTION, register_packed_attention
from engine.model.empty_model import empty_model, initialise, main_type, pretrained_weights
from engine.model.isolation import check_isolation
from engine.model.model_files import read_model_files
from engine.model.starting_weights import StartingWeights
from engine.model.vocabulary import MADE_ROWS, Extension, grow_vocabulary, read_extension
from engine.tasks import auto_class


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
    if not is_hub_name(section.path):
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


def build_model(
    section: ModelSection, task: TaskName, facts: StoreFacts, seed: int, needs_weights: bool = True
) -> tuple[Any, StartingWeights]:
    """The model, and where its starting weights come from: the same on every rank. No communication.

    The parameters of a pretrained model are on the meta device: of its files only the headers were
    read and checked, and heads that they lack were made, in fp32 from `seed`. With ``init: random``
    the model is whole on the CPU, in fp32 from `seed`, and its weights are its own values. Without
    `needs_weights` (a checkpoint has them) no weight is made and no weight file touched.
    Raises DataError when model, files and store do not fit together.
    """
    folder = model_folder(section)
    extension = _extension(facts)
    config = _model_config(section, folder, facts, extension)
    if task == "causal_lm":
        register_packed_attention()
    options = {"attn_implementation": PACKED_ATTENTION} if task == "causal_lm" else {}
    pretrained = section.init == "pretrained"
    stored = read_model_files(folder, config) if folder is not None and pretrained and needs_weights else {}
    try:
        if pretrained or not needs_weights:
            dtype = main_type(config, stored) if pretrained else torch.float32
            model = empty_model(config, task, folder if pretrained else None, options, dtype)
        else:
            torch.manual_seed(seed)
            model = auto_class(task).from_config(config, dtype=torch.float32, **options)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        # An attention that cannot be replaced, a model type without this task, a configuration it does not take.
        raise DataError(f"model: {section.path or config.model_type}: {' '.join(str(error).split())}") from error
    if task == "causal_lm":
        check_isolation(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rows = grow_vocabulary(model, extension) if extension is not None and pretrained else None
    lines: list[str] = []
    if not needs_weights:
        initialise(model, [], seed)
        weights = StartingWeights()
    elif pretrained:
        weights, lines = pretrained_weights(model, stored, shapes, rows, task, seed)
    else:
        weights = StartingWeights.of(model)
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(line, flush=True)
    if section.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(
                f"model.activation_checkpointing: model type {config.model_type} does not support it: set false"
            )
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model, weights


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
