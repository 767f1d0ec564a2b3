"""The Hugging Face model that a run trains: its configuration, and the model without or with its weights."""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_prep.token_store import TokenStore
from engine.arithmetic import is_hub_name
from engine.errors import ConfigError, DataError, MissingInputError, RefusedForSecurityError
from engine.finding import warning_lines
from engine.fit.labels import Labels, fit_labels, names_of
from engine.fit.vocabulary import check_vocabulary
from engine.model.attention import PACKED_ATTENTION, register_packed_attention
from engine.model.dropout import keep_saved_dropout, set_dropout, set_layer_dropout
from engine.model.empty_model import empty_model, initialise, main_type, pretrained_weights
from engine.model.frozen import body_patterns, check_body, freeze
from engine.model.isolation import attention_of, check_isolation, fit_to_rows, instead
from engine.model.layer_scales import layer_scales
from engine.model.model_files import FileTensor, read_model_files
from engine.model.model_folder import CARRIED_PATTERNS, GENERATION_CONFIG, read_values
from engine.model.narrow import check_shape
from engine.model.reach import unreached_parameters
from engine.model.starting_weights import StartingWeights
from engine.model.vocabulary import MADE_ROWS, Extension, grow_vocabulary, read_extension
from engine.sections import ModelSection
from engine.tasks import auxiliary
from engine.tasks.task import Problem, Task

#: An attention that cannot be replaced, a model type without this task, a configuration it does not take, sizes that
#: make no tensor: families and torch have an error of their own for each.
_CANNOT_BUILD = (
    ValueError, OSError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
)  # fmt: skip


@dataclass(frozen=True)
class StoreFacts:
    """What a model must agree on with the token store it is trained on; its tokenizer may have gained tokens."""

    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_id: int | None
    label_names: tuple[str, ...]
    tokenizer_dir: Path | None = None
    stores: tuple[TokenStore, ...] = ()  # asked for the ids they use where the vocabulary is larger than the model

    @classmethod
    def of(cls, store: TokenStore, *others: TokenStore) -> "StoreFacts":
        """The facts of a training store; `others` are used with the same model."""
        named = store.label_names, store.tokenizer_dir
        return cls(store.vocab_size, store.pad_id, store.bos_id, store.eos_id, *named, stores=(store, *others))


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

    patterns = ["*.json", *CARRIED_PATTERNS, *(["*.safetensors"] if section.init != "random" else [])]
    try:
        return Path(snapshot_download(section.path, revision=section.revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingInputError(
            f"model.path: {section.path} is no local folder, and the Hub did not give it: {reason}"
        ) from error


def build_model(
    section: ModelSection, task: Task, facts: StoreFacts, seed: int, needs_weights: bool = True
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
    config, labels = model_config(section, folder, facts, extension, task.problem)
    pretrained = section.init == "pretrained"
    stored = read_model_files(folder, config) if folder is not None and pretrained and needs_weights else {}
    dropout = None if section.dropout is None else set_dropout(config, section.dropout)
    model = made_model(section, folder, config, task, seed, stored, is_empty=pretrained or not needs_weights)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rows = grow_vocabulary(model, extension) if extension is not None and pretrained else None
    freeze_and_check(model, config, task, section)
    say(auxiliary.lines(model, is_computed=task.causal))
    if not needs_weights:
        initialise(model, [], seed)
        weights = StartingWeights()
    elif pretrained:
        weights, lines = pretrained_weights(model, stored, shapes, rows, task, seed, labels, section.new_head)
        say(lines)
    else:
        weights = StartingWeights.of(model)
    if section.dropout is not None and dropout is not None:
        set_layer_dropout(model, section.dropout)
        keep_saved_dropout(model, dropout)
        say([f"model.dropout: {section.dropout:g} in place of {', '.join(f'{k} {v:g}' for k, v in dropout.items())}"])
    return model, weights


def say(lines: Iterable[str]) -> None:
    """Print lines once, on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(line, flush=True)


def fitting_task(section: ModelSection, task: Task, facts: StoreFacts, one_document_a_row: bool) -> Task:
    """`task` on flat batches, or on padded ones where each row holds one document and the family needs them.

    Rows of a task that is not causal always hold one. DataError for a family that can be trained on neither.
    """
    if task.padded is None or (task.causal and not one_document_a_row):
        return task
    folder = model_folder(section)
    config = _inline_config(section, facts, _extension(facts)) if folder is None else _stored_config(folder)
    if config.num_labels == 1 and task.problem != "regression":
        config.num_labels = 2  # the loss of a single label is always 0, so that no two forms of it would differ
    return fit_to_rows(config, task, task.padded)


def freeze_and_check(model: Any, config: Any, task: Task, section: ModelSection) -> None:
    """Freeze the parameters that ``model.freeze`` names, and all but the head where the section trains that alone.

    ConfigError as `freeze` and `check_body`, and for trained parameters without any path from the task's loss: ZeRO
    would apply old gradients to them.
    """
    for key, is_given in (("model.train: head", section.train == "head"), ("model.new_head", section.new_head)):
        if is_given:
            check_body(model, key)
    frozen = [*section.freeze, *(body_patterns(model) if section.train == "head" else ())]
    freeze(model, frozen)
    if patterns := unreached_parameters(config, task, frozen):
        raise ConfigError(
            f"model.freeze: {task.name} never reaches {', '.join(patterns)}, which then get no gradient: write "
            f"`model.freeze: {json.dumps([*frozen, *patterns])}` to keep these weights as they are"
        )


def made_model(
    section: ModelSection,
    folder: Path | None,
    config: Any,
    task: Task,
    seed: int,
    stored: dict[str, FileTensor],
    is_empty: bool,
) -> Any:
    """The model, on the meta device if it `is_empty`, fit for the task's rows, with activation checkpointing if asked.

    DataError for one that cannot be built, or cannot keep the documents of a row apart.
    """
    check_shape(config.get_text_config(), section.path or config.model_type)
    make: Callable[[], Any]
    attention = attention_of(task)
    register_packed_attention()
    if is_empty:
        pretrained = section.init == "pretrained"
        dtype = main_type(config, stored) if pretrained else torch.float32
        make = partial(empty_model, config, task, folder if pretrained else None, attention, dtype)
    else:
        make = partial(task.auto_class(config).from_config, config, dtype=torch.float32, **attention)
    torch.manual_seed(seed)
    try:
        model = make()
    except _CANNOT_BUILD as error:
        hint = instead(task) if PACKED_ATTENTION in str(error) else ""
        raise DataError(f"model: {section.path or config.model_type}: {_reason(error)}{hint}") from error
    if task.causal or task.packs:
        check_isolation(config, task)
    if section.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(
                f"model.activation_checkpointing: model type {config.model_type} does not support it: set false"
            )
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def _reason(error: Exception) -> str:
    """The error in one line; a bare name that a table of the family lacks is said to be a value."""
    text = " ".join(str(error).split())
    if lacking := re.match(r"Unrecognized configuration class .* for this kind of AutoModel: (\w+)", text):
        return f"transformers has no {lacking[1]} of this type: give a model of another type, or another task"
    if PACKED_ATTENTION in text:  # the family has a table of its own, or an attention that is built in
        return "its attention cannot be exchanged for the one that keeps packed documents apart"
    return f"its configuration has the unknown value {text}" if isinstance(error, KeyError) else text


def _first_sentence(error: Exception) -> str:
    """The first line of an error, and the next where it only leads to that; transformers explains itself at length."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {rest[0]}" if first.endswith(":") and rest else first


def _extension(facts: StoreFacts) -> Extension | None:
    extension = read_extension(facts.tokenizer_dir)
    if extension is not None and extension.vocab_size != facts.vocab_size:
        raise DataError(
            f"{facts.tokenizer_dir}: extension.json spells tokens up to {extension.vocab_size - 1}, the tokenizer has "
            f"{facts.vocab_size}: add tokens before `fulltune tokenizer extend`, or to the model, and remove the file"
        )
    return extension


def model_config(
    section: ModelSection, folder: Path | None, facts: StoreFacts, extension: Extension | None, problem: Problem | None
) -> tuple[Any, Labels | None]:
    """The model's configuration, with its vocabulary where the tokenizer was extended, and its labels for the store's.

    DataError for ids of the store that have no row.
    """
    config = _inline_config(section, facts, extension) if folder is None else _stored_config(folder)
    vocab_size = config.get_text_config().vocab_size
    if extension is not None and section.init == "random":
        # Fresh rows are as good as any; what is trained from them must never be made anew.
        config.get_text_config().vocab_size = vocab_size = max(vocab_size, facts.vocab_size)
        setattr(config, MADE_ROWS, facts.vocab_size)
    needed = facts.vocab_size if extension is None else extension.base_vocab_size
    if folder is not None or extension is not None:
        name = "model.config" if folder is None else f"model.path {folder}"
        _check_vocabulary(vocab_size, needed, name, facts)
    labels = fit_labels(names_of(config.id2label), facts.label_names, problem, section.new_head)
    if labels is None:
        return config, None
    # Both maps at once: num_labels follows from id2label.
    config.id2label = dict(enumerate(labels.names))
    config.label2id = {name: index for index, name in enumerate(labels.names)}
    config.problem_type = problem
    if config.get_text_config().pad_token_id is None and (extension is not None or facts.pad_id < vocab_size):
        config.pad_token_id = facts.pad_id
    return config, labels


def _inline_config(section: ModelSection, facts: StoreFacts, extension: Extension | None) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    assert section.config is not None
    tokens = {"pad_token_id": facts.pad_id, "bos_token_id": facts.bos_id, "eos_token_id": facts.eos_id}
    values = {"vocab_size": facts.vocab_size} | tokens | section.config
    model_type = values.pop("model_type")
    if isinstance(values["vocab_size"], int) and extension is None:
        # Before the configuration is made: transformers would warn of every special token first.
        _check_vocabulary(values["vocab_size"], facts.vocab_size, "model.config", facts)
    try:
        config = AutoConfig.for_model(model_type, **values)
    except (*_CANNOT_BUILD, StrictDataclassError) as error:
        raise ConfigError(f"model.config: {_reason(error)}") from error
    _check_config_keys(section.config, config)
    return config


def _stored_config(folder: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if (folder / GENERATION_CONFIG).is_file():
        read_values(folder / GENERATION_CONFIG)  # an export needs it
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (*_CANNOT_BUILD, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise RefusedForSecurityError(f"model.path: {folder} brings its own code, which is never run") from None
        raise DataError(f"model.path: {folder}: {_first_sentence(error)}") from error


def _check_vocabulary(vocab_size: int, needed: int, source: str, facts: StoreFacts) -> None:
    """DataError for ids in use beyond the embedding, a printed line for ids that no record uses."""
    if vocab_size >= needed:
        return
    finding = check_vocabulary(source, vocab_size, needed, facts.stores)
    if finding is not None:
        if finding.verdict == "error":
            raise DataError(finding.text)
        say(warning_lines(finding))


def _check_config_keys(given: dict[str, Any], config: Any) -> None:
    """A configuration class takes any key and ignores the ones it does not know; we do not."""
    known = {*type(config)().to_dict(), *getattr(config, "attribute_map", {}), "num_labels"}
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean `model.config.{near[0]}`?" if near else ""
            raise ConfigError(f"model.config: unknown key `model.config.{key}` for {config.model_type}{hint}")


def decay_groups(model: Any, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices decay, biases and norm weights (one dimension) do not.

    With a `layer_decay` below 1, each layer has groups of its own, whose share of the learning rate is "lr_scale"; see
    `engine.model.layer_scales`. Call it before ZeRO-3 flattens the parameters. There are no empty groups.
    """
    scales = layer_scales(model, layer_decay)
    groups: dict[tuple[float, bool], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((scales[name], parameter.ndim >= 2), []).append(parameter)
    return [
        {"params": groups[scale, decays], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        for scale, decays in sorted(groups, reverse=True)
    ]
