"""Taking a checkpoint up again: the newest that holds what was written, at any world size, bit by bit.

Each rank reads the ranges that it owns straight into the live state, and compares every block it
reads with its hash on the way, so that the bytes are read once. All ranks call every function here.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from engine.arithmetic import list_checkpoints
from engine.checkpoint.format import verify_checkpoint
from engine.checkpoint.reader import CheckpointReader
from engine.checkpoint.save import finish_replacing
from engine.errors import DataError
from engine.ranks.agreement import agree, from_rank_0, num_ranks, this_rank
from engine.tensor_files.range_reader import ReadRequest
from engine.tensor_files.slices import KINDS
from engine.zero.zero_model import ZeroModel

_LOG = logging.getLogger(__name__)


def restore_newest(
    zero: ZeroModel,
    run_dir: Path,
    run_id: str,
    accept: Callable[[CheckpointReader, dict[str, Any]], None],
) -> dict[str, Any] | None:
    """Install the newest sound checkpoint of `run_dir` and return its training state; None when there is none.

    What is damaged, of another model or of another run than `run_id` (as rank 0 gives it) is refused
    with a warning and the one before it is taken. DataError when all are refused: a run never
    starts over silently. `accept(reader, state)` may raise for a checkpoint of this run that must
    not be continued as things stand; that ends the search. The engine is fresh.
    """
    names = from_rank_0(lambda: _names(run_dir))
    refused: list[str] = []
    for name in reversed(names):
        path = run_dir / "checkpoints" / name
        try:
            reader, state = agree(partial(_open, path))
            from_rank_0(partial(_check_run, reader, run_id))
        except DataError as error:
            _refuse(refused, error)
            continue
        agree(partial(accept, reader, state))
        try:
            agree(partial(_check_model, reader, zero))
            _install(zero, reader)
        except DataError as error:
            _refuse(refused, error)
            continue
        if refused and this_rank() == 0:
            _LOG.warning("using the older checkpoint %s", path)
        return state
    _stop_if_all(refused, run_dir)
    return None


def find_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint whose every byte is what was written; None when the run has none.

    The ranks share the reading and come to one answer; refusals are as in `restore_newest`.
    """
    names = from_rank_0(lambda: _names(run_dir))
    refused: list[str] = []
    for name in reversed(names):
        path = run_dir / "checkpoints" / name
        try:
            agree(partial(verify_checkpoint, path, this_rank(), num_ranks()))
        except DataError as error:
            _refuse(refused, error)
            continue
        if refused and this_rank() == 0:
            _LOG.warning("using the older checkpoint %s", path)
        return path
    _stop_if_all(refused, run_dir)
    return None


def load_checkpoint(zero: ZeroModel, path: Path) -> dict[str, Any]:
    """Install the checkpoint at `path` and return its training state.

    The engine is fresh; it may have another world size, ZeRO stage and offload than the one that
    saved. DataError, on all ranks and before any weight that the model computes with has changed,
    when the checkpoint is damaged or of another model.
    """
    reader, state = agree(partial(_open, path))
    agree(partial(_check_model, reader, zero))
    _install(zero, reader)
    return state


def _names(run_dir: Path) -> list[str]:
    finish_replacing(run_dir / "checkpoints")
    return [path.name for path in list_checkpoints(run_dir)]


def _open(path: Path) -> tuple[CheckpointReader, dict[str, Any]]:
    reader = CheckpointReader(path)
    reader.check_no_extra_files()
    reader.verify_rest(this_rank(), num_ranks())
    return reader, reader.state()


def _check_run(reader: CheckpointReader, run_id: str) -> None:
    if reader.manifest.run_id != run_id:
        raise DataError(
            f"{reader.path}: belongs to another run ({reader.manifest.run_id}, this one is {run_id}); to start from "
            "its weights, export it and name the folder as model.path"
        )


def _refuse(refused: list[str], error: DataError) -> None:
    refused.append(str(error))
    if this_rank() == 0:
        _LOG.warning("checkpoint refused: %s", error)


def _stop_if_all(refused: list[str], run_dir: Path) -> None:
    if refused:
        raise DataError(f"{run_dir}: no checkpoint can be used ({'; '.join(refused)}); --fresh starts over")


def _install(zero: ZeroModel, reader: CheckpointReader) -> None:
    """Fill the live state; the weights that the model computes with change when all ranks are content."""
    zero.create_optimizer_state(reader.manifest.optimizer_steps)
    zero.clear_padding()
    zero.keep_wide({name: entry.dtype for name, entry in reader.manifest.frozen.items()})
    buffers = zero.buffers
    flat = {name: buffer.detach().clone().view(-1) for name, buffer in buffers.items()}

    def requests() -> Iterator[ReadRequest]:
        for kind in KINDS:
            for part in zero.live_state(kind):
                yield from reader.requests(f"{kind}/{part.name}", part.start, part.values)
        for part in zero.frozen_to_fill():
            yield from reader.requests(f"frozen/{part.name}", part.start, part.values)
        for name, values in flat.items():
            yield from reader.requests(f"buffer/{name}", 0, values)

    agree(lambda: reader.read_into(requests()))
    for name, buffer in buffers.items():
        buffer.copy_(flat[name].view(buffer.shape))
    zero.refresh_weights()
    zero.engine.global_steps = reader.manifest.step


def _check_model(reader: CheckpointReader, zero: ZeroModel) -> None:
    """DataError unless the checkpoint is of this model, with the same parameters frozen. No communication."""
    path, manifest, frozen = reader.path, reader.manifest, zero.frozen
    here = zero.shapes | {name: tuple(buffer.shape) for name, buffer in zero.buffers.items()}
    there = {name: entry.shape for name, entry in reader.weights.items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise DataError(
                f"{path}: of another model: {name} has shape {there.get(name)} there and {here.get(name)} here"
            )
    changed = sorted(name for name in zero.parameters if (name in frozen) != (name in manifest.frozen))
    if changed:
        there_or_here = "there and trained here" if changed[0] in manifest.frozen else "here and trained there"
        raise DataError(
            f"{path}: {changed[0]} is frozen {there_or_here}: restore model.freeze, or start from an export of it in "
            "another run_dir"
        )
