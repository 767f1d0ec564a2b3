"""A model folder whose vocabulary has grown: the base's files with rows for the new tokens, on disk alone.

Only the tensors with a row for each token are made anew; every other tensor is copied, bytes and type as they were.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import DataError, MissingInputError, RefusedForSecurityError
from engine.export.folder import empty_model, read_config, write_json_file
from engine.model.vocabulary import MADE_ROWS, Extension, NewRows, grow_vocabulary
from engine.tensor_files.reader import TensorEntry, opened, read_header, read_into
from engine.tensor_files.writer import CHUNK_BYTES, TensorSource, write_safetensors

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class GrownModel:
    """A model's rows for tokens: as stored, and with the new ones, from `first` on.

    `tensors` are the names that have them, none where no row had to be made.
    """

    first: int
    old_rows: int
    num_rows: int
    tensors: tuple[str, ...]


def weight_files(model_dir: Path) -> list[str]:
    """Names of the safetensors files that hold the model, none where there are none.

    DataError for a broken index, RefusedForSecurityError for one that names other files than those beside it.
    """
    index = model_dir / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{index}: not an index of safetensors files: {error}") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise RefusedForSecurityError(f"{index} names {name!r}: only *.safetensors in the same folder are read")
        return names
    return ["model.safetensors"] if (model_dir / "model.safetensors").is_file() else []


def write_grown_model(
    model_dir: Path,
    folder: Path,
    old_vocab_size: int,
    vocab_size: int,
    learned: Extension | None,
    spelled: Callable[[int], list[list[int]]],
) -> GrownModel:
    """Write weights and config.json of `model_dir` into `folder`, with rows for `vocab_size` ids.

    Rows are made for ids from `old_vocab_size` on, and for older ones that the model has none for. `learned` are
    pieces that the tokenizer gained before, whose rows may be still to make; `spelled` gives the ids that spell every
    id from a first one on. Raises DataError for a model whose rows cannot be found.
    """
    values, config = read_config(model_dir)
    architecture = (values.get("architectures") or [None])[0]
    if architecture is None:
        raise DataError(f"{model_dir}/config.json: names no `architectures`, so its rows for tokens cannot be found")
    model = empty_model(config, architecture, model_dir / "config.json")
    old_rows: int = model.get_input_embeddings().weight.shape[0]
    made: int = getattr(config, MADE_ROWS, 0)
    first = min(old_vocab_size, old_rows)
    if learned is not None and made < learned.vocab_size:
        first = min(first, max(made, learned.base_vocab_size))
    pieces = [tuple(ids) for ids in spelled(first)]
    if learned is not None:
        begin, end = (max(0, size - first) for size in (learned.base_vocab_size, learned.vocab_size))
        pieces[begin:end] = learned.pieces[max(0, first - learned.base_vocab_size) :]
    rows = grow_vocabulary(model, Extension(first, tuple(pieces))) if first < vocab_size else None
    files = weight_files(model_dir)
    if rows is None:
        for name in (*files, "config.json", *_index_of(model_dir)):
            shutil.copyfile(model_dir / name, folder / name)
        return GrownModel(first, old_rows, old_rows, ())
    headers = {name: read_header((model_dir / name).resolve()) for name in files}
    grown = _rows_in(model_dir, headers, model, rows)
    _write_files(model_dir, folder, headers, grown, rows)
    if made or learned is not None:
        values[MADE_ROWS] = vocab_size
    _set_vocab_size(values, rows)
    write_json_file(folder / "config.json", values)
    return GrownModel(first, old_rows, rows.num_rows, tuple(sorted(grown)))


def _index_of(model_dir: Path) -> list[str]:
    return [_INDEX] if (model_dir / _INDEX).is_file() else []


def _write_files(
    model_dir: Path, folder: Path, headers: dict[str, dict[str, TensorEntry]], grown: set[str], rows: NewRows
) -> None:
    """The same files: copied where no tensor of theirs grows, else written anew; and their index."""
    for name, entries in headers.items():
        path = (model_dir / name).resolve()
        if grown.isdisjoint(entries):
            shutil.copyfile(path, folder / name)
        else:
            ordered = sorted(entries.items(), key=lambda item: item[1].begin)
            sources = [_source(path, key, entry, rows if key in grown else None) for key, entry in ordered]
            write_safetensors(folder / name, sources, {"format": "pt"})
    if _index_of(model_dir):
        _write_index(model_dir, folder, headers, grown, rows)


def _rows_in(model_dir: Path, headers: dict[str, dict[str, TensorEntry]], model: Any, rows: NewRows) -> set[str]:
    """Names in the files of the tensors that grow; stored names may have another beginning than the model's.

    Raises DataError if one is not there.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parameters |= dict(model.named_buffers(remove_duplicate=False))
    found: set[str] = set()
    for wanted in rows.names:
        ends = {_end(name) for name, tensor in parameters.items() if tensor is parameters[wanted]}
        named = {
            name
            for entries in headers.values()
            for name, entry in entries.items()
            if _end(name) in ends and entry.shape[:1] == (rows.old_rows,) and entry.dtype.is_floating_point
        }
        if not named:
            raise DataError(f"{model_dir}: no safetensors file holds {wanted} with its {rows.old_rows} rows for tokens")
        found |= named
    return found


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _source(path: Path, name: str, entry: TensorEntry, rows: NewRows | None) -> TensorSource:
    """A tensor of a file as it is, in chunks; with `rows`, read whole and grown."""
    if rows is None:
        return TensorSource(name, entry.dtype, entry.shape, partial(_chunks, path, entry))

    def grown() -> Iterator[Tensor]:
        stored = torch.cat(list(_chunks(path, entry))).view(entry.shape)
        yield rows.extend(stored).view(-1)

    return TensorSource(name, entry.dtype, (rows.num_rows, *entry.shape[1:]), grown)


def _chunks(path: Path, entry: TensorEntry) -> Iterator[Tensor]:
    """The elements of a stored tensor in order."""
    with opened(path) as descriptor:
        for begin in range(entry.begin, entry.end, CHUNK_BYTES):
            buffer = bytearray(min(CHUNK_BYTES, entry.end - begin))
            read_into(descriptor, memoryview(buffer), begin, path)
            yield torch.frombuffer(buffer, dtype=entry.dtype)


def _write_index(
    model_dir: Path, folder: Path, headers: dict[str, dict[str, TensorEntry]], grown: set[str], rows: NewRows
) -> None:
    index = json.loads((model_dir / _INDEX).read_text(encoding="utf-8"))
    metadata = index.setdefault("metadata", {})
    more = sum(
        (entry.end - entry.begin) // rows.old_rows * (rows.num_rows - rows.old_rows)
        for entries in headers.values()
        for name, entry in entries.items()
        if name in grown
    )
    if isinstance(metadata.get("total_size"), int):
        metadata["total_size"] += more
    write_json_file(folder / _INDEX, index)


def _set_vocab_size(values: dict[str, Any], rows: NewRows) -> None:
    """Put the number of rows wherever a configuration has the old one: at the top, and in the part about text."""
    if rows.num_rows == rows.old_rows:
        return
    holders = [values, *(value for value in values.values() if isinstance(value, dict))]
    found = [holder for holder in holders if holder.get("vocab_size") == rows.old_rows]
    for holder in found or [values]:
        holder["vocab_size"] = rows.num_rows


def require_weights(model_dir: Path) -> None:
    """MissingInputError unless the folder holds a model's configuration and its weights as safetensors."""
    others = sorted(path.name for pattern in ("*.bin", "*.h5", "*.msgpack") for path in model_dir.glob(pattern))
    if not weight_files(model_dir):
        found = f", only {', '.join(others)}: save the model as safetensors first" if others else ""
        raise MissingInputError(f"{model_dir}: has config.json, but no model.safetensors{found}")
