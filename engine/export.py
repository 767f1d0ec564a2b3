"""Checkpoint in, Hugging Face folder out: one process, no GPU, no DeepSpeed, a few chunks of memory.

The weights are the fp32 masters rounded once to the wanted type, which are the weights that the
engine computes with. transformers' own `save_pretrained` wants the whole model in memory; it is
used only for the families whose stored layout differs from their modules' (stacked experts).
"""

import json
import logging
import math
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint_files import best_checkpoint, list_checkpoints, step_of
from engine.checkpoint_reader import CheckpointReader
from engine.errors import CannotWriteError, ConfigError, DataError, MissingInputError, StorageError
from engine.safetensors_file import CHUNK_BYTES, TensorSource, fsync_folder, write_file, write_safetensors

_LOG = logging.getLogger(__name__)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_MODE = 0o666  # exports are for others to read; the umask decides
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt",
)  # fmt: skip
_TOKENIZER_SUFFIXES = (".model", ".spm", ".jinja")
DEFAULT_SHARD_BYTES = 5 * 1000**3


def resolve_checkpoint(run_dir: Path, step: int | None = None, best: bool = False) -> Path:
    """The checkpoint to export: that of `step`, the best one, or the newest.

    MissingInputError names what there is instead.
    """
    present = list_checkpoints(run_dir)
    if step is not None:
        found = next((path for path in present if step_of(path.name) == step), None)
        wanted = f"of step {step}"
    elif best:
        found, wanted = best_checkpoint(run_dir), "marked as best"
    else:
        found, wanted = (present[-1] if present else None), ""
    if found is None:
        steps = ", ".join(str(step_of(path.name)) for path in present)
        there = f"there are those of steps {steps}" if steps else "there is none at all"
        raise MissingInputError(f"{run_dir}: no checkpoint {wanted}".rstrip() + f"; {there}")
    return found


def export_checkpoint(
    checkpoint_dir: Path,
    model_dir: Path,
    tokenizer_dir: Path | None,
    out_dir: Path,
    dtype: str = "bfloat16",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write the checkpoint as a folder that `from_pretrained` loads alone.

    `model_dir` holds config.json and perhaps generation_config.json; the tokenizer's files are
    copied. `dtype` is bfloat16, float16 or float32. The folder appears when it is complete.
    Raises CannotWriteError for an `out_dir` that holds something, DataError for a damaged
    checkpoint or one that is not of this model, StorageError when writing fails.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"export dtype {dtype}: choose one of {', '.join(_DTYPES)}")
    out_dir = out_dir.absolute()
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CannotWriteError(f"{out_dir}: exists and is not an empty folder; remove it or name another")
    reader = CheckpointReader(checkpoint_dir)
    reader.verify_weights()
    config, model = _empty_model(reader, model_dir)
    temporary = out_dir.with_name(f".tmp-{out_dir.name}-{secrets.token_hex(4)}")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            _write_weights(reader, model, temporary, _DTYPES[dtype], max_shard_bytes)
            _write_config(config, temporary, reader.manifest.architecture, dtype)
            _copy_files(model_dir, tokenizer_dir, temporary)
            fsync_folder(temporary)
            temporary.rename(out_dir)
            fsync_folder(out_dir.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{error.filename or out_dir}: {error.strerror}; nothing was exported") from error


def _empty_model(reader: CheckpointReader, model_dir: Path) -> tuple[dict[str, Any], Any]:
    """config.json's values, and the model they describe without memory for its weights."""
    import transformers

    path = model_dir / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file; export needs the model's configuration") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: {str(error).splitlines()[0]}") from error
    architecture = reader.manifest.architecture
    kind: Any = getattr(transformers, architecture, None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known:
        raise DataError(f"{reader.path}: transformers {transformers.__version__} has no model class {architecture}")
    if not isinstance(config, kind.config_class):
        raise DataError(f"{reader.path}: of a {architecture}, but {path} describes a {config.model_type} model")
    with torch.device("meta"):
        model = kind(config)
    _check_names(reader, model)
    return values, model


def _check_names(reader: CheckpointReader, model: Any) -> None:
    here = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    persistent = model.state_dict()
    here |= {name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in persistent}
    there = {name: entry.shape for name, entry in reader.weights.items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise DataError(
                f"{reader.path}: not of the model in config.json: {name} has shape {there.get(name)} in the "
                f"checkpoint and {here.get(name)} in the model"
            )


def _write_weights(
    reader: CheckpointReader, model: Any, folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    names = _stored_names(model)
    buffers = {name for name, _ in model.named_buffers()}
    if names is None:
        _LOG.warning("%s is stored in another layout than its modules': exporting in memory", type(model).__name__)
        _save_in_memory(reader, model, folder, dtype, max_shard_bytes)
        return
    sources = [_source(reader, stored, name, None if name in buffers else dtype) for stored, name in names.items()]
    shards = _shards(sources, max_shard_bytes)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, mode=_MODE)
        where |= {source.name: file for source in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(_num_bytes, sources))}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


def _stored_names(model: Any) -> dict[str, str] | None:
    """The names that `save_pretrained` would write, each with the checkpoint's name for its values.

    Of tied weights it keeps one, and not always the one that PyTorch names first. None when it
    would also change names or shapes.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = {name: value for name, value in model.state_dict().items() if not _ignored(model, name)}
    kept = remove_tied_weights_from_state_dict(dict(state), model)
    converted = revert_weight_conversion(model, dict(kept))
    if {name: value.shape for name, value in converted.items()} != {name: value.shape for name, value in kept.items()}:
        return None
    first_names = {id(value): name for name, value in (*model.named_parameters(), *model.named_buffers())}
    return {name: first_names[id(model.get_parameter_or_buffer(name))] for name in kept}


def _ignored(model: Any, name: str) -> bool:
    return name in (model._keys_to_ignore_on_save or ())


def _source(reader: CheckpointReader, stored: str, name: str, dtype: torch.dtype | None) -> TensorSource:
    """The tensor `name` of the checkpoint under the name `stored`, read and rounded a chunk at a time.

    `dtype` None keeps the type it was saved in, as buffers do.
    """
    entry = reader.weights[name]
    target = dtype or entry.dtype

    def chunks() -> Iterator[Tensor]:
        count, step = math.prod(entry.shape), CHUNK_BYTES // 4
        for start in range(0, count, step):
            yield reader.read_weight(name, start, min(count, start + step)).to(target)

    return TensorSource(stored, target, entry.shape, chunks)


def _num_bytes(source: TensorSource) -> int:
    return math.prod(source.shape) * source.dtype.itemsize


def _shards(sources: list[TensorSource], max_shard_bytes: int) -> list[list[TensorSource]]:
    """Consecutive tensors up to `max_shard_bytes` a shard; a larger tensor has a shard of its own."""
    shards: list[list[TensorSource]] = [[]]
    size = 0
    for source in sources:
        if shards[-1] and size + _num_bytes(source) > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(source)
        size += _num_bytes(source)
    return shards


def _save_in_memory(
    reader: CheckpointReader, model: Any, folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """The slow way: the whole model, written by transformers with its own changes of layout."""
    model.to_empty(device="cpu").to(dtype)
    model.tie_weights()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name in reader.weights:
            value.data.copy_(reader.read_weight(name, 0, value.numel()).view(value.shape))
    model.save_pretrained(folder, max_shard_size=max_shard_bytes)


def _write_config(values: dict[str, Any], folder: Path, architecture: str, dtype: str) -> None:
    kept = {key: value for key, value in values.items() if key not in ("torch_dtype", "auto_map", "_name_or_path")}
    (folder / "config.json").unlink(missing_ok=True)
    _write_json(folder / "config.json", kept | {"architectures": [architecture], "dtype": dtype})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_file(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode(), mode=_MODE)


def _copy_files(model_dir: Path, tokenizer_dir: Path | None, folder: Path) -> None:
    """Copy by name: a folder may also hold weights, or code that must not travel."""
    wanted = [model_dir / "generation_config.json"]
    if tokenizer_dir is not None:
        wanted += [
            path
            for path in sorted(tokenizer_dir.iterdir())
            if path.name in _TOKENIZER_FILES or path.suffix in _TOKENIZER_SUFFIXES
        ]
    for path in wanted:
        if path.is_file():
            (folder / path.name).unlink(missing_ok=True)
            write_file(folder / path.name, path.read_bytes(), mode=_MODE)
