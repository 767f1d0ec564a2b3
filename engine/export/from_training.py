"""Models to use, made while training: from the live weights straight to a Hugging Face folder, without a checkpoint.

The bytes of a safetensors file are known from shapes alone. So rank 0 lays the files out, and each
rank rounds the masters that it owns and writes them where they belong, into the same files of a
folder that all ranks see. Then each rank reads back from the disk what its neighbour has written.
All ranks call every public function here together, between two updates.
"""

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from data_prep.token_store import TokenStore
from engine.arithmetic import checkpoint_name, step_of
from engine.checkpoint.save import stream
from engine.config import RunConfig
from engine.errors import DataError, FulltuneError, StorageError
from engine.export.card import model_card
from engine.export.folder import (
    Shard,
    check_free,
    check_shard,
    empty_model,
    num_bytes,
    plan_shards,
    read_config,
    stored_names,
    weight_dtype,
    write_index,
)
from engine.export.from_checkpoint import export_checkpoint, resolve_checkpoint
from engine.export.settings import copy_files, write_config
from engine.export.taught import Taught, taught_by
from engine.ranks.agreement import agree, all_gather_json, from_rank_0, num_ranks, this_rank
from engine.tensor_files.reader import drop_cache, opened, read_into
from engine.tensor_files.slices import LiveSlice
from engine.tensor_files.writer import TensorSource, as_bytes, file_layout, fsync_folder, write_file
from engine.zero.zero_model import ZeroModel

_GIB = 2.0**30
_LOG = logging.getLogger(__name__)
#: A range that one rank wrote in one go: file, byte offset, length, hash.
WrittenRange = tuple[str, int, int, str]


def export_step(
    zero: ZeroModel, config: RunConfig, store: TokenStore, state: Mapping[str, Any], say: Callable[[str], None],
    check_owner: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Write the weights after ``state["step"]`` into ``run_dir/weights/step-...`` and keep the newest `export.keep`.

    A failure is a warning: what training needs is in the checkpoints.
    """
    out_dir = config.run_dir / "weights" / checkpoint_name(state["step"])
    try:
        _export(zero, config, store, state, say, check_owner, out_dir)
    except StorageError as error:
        say(f"warning: no weights written after step {state['step']}: {error}; training goes on")
        return
    if config.export.keep is not None:
        from_rank_0(partial(_prune, out_dir.parent, int(state["step"]), config.export.keep))


def export_end(
    zero: ZeroModel, config: RunConfig, store: TokenStore, state: Mapping[str, Any], say: Callable[[str], None],
    check_owner: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Write the trained model into ``run_dir/export``, in place of an older one. The last checkpoint must be published.

    StorageError when it cannot be written: the checkpoint is there, and starting again tries again.
    """
    out_dir = config.run_dir / "export"
    if _export(zero, config, store, state, say, check_owner, out_dir):
        return

    def from_checkpoint() -> None:
        # This family's bytes cannot be written by slices.
        if out_dir.is_dir():
            shutil.rmtree(out_dir)
        card = model_card(config.run_dir, config.model_dump(mode="json"), state, store.manifest)
        checkpoint = resolve_checkpoint(config.run_dir, int(state["step"]))
        export_checkpoint(
            checkpoint, config.run_dir / "model", store.tokenizer_dir, out_dir,
            config.export.dtype, config.export.max_shard_size, card, taught_by(store, config.trained_task),
        )  # fmt: skip

    from_rank_0(from_checkpoint)


def _export(
    zero: ZeroModel, config: RunConfig, store: TokenStore, state: Mapping[str, Any], say: Callable[[str], None],
    check_owner: Callable[[], None], out_dir: Path,
) -> bool:  # fmt: skip
    started = time.perf_counter()
    card = model_card(config.run_dir, config.model_dump(mode="json"), state, store.manifest)
    written = export_live(
        zero, config.run_dir / "model", store.tokenizer_dir, out_dir.absolute(), config.export.dtype,
        config.export.max_shard_size, card, check_owner, replace=True, taught=taught_by(store, config.trained_task),
    )  # fmt: skip
    if written:
        say(f"weights after step {state['step']} written to {out_dir} in {time.perf_counter() - started:.1f} s")
    return written


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` up to `step`; later ones are of a lost future and will be replaced."""
    present = sorted(path for path in folder.glob("step-*") if 0 <= step_of(path.name) <= step)
    for path in present[:-keep]:
        renamed = path.rename(path.with_name(f".tmp-{path.name}-pruned"))  # half of it must not look like a whole
        shutil.rmtree(renamed, ignore_errors=True)


def export_live(
    zero: ZeroModel, model_dir: Path, tokenizer_dir: Path | None, out_dir: Path, dtype: str, max_shard_bytes: int,
    card: str, check_owner: Callable[[], None] = lambda: None, replace: bool = False, taught: Taught | None = None,
) -> bool:  # fmt: skip
    """Write the weights as they are now as a folder that `from_pretrained` loads alone, whole or not at all.

    The arguments are those of `export_checkpoint`; with `replace` an older folder gives way. Returns False,
    having written nothing, for a family that is stored in another layout than its modules': its checkpoints can
    be exported. If `check_owner` raises on rank 0 just before it is published, all raise. CannotWriteError for an
    `out_dir` that holds something, StorageError on all ranks when one cannot write or reads back something else.
    """
    values, config = agree(lambda: read_config(model_dir))
    architecture = type(zero.model).__name__
    model = empty_model(config, architecture, model_dir)
    shards = plan_shards(model, _described(zero), weight_dtype(dtype), max_shard_bytes)
    if shards is None:
        if this_rank() == 0:
            _LOG.warning("%s is stored in another layout than its modules': export a checkpoint of it", architecture)
        return False

    def publish(folder: Path) -> None:
        for shard in shards:
            check_shard(folder / shard.file, shard)
        write_index(folder, shards)
        write_config(values, folder, model, dtype)
        copy_files(model_dir, tokenizer_dir, folder, model, taught or Taught())
        write_file(folder / "README.md", card.encode())
        fsync_folder(folder)
        check_owner()
        _publish(folder, out_dir)

    temporary = Path(from_rank_0(lambda: str(_begin(out_dir, shards, replace))))
    try:
        _write_together(zero, temporary, _places(model, shards))
        from_rank_0(lambda: publish(temporary))
    except FulltuneError:
        if this_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return True


def _write_together(zero: ZeroModel, folder: Path, places: Mapping[str, tuple[str, int, torch.dtype]]) -> None:
    """Let each rank write its own slices and read back what its neighbour has written."""
    written: list[list[WrittenRange]] = all_gather_json(agree(lambda: _write_own(zero, folder, places)))
    neighbour = written[(this_rank() + 1) % num_ranks()]
    agree(lambda: _read_back(folder, neighbour))


def _described(zero: ZeroModel) -> dict[str, TensorSource]:
    """The weights by name, for their types and shapes alone: each rank writes what it holds."""
    whole = {name: (zero.parameters[name].dtype, shape) for name, shape in zero.shapes.items()}
    whole |= {name: (buffer.dtype, tuple(buffer.shape)) for name, buffer in zero.buffers.items()}
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
    """The place of each weight: its file, the offset of its first byte, and the type it is written in."""
    names = stored_names(model)
    assert names is not None
    places = {}
    for shard in shards:
        for stored, entry in file_layout(shard.file, shard.tensors).entries.items():
            places[names[stored]] = shard.file, entry.begin, entry.dtype
    return places


def _write_own(zero: ZeroModel, folder: Path, places: Mapping[str, tuple[str, int, torch.dtype]]) -> list[WrittenRange]:
    """Write this rank's slices, rank 0 the buffers too; returns where they are and their hashes."""
    slices = [*zero.live_state("master"), *zero.live_frozen()]
    if this_rank() == 0:
        buffers = {name: buffer.detach().reshape(-1) for name, buffer in zero.buffers.items()}
        slices += [LiveSlice(name, 0, len(values), values) for name, values in buffers.items()]
    written: list[WrittenRange] = []
    descriptors: dict[str, int] = {}
    try:
        for part in slices:
            if part.name not in places:  # a buffer that the family does not store
                continue
            file, begin, dtype = places[part.name]
            if file not in descriptors:
                descriptors[file] = os.open(folder / file, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            offset = begin + part.start * dtype.itemsize
            for data in _rounded(part.values, dtype):
                _write_all(descriptors[file], data, offset)
                written.append((file, offset, len(data), xxhash.xxh3_128(data).hexdigest()))
                offset += len(data)
        for descriptor in descriptors.values():
            os.fsync(descriptor)
    except OSError as error:
        error.filename = error.filename or str(folder)  # a failed write knows its descriptor only
        raise
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return written


def _rounded(values: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    for chunk in stream(values):
        yield as_bytes(chunk.to(dtype))


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _read_back(folder: Path, ranges: list[WrittenRange]) -> None:
    """StorageError unless the disk holds what another rank says it has written."""
    for file in {written[0] for written in ranges}:
        drop_cache(folder / file)
        with opened(folder / file) as descriptor:
            for name, offset, count, digest in ranges:
                if name != file:
                    continue
                data = bytearray(count)
                try:
                    read_into(descriptor, memoryview(data), offset, folder / file)
                except DataError as error:
                    raise StorageError(f"{error}; nothing was published") from error
                if xxhash.xxh3_128(data).hexdigest() != digest:
                    raise StorageError(f"{folder / file}: bytes {offset} to {offset + count} are not what was written")
