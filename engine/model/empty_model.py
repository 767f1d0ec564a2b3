"""A pretrained model before its weights: parameters on the meta device, and what no file holds made here."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from engine.errors import ConfigError, DataError
from engine.finding import warning_lines
from engine.fit.labels import Labels, check_labels
from engine.model.frozen import untrained_lines
from engine.model.model_files import FLOATING_TYPES, FileTensor
from engine.model.model_folder import GENERATION_CONFIG
from engine.model.starting_weights import DerivedWeights, StartingWeights, exchange_parameters, read_whole
from engine.model.vocabulary import NewRows
from engine.model.weight_names import Conversion, NameMap, is_head, map_names
from engine.tasks.task import Task


def empty_model(config: Any, task: Task, folder: Path | None, options: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model of `config` on the meta device, tied, with the folder's generation settings.

    `dtype` is that of buffers. Raises ValueError or OSError for what transformers cannot build.
    """
    creation = initialization.meta_device_safe_creation_ops()
    with torch.device("meta"), creation, initialization.no_tie_weights():
        model = task.auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False, **options)
    model.tie_weights(recompute_mapping=False)
    if folder is not None and model.can_generate():
        _adjust_generation(model, folder)
    return model


def _adjust_generation(model: Any, folder: Path) -> None:
    """Give the model the folder's generation settings. DataError for settings with which no reader opens it."""
    try:
        model.adjust_generation_fn(
            None, from_auto_class=True, from_pipeline=None, pretrained_model_name_or_path=str(folder), cache_dir=None,
            force_download=False, proxies=None, local_files_only=True, token=None, revision=None, subfolder="",
            trust_remote_code=False,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        text = " ".join(str(error).split())
        raise DataError(f"{folder / GENERATION_CONFIG}: {text}; correct it, or remove the file") from error


def main_type(config: Any, stored: dict[str, FileTensor]) -> torch.dtype:
    """The type a model says its weights are in, or that of the first stored one; fp32 when nothing tells."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next((tensor.dtype for tensor in stored.values() if tensor.dtype in FLOATING_TYPES), torch.float32)


def pretrained_weights(
    model: Any,
    stored: dict[str, FileTensor],
    shapes: dict[str, tuple[int, ...]],
    rows: NewRows | None,
    task: Task,
    seed: int,
    labels: Labels | None = None,
    new_head: bool = False,
) -> tuple[StartingWeights, list[str]]:
    """Where the weights of an empty model come from, and lines to say about it. Buffers and fresh heads are made.

    `shapes` are those that the files must have, by name in `state_dict`; `rows` are added to them. With `new_head` a
    head in the files is left out.
    Raises DataError as `map_names` does, and for a hole in the body.
    """
    keeps_head = not new_head and (labels is None or labels.keeps_head)
    names = map_names(model, stored, shapes, other_heads=task.new_head, keeps_head=keeps_head)
    check_missing(model, names, task, stored)
    fresh = initialise(model, names.missing, seed)
    direct = dict(names.direct)
    made = [DerivedWeights(tuple(c.targets.values()), partial(_convert, model, c)) for c in names.conversions]
    for name in rows.names if rows is not None else ():
        assert rows is not None
        pieces = direct.pop(name, [])
        if len(pieces) != 1:
            raise DataError(f"model type {model.config.model_type} cannot take new tokens: {name} is not stored whole")
        made.append(DerivedWeights((name,), partial(_extend, rows, name, pieces[0])))
    weights = StartingWeights(direct, fresh, made, names.copies)
    untrained = untrained_lines(model, names.missing, rows.names if rows is not None else ())
    return weights, [*_label_lines(model, names, labels), *_lines(names, rows), *untrained]


def _label_lines(model: Any, names: NameMap, labels: Labels | None) -> list[str]:
    """The labels where they are not simply the store's; nothing of a head that the files do not have.

    ConfigError for a head that is one for other labels.
    """
    finding = check_labels(labels, has_head(model, names))
    if finding is not None and finding.verdict == "error":
        raise ConfigError(finding.text)
    return [] if finding is None else warning_lines(finding)


def has_head(model: Any, names: NameMap) -> bool:
    """True if the files have weights of a head of the model's own kind."""
    return bool(names.own_head) or any(is_head(model, name) for name in names.direct)


def initialise(model: Any, missing: Sequence[str], seed: int) -> dict[str, Tensor]:
    """Give the model's buffers memory, and values where no file has them; returns the `missing` parameters, fresh.

    Both come from the model's own code and `seed`; the parameters are whole on the CPU, in fp32,
    and so the same on every rank of every job.
    """
    tensors = model.state_dict(keep_vars=True)
    absent = {id(tensors[name]) for name in missing}
    buffers: dict[int, Tensor] = {}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            real = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer
            if name not in module._non_persistent_buffers_set and id(buffer) not in absent:
                real._is_hf_initialized = True  # type: ignore[union-attr] # transformers' mark: a file has it
            module._buffers[name] = buffers.setdefault(id(buffer), real)

    def exchange(parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) in absent:
            return nn.Parameter(torch.empty(parameter.shape), parameter.requires_grad)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        return parameter

    exchange_parameters(model, exchange)
    torch.manual_seed(seed)
    model.initialize_weights()
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach() for name in missing if name in parameters}


def check_missing(model: Any, names: NameMap, task: Task, stored: dict[str, FileTensor]) -> None:
    """DataError for a hole in the body, and for one in the head of a task that does not make a new head."""
    prefix = f"{model.base_model_prefix}."
    patterns = model._keys_to_ignore_on_load_missing or ()
    holes = [
        name
        for name in names.missing
        if (not task.new_head or (name.startswith(prefix) and "pooler" not in name))
        and not any(re.search(pattern, name) for pattern in patterns)
    ]
    if holes:
        folder = next(iter(stored.values())).path.parent
        raise DataError(f"model.path: {folder} lacks {len(holes)} weights, for example {holes[0]}")


def _convert(model: Any, conversion: Conversion) -> tuple[dict[str, Tensor], int]:
    made = conversion.convert(model, lambda source: read_whole(source, conversion.source_type))
    num_bytes = sum(source.num_bytes for _, source in conversion.sources)
    return {conversion.targets[name]: value for name, value in made.items()}, num_bytes


def _extend(rows: NewRows, name: str, stored: FileTensor) -> tuple[dict[str, Tensor], int]:
    return {name: rows.extend(read_whole(stored))}, stored.num_bytes


def _lines(names: NameMap, rows: NewRows | None) -> list[str]:
    lines = []
    if names.missing:
        lines.append(f"new, untrained weights: {', '.join(names.missing)}")
    if names.left_out:
        lines.append(f"left out, of another task's head: {', '.join(tensor.name for tensor in names.left_out)}")
    if names.conversions:
        targets = [target for conversion in names.conversions for target in conversion.targets.values()]
        lines.append(
            f"{len(targets)} weights are stored in another layout: every rank reads them whole and converts them, "
            f"which is slower; for example {targets[0]}"
        )
    if rows is not None:
        lines.append(str(rows))
    return lines
