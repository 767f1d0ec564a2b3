"""From the running training straight to a Hugging Face folder: every rank writes its own share. No checkpoint needed.

The bytes of a safetensors file are known from shapes alone. So rank 0 lays the files out, and each
rank rounds the masters that it owns and writes them where they belong, into the same files of a
folder that all ranks see. Then each rank reads back from the disk what its neighbour has written.
All ranks call `export_live` together, between two updates.
"""

import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.nn import Parameter

from engine.checkpoint.save import stream
from engine.errors import DataError, FulltuneError, StorageError
from engine.export.folder import (
    Shard,
    check_free,
    check_shard,
    copy_files,
    empty_model,
    num_bytes,
    plan_shards,
    read_config,
    stored_names,
    weight_dtype,
    write_config,
    write_index,
)
from engine.model.buffers import persistent_buffers
from engine.ranks.agreement import agree, all_gather_json, from_rank_0, num_ranks, this_rank
from engine.tensor_files.reader import drop_cache, opened, read_into
from engine.tensor_files.slices import LiveSlice
from engine.tensor_files.writer import TensorSource, as_bytes, file_layout, fsync_folder, write_file
from engine.zero import zero_state

_GIB = 2.0**30
_LOG = logging.getLogger(__name__)
#: What one rank wrote in one piece: file, byte offset, length, hash.
Piece = tuple[str, int, int, str]


def export_live(
    engine: Any,
    parameters: Mapping[str, Parameter],
    model_dir: Path,
    tokenizer_dir: Path | None,
    out_dir: Path,
    dtype: str,
    max_shard_bytes: int,
    card: str,
    check_owner: Callable[[], None] = lambda: None,
    replace: bool = False,
) -> bool:
    """Write the weights as they are now as a folder that `from_pretrained` loads alone, whole or not at all.

    `model_dir` holds config.json; the other arguments are those of `export_checkpoint`. Returns
    False, having written nothing, for a family that is stored in another layout than its modules':
    its checkpoints can be exported. With `replace` it takes the place of an older folder. What
    `check_owner` raises on rank 0 just before it is published, all raise. Raises CannotWriteError for
    an `out_dir` that holds something, StorageError on all ranks when one cannot write, there is no
    room, or the disk holds something else than was written.
    """
    target = weight_dtype(dtype)
    values, config = agree(lambda: read_config(model_dir))
    architecture = type(engine.module.model).__name__
    model = empty_model(config, architecture, model_dir)
    buffers = persistent_buffers(engine.module.model)
    shards = plan_shards(model, _described(parameters, buffers), target, max_shard_bytes)
    if shards is None:
        if this_rank() == 0:
            _LOG.warning("%s is stored in another layout than its modules': export a checkpoint of it", architecture)
        return False
    temporary = Path(from_rank_0(lambda: str(_begin(out_dir, shards, replace))))
    try:
        places = _places(model, shards)
        pieces = agree(lambda: _write_own(engine, parameters, buffers, temporary, places))
        written: list[list[Piece]] = all_gather_json(pieces)
        neighbour = written[(this_rank() + 1) % num_ranks()]
        agree(lambda: _read_back(temporary, neighbour))

        def publish() -> None:
            for shard in shards:
                check_shard(temporary / shard.file, shard)
            write_index(temporary, shards)
            write_config(values, temporary, architecture, dtype)
            copy_files(model_dir, tokenizer_dir, temporary)
            write_file(temporary / "README.md", card.encode())
            fsync_folder(temporary)
            check_owner()
            _publish(temporary, out_dir)

        from_rank_0(publish)
    except FulltuneError:
        if this_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return True


def _described(parameters: Mapping[str, Parameter], buffers: Mapping[str, Tensor]) -> dict[str, TensorSource]:
    """The weights by name, for their types and shapes alone: what they hold is written by whom it belongs to."""
    whole = {name: (parameter.dtype, zero_state.full_shape(parameter)) for name, parameter in parameters.items()}
    whole |= {name: (buffer.dtype, tuple(buffer.shape)) for name, buffer in buffers.items()}
    return {name: TensorSource(name, kind, shape, lambda: iter(())) for name, (kind, shape) in whole.items()}


def _begin(out_dir: Path, shards: list[Shard], replace: bool) -> Path:
    """Make the files at their full sizes, with their heads, in a temporary folder."""
    if not replace:
        check_free(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    for stale in out_dir.parent.glob(f".tmp-{out_dir.name}-*"):
        shutil.rmtree(stale)
    system = os.statvfs(out_dir.parent)
    free, needed = system.f_bavail * system.f_frsize, sum(num_bytes(t) for shard in shards for t in shard.tensors)
    if free < needed:  # before the last free bytes are taken from the next checkpoint
        raise StorageError(f"{out_dir}: {needed / _GIB:.2f} GiB of weights do not fit: {free / _GIB:.2f} GiB are free")
    temporary = out_dir.with_name(f".tmp-{out_dir.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    for shard in shards:
        layout = file_layout(shard.file, shard.tensors)
        write_file(temporary / shard.file, layout.head)
        os.truncate(temporary / shard.file, layout.size_bytes)
    return temporary


def _publish(temporary: Path, out_dir: Path) -> None:
    """Give the finished folder its name; an older one of that name goes away once it is replaced."""
    aside = out_dir.with_name(f".tmp-{out_dir.name}-replaced")
    if out_dir.is_dir():
        out_dir.rename(aside)
    try:
        temporary.rename(out_dir)
    except OSError:
        if aside.is_dir():
            aside.rename(out_dir)
        raise
    fsync_folder(out_dir.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _places(model: Any, shards: list[Shard]) -> dict[str, tuple[str, int, torch.dtype]]:
    """Where each weight goes: its file, the offset of its first byte, and the type it is written in."""
    names = stored_names(model)
    assert names is not None
    places = {}
    for shard in shards:
        for stored, entry in file_layout(shard.file, shard.tensors).entries.items():
            places[names[stored]] = shard.file, entry.begin, entry.dtype
    return places


def _write_own(
    engine: Any,
    parameters: Mapping[str, Parameter],
    buffers: Mapping[str, Tensor],
    folder: Path,
    places: Mapping[str, tuple[str, int, torch.dtype]],
) -> list[Piece]:
    """Write this rank's slices, rank 0 the buffers too; what was written where."""
    slices = [*zero_state.live_state(engine, parameters, "master"), *zero_state.live_frozen(engine, parameters)]
    if this_rank() == 0:
        slices += [LiveSlice(name, 0, buffer.numel(), buffer.detach().reshape(-1)) for name, buffer in buffers.items()]
    pieces: list[Piece] = []
    descriptors: dict[str, int] = {}
    try:
        for piece in slices:
            if piece.name not in places:  # a buffer that the family does not store
                continue
            file, begin, dtype = places[piece.name]
            if file not in descriptors:
                descriptors[file] = os.open(folder / file, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            offset = begin + piece.start * dtype.itemsize
            for data in _rounded(piece.values, dtype):
                _write_all(descriptors[file], data, offset)
                pieces.append((file, offset, len(data), xxhash.xxh3_128(data).hexdigest()))
                offset += len(data)
        for descriptor in descriptors.values():
            os.fsync(descriptor)
    except OSError as error:
        error.filename = error.filename or str(folder)  # a failed write knows its descriptor only
        raise
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return pieces


def _rounded(values: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    for chunk in stream(values):
        yield as_bytes(chunk.to(dtype))


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _read_back(folder: Path, pieces: list[Piece]) -> None:
    """StorageError unless the disk holds what another rank says it has written."""
    for file in {piece[0] for piece in pieces}:
        drop_cache(folder / file)
        with opened(folder / file) as descriptor:
            for name, offset, count, digest in pieces:
                if name != file:
                    continue
                data = bytearray(count)
                try:
                    read_into(descriptor, memoryview(data), offset, folder / file)
                except DataError as error:
                    raise StorageError(f"{error}; nothing was published") from error
                if xxhash.xxh3_128(data).hexdigest() != digest:
                    raise StorageError(f"{folder / file}: bytes {offset} to {offset + count} are not what was written")
