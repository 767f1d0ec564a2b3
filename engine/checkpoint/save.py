"""Saving a checkpoint: written by any number of ranks beside the training, published whole or not at all.

The folder (see `engine.checkpoint.format`) is written under another name, flushed, checked for
completeness over all ranks, and renamed. Masters and moments do not change between two updates, so
a thread of every rank streams them from where DeepSpeed keeps them, without a copy, while forward
and backward of the next step run; `finish_save` must come before the next update. All ranks call
every function here together.
"""

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.arithmetic import checkpoint_name, step_of
from engine.checkpoint.format import FORMAT, MANIFEST, STATE, describe, parse_manifest, seal
from engine.errors import FulltuneError
from engine.file_modes import FOLDER_MODE
from engine.ranks.agreement import agree, all_gather_json, from_rank_0, num_ranks, this_rank
from engine.tensor_files.reader import BLOCK_BYTES, FileRecord, check_size
from engine.tensor_files.slices import KINDS, LiveSlice
from engine.tensor_files.writer import (
    CHUNK_BYTES,
    TensorSource,
    fsync_folder,
    tensor_chunks,
    write_file,
    write_safetensors,
)
from engine.zero.zero_model import ZeroModel


@dataclass(frozen=True)
class Owner:
    """Whose checkpoint it is: the run, and which of its starts writes. `check` raises when a newer one has begun."""

    run_id: str = ""
    generation: int = 0
    check: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class PendingSave:
    """A checkpoint that is being written. `records` are this rank's files."""

    path: Path
    temporary: Path
    owner: Owner
    index: dict[str, Any]
    slices: list[tuple[str, int, int]]
    records: "Future[list[FileRecord]]"


def save_checkpoint(zero: ZeroModel, run_dir: Path, state: Mapping[str, Any], owner: Owner | None = None) -> Path:
    """Write and publish the checkpoint of ``state["step"]`` in one go; returns its folder. See `begin_save`."""
    return finish_save(begin_save(zero, run_dir, state, owner or Owner()))[0]


def begin_save(zero: ZeroModel, run_dir: Path, state: Mapping[str, Any], owner: Owner) -> PendingSave:
    """Start writing the checkpoint of ``state["step"]``, between two updates, in a thread of this rank.

    `state` is plain JSON, the same on all ranks, with the number of steps done as ``step``. What
    `owner.check` raises on rank 0, all raise. Buffers are copied; everything else is read from
    where it lives, so no update may happen before `finish_save`.
    """
    folder = run_dir / "checkpoints"
    name = checkpoint_name(state["step"])
    state_text = json.dumps(dict(state), allow_nan=False, indent=1)
    if zero.optimizer_steps() == 0:
        zero.create_optimizer_state(0)
    temporary = folder / from_rank_0(lambda: _begin(folder, name, owner))
    sources, slices = _own_sources(zero)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the update's kernels end before another stream reads their results
    pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    records = pool.submit(_write_own, sources, temporary, state_text)
    pool.shutdown(wait=False)
    return PendingSave(folder / name, temporary, owner, _index(zero, name, owner), slices, records)


def finish_save(pending: PendingSave) -> tuple[Path, list[FileRecord]]:
    """Wait for all ranks' files and publish the checkpoint; returns its folder and this rank's files.

    If any rank could not write, or a newer start of the run owns the folder, all raise one error
    (StorageError, CannotWriteError) and the checkpoints that were there stay as they were.
    """
    try:
        records = agree(pending.records.result)
        own = {
            "slices": {_slices_file(): pending.slices},
            "files": {record.name: [record.size_bytes, record.blocks] for record in records},
        }
        reports = all_gather_json(own)
        from_rank_0(lambda: _commit(pending, reports))
    except FulltuneError:
        if this_rank() == 0:
            shutil.rmtree(pending.temporary, ignore_errors=True)
        from_rank_0(pending.owner.check)  # a newer start has removed our files: then that is what to tell
        raise
    return pending.path, records


def _begin(folder: Path, name: str, owner: Owner) -> str:
    owner.check()
    folder.mkdir(parents=True, exist_ok=True)
    finish_replacing(folder)
    for stale in folder.glob(".tmp-*"):
        if stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale)
        else:
            stale.unlink()  # a hint that a crash kept from its rename
    temporary = f".tmp-{name}-{owner.generation}-{secrets.token_hex(4)}"
    (folder / temporary).mkdir(mode=FOLDER_MODE)
    return temporary


def _slices_file() -> str:
    return f"slices-{this_rank():05d}-of-{num_ranks():05d}.safetensors"


def _own_sources(zero: ZeroModel) -> tuple[list[TensorSource], list[tuple[str, int, int]]]:
    """The tensors that this rank writes, as views of the live state, masters first; and the (weight, start, stop)."""
    by_kind = {kind: zero.live_state(kind) for kind in KINDS}
    others = {"frozen": zero.live_frozen()}
    if this_rank() == 0:  # a forward pass may change buffers, and they are small
        copies = {name: buffer.detach().clone().view(-1) for name, buffer in zero.buffers.items()}
        others["buffer"] = [LiveSlice(name, 0, len(values), values) for name, values in copies.items() if len(values)]
    sources = [
        TensorSource(f"{kind}/{part.name}", part.values.dtype, (len(part.values),), partial(stream, part.values))
        for kind, slices in (by_kind | others).items()
        for part in slices
    ]
    covered = [part for slices in (by_kind["master"], *others.values()) for part in slices]
    return sources, [(part.name, part.start, part.stop) for part in covered]


def stream(values: Tensor) -> Iterator[Tensor]:
    """The elements in order, on the CPU. A GPU's go through one pinned buffer, on a stream beside the computation."""
    if values.device.type != "cuda":
        yield from tensor_chunks(values)
        return
    step = CHUNK_BYTES // values.element_size()
    buffer = torch.empty(min(step, len(values)), dtype=values.dtype, pin_memory=True)
    copying = torch.cuda.Stream(values.device)  # type: ignore[no-untyped-call]
    for start in range(0, len(values), step):
        chunk = values[start : start + step]
        with torch.cuda.stream(copying):
            buffer[: len(chunk)].copy_(chunk, non_blocking=True)
        copying.synchronize()
        yield buffer[: len(chunk)]


def _write_own(sources: list[TensorSource], folder: Path, state_text: str) -> list[FileRecord]:
    records = [write_safetensors(folder / _slices_file(), sources)]
    if this_rank() == 0:
        records.append(write_file(folder / STATE, state_text.encode()))
    return records


def _index(zero: ZeroModel, name: str, owner: Owner) -> dict[str, Any]:
    """The manifest but for what the ranks report. Nothing reads ``written_by`` back: it is for people, years later."""
    shapes, frozen = zero.shapes, zero.frozen
    return {
        "format": FORMAT,
        "step": step_of(name),
        "optimizer_steps": zero.optimizer_steps(),
        "run_id": owner.run_id,
        "architecture": type(zero.model).__name__,
        "block_bytes": BLOCK_BYTES,
        "trained": {name: describe(torch.float32, shape) for name, shape in shapes.items() if name not in frozen},
        "frozen": {
            name: describe(zero.frozen_types.get(name, parameter.dtype), shapes[name])
            for name, parameter in frozen.items()
        },
        "buffers": {name: describe(buffer.dtype, tuple(buffer.shape)) for name, buffer in zero.buffers.items()},
        "written_by": {
            "world_size": num_ranks(),
            "generation": owner.generation,
            **zero.optimizer_facts(),
            "torch": torch.__version__,
        },
    }


def _commit(pending: PendingSave, reports: list[dict[str, Any]]) -> None:
    """Check that the ranks' reports make up the whole model, write the manifest, and publish."""
    temporary, final = pending.temporary, pending.path
    fields = pending.index | {
        "slices": {file: slices for report in reports for file, slices in report["slices"].items()},
        "files": {file: record for report in reports for file, record in report["files"].items()},
    }
    text = seal(fields)
    manifest = parse_manifest(text, final)
    write_file(temporary / MANIFEST, text.encode())
    for name, record in manifest.files.items():
        check_size(temporary / name, record)
    fsync_folder(temporary)
    pending.owner.check()
    aside = final.with_name(f".replaced-{final.name}")
    if final.exists():  # this step was saved before, or refused at a resume and has been reached again
        final.rename(aside)
    temporary.rename(final)
    fsync_folder(final.parent)
    replace_text(final.parent / "latest", final.name + "\n")
    finish_replacing(final.parent)


def finish_replacing(folder: Path) -> None:
    """Remove a checkpoint that was replaced; put it back if the process died before its successor was there."""
    for aside in folder.glob(".replaced-step-*"):
        final = folder / aside.name.removeprefix(".replaced-")
        if final.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(final)


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old one or the whole new one, also after a power cut."""
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    write_file(temporary, text.encode())
    temporary.rename(path)
    fsync_folder(path.parent)
