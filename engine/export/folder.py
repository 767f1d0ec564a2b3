"""Writes a Hugging Face folder from tensor sources: a few chunks of memory, whatever the model's size.

Weights come as a `TensorSource` for each name of the model's parameters and persistent buffers, in
the type they were kept in. They are rounded once to the wanted type; buffers keep theirs.
transformers' own `save_pretrained` wants the whole model in memory; it is used only for the families
whose stored layout differs from their modules' (stacked experts).
"""

import json
import logging
import math
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.errors import (
    CannotWriteError,
    ConfigError,
    DataError,
    MissingInputError,
    RefusedForSecurityError,
    StorageError,
)
from engine.tensor_files.reader import FileRecord, drop_cache, read_header, verify_blocks
from engine.tensor_files.writer import TensorSource, fsync_folder, write_file, write_safetensors

_LOG = logging.getLogger(__name__)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def weight_dtype(name: str) -> torch.dtype:
    """The type called bfloat16, float16 or float32. Raises ConfigError for others."""
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name}: choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def check_free(out_dir: Path) -> None:
    """CannotWriteError if `out_dir` is there and not an empty folder."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CannotWriteError(f"{out_dir}: exists and is not an empty folder; remove it or name another")


@contextmanager
def new_folder(out_dir: Path) -> Iterator[Path]:
    """A temporary folder beside `out_dir` that becomes it when the block ends well, and else goes away.

    Raises CannotWriteError as `check_free` does, StorageError when writing fails.
    """
    out_dir = out_dir.absolute()
    check_free(out_dir)
    temporary = out_dir.with_name(f".tmp-{out_dir.name}-{secrets.token_hex(4)}")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            fsync_folder(temporary)
            temporary.rename(out_dir)
            fsync_folder(out_dir.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{error.filename or out_dir}: {error.strerror}; nothing was written") from error


def read_config(model_dir: Path) -> tuple[dict[str, Any], Any]:
    """The values in `model_dir`'s config.json, and transformers' configuration made from them.

    Raises MissingInputError if it is not there, DataError if transformers cannot read it,
    RefusedForSecurityError if it wants code of its own.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    path = model_dir / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingInputError(f"{path}: no such file; the model's configuration is needed") from None
    except (ValueError, OSError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise RefusedForSecurityError(f"{path}: the model brings its own code, which is never run") from None
        raise DataError(f"{path}: {str(error).splitlines()[0]}") from error
    return values, config


def empty_model(config: Any, architecture: str, asked_by: Path) -> Any:
    """The model of class `architecture` with `config`, without memory for its weights.

    Raises DataError that names `asked_by` when transformers has no such class, or it takes another
    kind of configuration.
    """
    import transformers

    kind: Any = getattr(transformers, architecture, None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known:
        raise DataError(f"{asked_by}: transformers {transformers.__version__} has no model class {architecture}")
    if not isinstance(config, kind.config_class):
        raise DataError(f"{asked_by}: of a {architecture}, but config.json describes a {config.model_type} model")
    with torch.device("meta"):
        return kind(config)


def model_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters (tied ones once, under their first name) and persistent buffers."""
    persistent = model.state_dict()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return shapes | {name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in persistent}


@dataclass(frozen=True)
class Shard:
    """A file of weights still to be written: its name, and its tensors under the names that others look for."""

    file: str
    tensors: list[TensorSource]


def plan_shards(
    model: Any, weights: Mapping[str, TensorSource], dtype: torch.dtype, max_shard_bytes: int
) -> list[Shard] | None:
    """The files of a folder for `model`, an empty one; None for a family that is stored in another layout.

    `weights` has a source for each name of `model_shapes(model)`; parameters become `dtype`, buffers
    keep their own type.
    """
    names = stored_names(model)
    if names is None:
        return None
    buffers = {name for name, _ in model.named_buffers()}
    sources = [
        _as_stored(weights[name], stored, weights[name].dtype if name in buffers else dtype)
        for stored, name in names.items()
    ]
    parts = _shards(sources, max_shard_bytes)
    if len(parts) == 1:
        return [Shard("model.safetensors", parts[0])]
    return [
        Shard(f"model-{number:05d}-of-{len(parts):05d}.safetensors", part) for number, part in enumerate(parts, start=1)
    ]


def write_weights(
    model: Any, weights: Mapping[str, TensorSource], folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Write model.safetensors, or shards and their index, into `folder`, and read back what the disk then holds.

    See `plan_shards` for the arguments. Each file is read back while the next one is written. Raises
    OSError, and StorageError when a file does not hold what was written.
    """
    shards = plan_shards(model, weights, dtype, max_shard_bytes)
    if shards is None:
        _LOG.warning("%s is stored in another layout than its modules': written in memory", type(model).__name__)
        _save_in_memory(model, weights, folder, dtype, max_shard_bytes)
        return
    total = sum(num_bytes(tensor) for shard in shards for tensor in shard.tensors)
    shown = sys.stderr.isatty()
    with ThreadPoolExecutor(1) as pool, tqdm(total=total, unit="B", unit_scale=True, disable=not shown) as bar:
        checks = []
        for shard in shards:
            record = write_safetensors(folder / shard.file, shard.tensors, read_ahead=True)
            checks.append(pool.submit(_read_back, folder, record, shard))
            bar.update(sum(map(num_bytes, shard.tensors)))
        for check in checks:
            check.result()
    write_index(folder, shards)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the index of several files; one file needs none."""
    if len(shards) > 1:
        where = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
        total = sum(num_bytes(tensor) for shard in shards for tensor in shard.tensors)
        write_json_file(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where}
        )


def check_shard(path: Path, shard: Shard) -> None:
    """StorageError unless the file at `path` has the shard's tensors, with their types and shapes."""
    try:
        found = {name: (entry.dtype, entry.shape) for name, entry in read_header(path).items()}
    except DataError as error:
        raise StorageError(f"{error}; nothing was published") from error
    expected = {tensor.name: (tensor.dtype, tuple(tensor.shape)) for tensor in shard.tensors}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise StorageError(f"{path}: holds {name} as {found.get(name)}, not as {expected.get(name)}")


def _read_back(folder: Path, record: FileRecord, shard: Shard) -> None:
    """Compare a written file with its hashes, from the disk and not from memory, and its tensors with the plan."""
    path = folder / shard.file
    drop_cache(path)
    try:
        verify_blocks(path, record)
    except DataError as error:
        raise StorageError(f"{error}; nothing was published") from error
    check_shard(path, shard)


def stored_names(model: Any) -> dict[str, str] | None:
    """The names that `save_pretrained` would write, each with the first name of its parameter or buffer.

    Of tied weights it keeps one, and not always the one that PyTorch names first; some families have other
    names in files than in the model. None when it would also change or join the tensors themselves.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = model._keys_to_ignore_on_save or ()
    state = {name: value for name, value in model.state_dict().items() if name not in ignored}
    kept = remove_tied_weights_from_state_dict(dict(state), model)
    converted = revert_weight_conversion(model, dict(kept))
    own_names = {id(value): name for name, value in kept.items()}
    if {id(value) for value in converted.values()} != own_names.keys():
        return None
    first_names = {id(value): name for name, value in (*model.named_parameters(), *model.named_buffers())}
    return {
        stored: first_names[id(model.get_parameter_or_buffer(own_names[id(value)]))]
        for stored, value in converted.items()
    }


def _as_stored(source: TensorSource, stored: str, dtype: torch.dtype) -> TensorSource:
    def chunks() -> Iterator[Tensor]:
        for chunk in source.chunks():
            yield chunk.to(dtype)

    return TensorSource(stored, dtype, source.shape, chunks)


def num_bytes(source: TensorSource) -> int:
    """Bytes of a tensor in a file."""
    return math.prod(source.shape) * source.dtype.itemsize


def _shards(sources: Sequence[TensorSource], max_shard_bytes: int) -> list[list[TensorSource]]:
    """Consecutive tensors up to `max_shard_bytes` a shard; a larger tensor has a shard of its own."""
    shards: list[list[TensorSource]] = [[]]
    size = 0
    for source in sources:
        if shards[-1] and size + num_bytes(source) > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(source)
        size += num_bytes(source)
    return shards


def _save_in_memory(
    model: Any, weights: Mapping[str, TensorSource], folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """The slow way: the whole model, written by transformers with its own changes of layout."""
    model.to_empty(device="cpu").to(dtype)
    model.tie_weights()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name in weights:
            start, flat = 0, value.data.view(-1)
            for chunk in weights[name].chunks():
                flat[start : start + chunk.numel()].copy_(chunk)
                start += chunk.numel()
    model.save_pretrained(folder, max_shard_size=max_shard_bytes)


def write_json_file(path: Path, values: Mapping[str, Any]) -> None:
    """Write readable JSON for others to read."""
    write_file(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
