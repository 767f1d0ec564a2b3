"""Checkpoints: written by any number of ranks, read by any other, never half there.

The folder (see `engine.checkpoint_files`) is written under another name, flushed, checked for
completeness over all ranks, and renamed. All ranks call every function here together.
"""

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from engine import errors, zero_state
from engine.checkpoint_files import (
    FORMAT,
    FROZEN,
    KINDS,
    MANIFEST,
    STATE,
    CheckpointReader,
    best_checkpoint,
    list_checkpoints,
    parse_manifest,
    seal,
    step_of,
    verify_checkpoint,
)
from engine.errors import DataError, FulltuneError, StorageError
from engine.safetensors_file import (
    BLOCK_BYTES,
    FileRecord,
    TensorSource,
    check_size,
    fsync_folder,
    tensor_chunks,
    write_file,
    write_safetensors,
)
from engine.zero_state import Slice, state_view

__all__ = [
    "all_gather_json",
    "best_checkpoint",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "mark_best",
    "prune_checkpoints",
    "save_checkpoint",
]

_LOG = logging.getLogger(__name__)
Result = TypeVar("Result")


def save_checkpoint(
    engine: Any,
    parameters: Mapping[str, Parameter],
    run_dir: Path,
    state: Mapping[str, Any],
    *,
    owner_check: Callable[[], None] | None = None,
) -> Path:
    """Write the checkpoint of ``state["step"]`` between two steps and return its folder.

    `state` is plain JSON, the same on all ranks, with the number of steps done as ``step``.
    `owner_check` runs on rank 0 before anything is written and again before the rename; what it
    raises stops the save. If any rank cannot write, all ranks raise one StorageError and the
    checkpoints that were there stay as they were.
    """
    folder = run_dir / "checkpoints"
    name = f"step-{state['step']:08d}"
    state_text = json.dumps(dict(state), allow_nan=False, indent=1)
    if zero_state.optimizer_steps(engine) == 0:
        zero_state.create_optimizer_state(engine, 0)
    temporary = folder / _from_rank_0(lambda: _begin(folder, name, owner_check))
    try:
        reports = all_gather_json(_write_files(engine, parameters, temporary, state_text))
        _from_rank_0(lambda: _commit(engine, parameters, temporary, folder / name, reports, owner_check))
    except FulltuneError:
        if _rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder / name


def _begin(folder: Path, name: str, owner_check: Callable[[], None] | None) -> str:
    if owner_check is not None:
        owner_check()
    folder.mkdir(parents=True, exist_ok=True)
    _finish_replacing(folder)
    for stale in folder.glob(".tmp-*"):
        if stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale)
        else:
            stale.unlink()  # a hint that a crash kept from its rename
    temporary = f".tmp-{name}-{secrets.token_hex(4)}"
    (folder / temporary).mkdir(mode=0o700)
    return temporary


def _write_files(engine: Any, parameters: Mapping[str, Parameter], folder: Path, state_text: str) -> dict[str, Any]:
    """Write all but the manifest; returns this rank's share of the manifest."""
    slices = zero_state.owned_slices(engine, parameters)
    own = _agree(lambda: _write_own(engine, slices, folder, state_text))
    # ZeRO-3 communicates in the next line: no rank may enter it alone, so the one above ends first.
    frozen = _agree(lambda: _write_frozen(engine, parameters, folder / FROZEN))
    return {
        "slices": {own[0].name: [(piece.name, piece.start, piece.stop) for piece in slices]},
        "files": {record.name: [record.size_bytes, record.blocks] for record in (*own, *frozen)},
    }


def _write_own(engine: Any, slices: list[Slice], folder: Path, state_text: str) -> list[FileRecord]:
    """Write this rank's slices straight from the live state, masters first; on rank 0 the state too."""
    sources = [
        TensorSource(
            f"{kind}/{piece.name}",
            torch.float32,
            (piece.stop - piece.start,),
            partial(lambda piece, kind: tensor_chunks(state_view(engine, piece, kind)), piece, kind),
        )
        for kind in KINDS
        for piece in slices
    ]
    name = f"slices-{_rank():05d}-of-{_world_size():05d}.safetensors"
    records = [write_safetensors(folder / name, sources)]
    if _rank() == 0:
        records.append(write_file(folder / STATE, state_text.encode()))
    return records


def _write_frozen(engine: Any, parameters: Mapping[str, Parameter], path: Path) -> list[FileRecord]:
    """Write frozen parameters and buffers on rank 0; all ranks take part, since ZeRO-3 gathers each."""
    buffers = persistent_buffers(engine.module.model)
    values = zero_state.frozen_values(engine, parameters)
    try:
        if _rank() != 0 or not (buffers or zero_state.frozen_parameters(parameters)):
            return []
        whole = [
            TensorSource(name, parameter.dtype, zero_state.full_shape(parameter), lambda: tensor_chunks(next(values)))
            for name, parameter in zero_state.frozen_parameters(parameters).items()
        ]
        whole += [
            TensorSource(name, buffer.dtype, tuple(buffer.shape), partial(tensor_chunks, buffer))
            for name, buffer in buffers.items()
        ]
        return [write_safetensors(path, whole)]
    finally:
        for _ in values:  # also after a failure: the other ranks are waiting in these gathers
            pass


def _commit(
    engine: Any,
    parameters: Mapping[str, Parameter],
    temporary: Path,
    final: Path,
    reports: list[dict[str, Any]],
    owner_check: Callable[[], None] | None,
) -> None:
    """Check that the ranks' reports make up the whole model, write the manifest, and publish."""
    model = engine.module.model
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    fields = {
        "format": FORMAT,
        "step": int(final.name.removeprefix("step-")),
        "optimizer_steps": zero_state.optimizer_steps(engine),
        "architecture": type(model).__name__,
        "block_bytes": BLOCK_BYTES,
        "parameters": {name: list(zero_state.full_shape(parameter)) for name, parameter in trained.items()},
        "slices": {file: slices for report in reports for file, slices in report["slices"].items()},
        "frozen": [*zero_state.frozen_parameters(parameters), *persistent_buffers(model)],
        "files": {file: record for report in reports for file, record in report["files"].items()},
        "written_by": _facts(engine),
    }
    text = seal(fields)
    manifest = parse_manifest(text, final)
    write_file(temporary / MANIFEST, text.encode())
    for name, record in manifest.files.items():
        check_size(temporary / name, record)
    fsync_folder(temporary)
    if owner_check is not None:
        owner_check()
    aside = final.with_name(f".replaced-{final.name}")
    if final.exists():  # this step was saved before, or refused at a resume and has been reached again
        final.rename(aside)
    temporary.rename(final)
    fsync_folder(final.parent)
    _replace_text(final.parent / "latest", final.name + "\n")
    _finish_replacing(final.parent)


def _finish_replacing(folder: Path) -> None:
    """Remove a checkpoint that was replaced; put it back if the process died before its successor was there."""
    for aside in folder.glob(".replaced-step-*"):
        final = folder / aside.name.removeprefix(".replaced-")
        if final.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(final)


def _facts(engine: Any) -> dict[str, Any]:
    """What somebody who looks into the manifest years later wants to know; nothing reads it back."""
    optimizer = engine.optimizer.optimizer
    groups = [
        {key: value for key, value in group.items() if isinstance(value, bool | int | float | tuple)}
        for group in optimizer.param_groups
    ]
    return {
        "world_size": _world_size(),
        "optimizer": type(optimizer).__name__,
        "groups": groups,
        "torch": torch.__version__,
    }


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    write_file(temporary, text.encode())
    temporary.rename(path)
    fsync_folder(path.parent)


def persistent_buffers(model: Module) -> dict[str, Tensor]:
    """The buffers that belong to a model's weights: those that its `state_dict` holds."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def find_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint whose every byte is what was written; None when the run has none.

    The ranks share the reading and come to one answer. What is refused is logged as a warning on
    rank 0. DataError when there are checkpoints and all are refused: a run never starts over silently.
    """
    names = _from_rank_0(lambda: _names(run_dir))
    refused: list[str] = []
    for name in reversed(names):
        path = run_dir / "checkpoints" / name
        try:
            _agree(partial(verify_checkpoint, path, _rank(), _world_size()))
        except DataError as error:
            refused.append(str(error))
            if _rank() == 0:
                _LOG.warning("checkpoint refused: %s", error)
            continue
        if refused and _rank() == 0:
            _LOG.warning("using the older checkpoint %s", path)
        return path
    if refused:
        raise DataError(f"{run_dir}: no checkpoint can be used ({'; '.join(refused)}); --fresh starts over")
    return None


def _names(run_dir: Path) -> list[str]:
    _finish_replacing(run_dir / "checkpoints")
    return [path.name for path in list_checkpoints(run_dir)]


def load_checkpoint(engine: Any, parameters: Mapping[str, Parameter], path: Path) -> dict[str, Any]:
    """Install the checkpoint that `find_checkpoint` returned and return its training state.

    The engine is fresh; it may have another world size, ZeRO stage and offload than the one that
    saved. Each rank reads the ranges that it owns. DataError, on all ranks and before any weight
    has changed, when the checkpoint is of another model.
    """
    model = engine.module.model
    reader = _agree(lambda: _matching_reader(path, parameters, model))
    zero_state.create_optimizer_state(engine, reader.manifest.optimizer_steps)

    def install() -> None:
        for kind in KINDS:
            zero_state.copy_state(engine, parameters, kind, partial(reader.read, kind))
        zero_state.fill_frozen(engine, parameters, reader.read_frozen)
        for name, buffer in persistent_buffers(model).items():
            buffer.copy_(reader.read_frozen(name, 0, buffer.numel()).view(buffer.shape))

    _agree(install)
    zero_state.refresh_weights(engine)
    engine.global_steps = reader.manifest.step
    return reader.state()


def _matching_reader(path: Path, parameters: Mapping[str, Parameter], model: Module) -> CheckpointReader:
    reader = CheckpointReader(path)
    frozen = zero_state.frozen_parameters(parameters)
    here = {name: zero_state.full_shape(parameter) for name, parameter in parameters.items()}
    here |= {name: tuple(buffer.shape) for name, buffer in persistent_buffers(model).items()}
    there = reader.manifest.shapes | {name: reader.frozen_shape(name)[0] for name in reader.manifest.frozen}
    for name in here.keys() | there.keys():
        if here.get(name) != there.get(name):
            raise DataError(
                f"{path}: of another model: {name} has shape {there.get(name)} there and {here.get(name)} here"
            )
    changed = sorted(name for name in parameters if (name in frozen) != (name in reader.manifest.frozen))
    if changed:
        raise DataError(f"{path}: {changed[0]} is frozen in one and trained in the other; start a new run folder")
    return reader


def prune_checkpoints(run_dir: Path, keep: int, protect: Iterable[Path] = ()) -> None:
    """Remove all but the newest `keep` checkpoints, those in `protect`, and the best one.

    Checkpoints newer than the last committed one were refused at a resume; they neither count nor go.
    """
    protected = {path.name for path in protect}

    def prune() -> None:
        folder = run_dir / "checkpoints"
        best = best_checkpoint(run_dir)
        latest = folder / "latest"
        last_step = step_of(latest.read_text().strip()) if latest.is_file() else None
        committed = [path for path in list_checkpoints(run_dir) if last_step is None or step_of(path.name) <= last_step]
        for path in committed[: max(0, len(committed) - keep)]:
            if path.name not in protected and path != best:
                # Under another name first: half a checkpoint must not look like one.
                renamed = path.rename(path.with_name(f".tmp-pruned-{path.name}"))
                try:
                    shutil.rmtree(renamed)
                except OSError as error:  # the next save tries again; a good commit must not end the run
                    _LOG.warning("%s cannot be removed yet: %s", renamed, error)

    _from_rank_0(prune)


def mark_best(run_dir: Path, path: Path, metric: str, value: float) -> None:
    """Remember `path` as the checkpoint with the best `metric` so far."""
    text = json.dumps({"checkpoint": path.name, "metric": metric, "value": value}) + "\n"
    _from_rank_0(lambda: _replace_text(run_dir / "checkpoints" / "best.json", text))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_json(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, as JSON carries it: no pickle between ranks."""
    text = json.dumps(value).encode()
    if _world_size() == 1:
        return [json.loads(text)]
    on_cpu = "cpu:" in str(dist.get_backend_config())
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(_world_size())]
    dist.all_gather(sizes, torch.tensor([len(text)], device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8).to(device)
    texts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(gathered.cpu().numpy())) for gathered in texts]


def _agree(action: Callable[[], Result]) -> Result:
    """Run `action` on this rank; if it failed on any rank, all raise what the first of those raised."""
    failure: FulltuneError | None = None
    try:
        result = action()
    except FulltuneError as error:
        failure = error
    except OSError as error:
        failure = StorageError(f"rank {_rank()}: {error.filename}: {error.strerror}; earlier checkpoints are untouched")
    for report in all_gather_json([type(failure).__name__, str(failure)] if failure else None):
        if report:
            raise getattr(errors, report[0], FulltuneError)(report[1]) from failure
    return result


def _from_rank_0(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 and hand its result (JSON) to all ranks; what it raises, all raise."""
    result: Result = all_gather_json(_agree(lambda: action() if _rank() == 0 else None))[0]
    return result
