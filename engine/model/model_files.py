"""The safetensors files of a Hugging Face folder: which tensors they hold, and where."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import DataError, RefusedForSecurityError
from engine.tensor_files.reader import TensorEntry, read_file, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 100_000_000
#: Types of weights that can be trained as they are; anything else is a quantised or broken checkpoint.
FLOATING_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a model folder: `shape` elements of `dtype`, row-major, from a byte of the file `path`."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def count(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return self.count * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.path}: {self.name}"


def read_model_files(folder: Path, config: Any) -> dict[str, FileTensor]:
    """Every tensor of the model folder by its stored name; reads headers only.

    `config` is the folder's Hugging Face configuration. As in transformers, ``model.safetensors``
    comes before the index of a sharded model. RefusedForSecurityError without safetensors or for an
    index that names files elsewhere; DataError for files that do not hold what index and headers
    say, and for quantised models.
    """
    method = getattr(config, "quantization_config", None)
    if method is not None:
        kind = method.get("quant_method", "unknown method") if isinstance(method, dict) else type(method).__name__
        raise DataError(
            f"model.path: {folder} is quantised (quantization_config in config.json: {kind}): full-parameter training "
            "needs the weights in bf16, fp16 or fp32; take the unquantised model"
        )
    entry = getattr(config, "transformers_weights", None) or _default_entry(folder)
    if str(entry).endswith(".index.json"):
        tensors = _read_sharded(folder, _inside(folder, entry, "config.json"))
    else:
        path = _inside(folder, entry, "config.json")
        tensors = {name: _stored(name, path, found) for name, found in read_header(path).items()}
    for extra in type(config).extra_files:  # weights that a few families keep beside the others
        if (folder / extra).is_file():
            path = _inside(folder, extra, "the model's class")
            tensors |= {name: _stored(name, path, found) for name, found in read_header(path).items()}
    return tensors


def check_types(tensors: Iterable[FileTensor]) -> None:
    """DataError for a parameter that is not stored in a floating type of at least 16 bits."""
    for tensor in tensors:
        if tensor.dtype not in FLOATING_TYPES:
            raise DataError(
                f"{tensor} is stored as {_type_name(tensor.dtype)}: a quantised checkpoint cannot be trained; take the "
                "model in bf16, fp16 or fp32"
            )


def _default_entry(folder: Path) -> str:
    for name in (SINGLE_FILE, INDEX_FILE):
        if (folder / name).is_file():
            return name
    if any(folder.glob("*.safetensors")):
        raise DataError(f"model.path: {folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: which files to read?")
    raise RefusedForSecurityError(f"model.path: {folder} has no *.safetensors; other weight files can run code")


def _read_sharded(folder: Path, index_path: Path) -> dict[str, FileTensor]:
    """The tensors of all shards, which are exactly those that the index names, each in its shard."""
    try:
        weight_map = json.loads(read_file(index_path, _MAX_INDEX_BYTES))["weight_map"]
        if not weight_map or not all(isinstance(text, str) for pair in weight_map.items() for text in pair):
            raise ValueError("weight_map must give the file of each tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{index_path}: not an index of weights: {error}") from None
    tensors: dict[str, FileTensor] = {}
    paths = {file: _inside(folder, file, index_path) for file in sorted(set(weight_map.values()))}
    for file, path in paths.items():
        for name, entry in read_header(path).items():
            if name in tensors:
                raise DataError(f"{path}: {name} is in {tensors[name].path.name}, too")
            if weight_map.get(name) != file:
                raise DataError(f"{path}: holds {name}, but {index_path.name} puts it into {weight_map.get(name)}")
            tensors[name] = _stored(name, path, entry)
    for name, file in weight_map.items():
        if name not in tensors:
            raise DataError(f"{index_path}: {name} is said to be in {file}, which lacks it")
    return tensors


def _inside(folder: Path, name: Any, source: Any) -> Path:
    """The file `name` of `folder`, links followed (a Hub cache is made of them). Refused unless a plain file name."""
    if not isinstance(name, str) or Path(name).name != name or not name.endswith((".safetensors", ".index.json")):
        raise RefusedForSecurityError(
            f"model.path: {source} names {str(name)!r} as weights: only *.safetensors in the same folder are read"
        )
    path = folder / name
    try:
        return path.resolve(strict=True)
    except OSError:
        raise DataError(f"{path}: named by {source}, but not there: download the model again") from None


def _stored(name: str, path: Path, entry: TensorEntry) -> FileTensor:
    return FileTensor(name, path, entry.dtype, entry.shape, entry.begin)


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
