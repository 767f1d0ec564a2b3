"""DeepSpeed's own checkpoint in, Hugging Face folder out: one process, no GPU, no DeepSpeed, a few chunks of memory."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.arithmetic import DEFAULT_SHARD_BYTES
from engine.deepspeed_import.checkpoint import DeepSpeedCheckpoint, open_deepspeed
from engine.errors import DataError
from engine.export.folder import (
    check_free,
    copy_files,
    empty_model,
    model_shapes,
    new_folder,
    read_config,
    weight_dtype,
    write_config,
    write_weights,
)
from engine.tensor_files.writer import TensorSource

_LOG = logging.getLogger(__name__)
_NAMES_TOLD = 4


def import_checkpoint(
    checkpoint_dir: Path,
    out_dir: Path,
    model_dir: Path,
    tag: str | None = None,
    dtype: str = "bfloat16",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> DeepSpeedCheckpoint:
    """Write the fp32 masters of a DeepSpeed checkpoint as a folder that `from_pretrained` loads alone.

    `checkpoint_dir` holds `latest` and the folder it names (`tag`: another one); `model_dir` holds the
    model's config.json and, to be copied, its tokenizer. `dtype` is bfloat16, float16 or float32. The
    folder appears when it is complete. Raises CannotWriteError for an `out_dir` that holds something,
    DataError when the checkpoint is damaged or not of this model, StorageError when writing fails,
    RefusedForSecurityError when a file would run code.
    """
    target = weight_dtype(dtype)
    check_free(out_dir)
    values, config = read_config(model_dir)
    path = model_dir / "config.json"
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise DataError(f'{path}: needs the class of the trained model, such as "architectures": ["LlamaForCausalLM"]')
    model = empty_model(config, str(architectures[0]), path)
    checkpoint = open_deepspeed(checkpoint_dir, tag)
    weights = _fit(checkpoint, model)
    if not checkpoint.has_checksums:
        _LOG.warning("%s was saved without checksums: damage to its weights would not be seen", checkpoint.path)
    checkpoint.verify()
    with new_folder(out_dir) as folder:
        write_weights(model, weights, folder, target, max_shard_bytes)
        write_config(values, folder, architectures[0], dtype)
        copy_files(model_dir, model_dir, folder)
    return checkpoint


def _fit(checkpoint: DeepSpeedCheckpoint, model: Any) -> dict[str, TensorSource]:
    """The model's weights by its own names. Wrappers around a model put something before every name."""
    stored = checkpoint.parameters | checkpoint.buffers
    stored |= {name: stored[kept] for name, kept in checkpoint.aliases.items()}
    parts = next(iter(checkpoint.parameters), "").split(".")
    prefixes = ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts))]
    best: list[str] | None = None
    for prefix in prefixes:
        here = {name.removeprefix(prefix): source for name, source in stored.items() if name.startswith(prefix)}
        outside = [f"{name} is not in the model" for name in stored if not name.startswith(prefix)]
        weights, faults = _match(here, model)
        faults += outside
        if not faults:
            if prefix:
                _LOG.info("names in %s begin with %s, which the model's do not", checkpoint.path, prefix)
            return weights
        if best is None or len(faults) < len(best):
            best = faults
    assert best is not None
    more = f" and {len(best) - _NAMES_TOLD} more" if len(best) > _NAMES_TOLD else ""
    raise DataError(f"{checkpoint.path}: not of the model in config.json: {'; '.join(best[:_NAMES_TOLD])}{more}")


def _match(stored: Mapping[str, TensorSource], model: Any) -> tuple[dict[str, TensorSource], list[str]]:
    """Sources by the first name of each weight of the model, and what does not fit."""
    weights: dict[str, TensorSource] = {}
    faults, used = [], set()
    tied: dict[int, list[str]] = {}
    for name in model.state_dict():
        tied.setdefault(id(model.get_parameter_or_buffer(name)), []).append(name)
    for name, shape in model_shapes(model).items():
        names = [other for other in tied[id(model.get_parameter_or_buffer(name))] if other in stored]
        used.update(names)
        sources = {id(stored[other]): stored[other] for other in names}
        if not names:
            faults.append(f"{name} is not in the checkpoint")
        elif len(sources) > 1:
            faults.append(f"{' and '.join(names)} are one weight in the model, but were trained as two")
        elif stored[names[0]].shape != shape:
            faults.append(f"{name} has shape {stored[names[0]].shape} in the checkpoint and {shape} in the model")
        else:
            weights[name] = stored[names[0]]
    computed = {name for name, _ in model.named_buffers()}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    faults += [
        f"{name[:200]} is not in the model"
        for name in stored
        if name not in used and name not in computed and not any(pattern.search(name) for pattern in ignored)
    ]
    return weights, faults
