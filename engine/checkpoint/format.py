"""The checkpoint's format: what lies in its folder and how it is checked. One process suffices.

A checkpoint is a folder ``run_dir/checkpoints/step-00000020`` with, from every rank that wrote it,
one safetensors file of 1-D slices (fp32 masters and both moments; frozen parameters and persistent
buffers in their own types), the training state as JSON, and a manifest: which elements lie where,
and the hash of every block. Padding is never stored, and nothing in it can run.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from engine.arithmetic import list_checkpoints, step_of
from engine.errors import DataError
from engine.tensor_files.reader import BLOCK_BYTES, TENSOR_TYPES, FileRecord, read_file, verify_blocks
from engine.tensor_files.slices import KINDS

FORMAT = "fulltune-checkpoint-2"
STATE = "state.json"
MANIFEST = "manifest.json"
_FILE_NAME = re.compile(r"[a-z][a-z0-9-]*\.(?:safetensors|json)")
MAX_JSON_BYTES = 2**30
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TENSOR_TYPES}


@dataclass(frozen=True)
class WeightEntry:
    """A whole weight of the model: the type it is stored in and its shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    `slices` gives for each file its (weight, start, stop) of flattened weights. Tensors in it are
    called ``master/<name>``, ``exp_avg/<name>`` and ``exp_avg_sq/<name>`` for a trained parameter,
    ``frozen/<name>`` and ``buffer/<name>`` for the others.
    """

    step: int
    optimizer_steps: int
    run_id: str
    architecture: str
    trained: dict[str, WeightEntry]
    frozen: dict[str, WeightEntry]
    buffers: dict[str, WeightEntry]
    slices: dict[str, list[tuple[str, int, int]]]
    files: dict[str, FileRecord]

    @property
    def weights(self) -> dict[str, WeightEntry]:
        """All that makes up the model, trained parameters as their fp32 masters."""
        return self.trained | self.frozen | self.buffers

    def tensors_of(self, name: str) -> tuple[str, ...]:
        """The names under which a slice of the weight `name` lies in its file."""
        if name in self.trained:
            return tuple(f"{kind}/{name}" for kind in KINDS)
        return (f"frozen/{name}" if name in self.frozen else f"buffer/{name}",)


def known_run_id(run_dir: Path) -> str:
    """The run that the newest sound manifest names; "" when there is none. Any one process may call it."""
    for path in reversed(list_checkpoints(run_dir)):
        try:
            return read_manifest(path).run_id
        except DataError:
            continue
    return ""


def best_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that `mark_best` named last, if it is there. Any one process may call it."""
    path = run_dir / "checkpoints" / "best.json"
    try:
        name = json.loads(read_file(path, MAX_JSON_BYTES))["checkpoint"]
    except (DataError, ValueError, KeyError, TypeError):
        return None
    known = isinstance(name, str) and step_of(name) >= 0 and (path.parent / name).is_dir()
    return path.parent / name if known else None


def verify_checkpoint(path: Path, share: int = 0, shares: int = 1) -> Manifest:
    """Check a checkpoint against its manifest, reading every `shares`-th part. Any process may call it.

    Raises DataError naming the first file that is missing, extra, of another size or damaged.
    """
    manifest = read_manifest(path)
    listed = {MANIFEST, *manifest.files}
    extra = sorted(entry.name for entry in path.iterdir() if entry.name not in listed and entry.name[0] != ".")
    if extra:
        raise DataError(f"{path / extra[0]}: does not belong to this checkpoint")
    for name, record in manifest.files.items():
        count = len(record.blocks)
        verify_blocks(path / name, record, range(count * share // shares, count * (share + 1) // shares))
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint folder `path`, checked in itself. DataError when it is not sound."""
    return parse_manifest(read_file(path / MANIFEST, MAX_JSON_BYTES).decode("utf-8", "replace"), path)


def parse_manifest(text: str, path: Path) -> Manifest:
    """The manifest in `text`, said to belong to the folder `path`. DataError when it is not sound."""
    try:
        fields = json.loads(text)
        if fields["format"] != FORMAT or fields["block_bytes"] != BLOCK_BYTES:
            raise ValueError(f"it is in another format than {FORMAT}")
        if text != seal({key: value for key, value in fields.items() if key != "xxh3_128"}):
            raise ValueError("it is damaged")
        manifest = Manifest(
            fields["step"],
            fields["optimizer_steps"],
            fields["run_id"],
            fields["architecture"],
            _entries(fields["trained"]),
            _entries(fields["frozen"]),
            _entries(fields["buffers"]),
            {file: [(name, start, stop) for name, start, stop in rows] for file, rows in fields["slices"].items()},
            {name: FileRecord(name, size, tuple(blocks)) for name, (size, blocks) in fields["files"].items()},
        )
        _check_complete(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path / MANIFEST}: not a sound manifest: {error}") from None
    if manifest.step != step_of(path.name):
        raise DataError(f"{path / MANIFEST}: belongs to step {manifest.step}")
    return manifest


def _entries(values: dict[str, Any]) -> dict[str, WeightEntry]:
    return {name: WeightEntry(_DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in values.items()}


def describe(dtype: torch.dtype, shape: tuple[int, ...]) -> list[Any]:
    """A weight as the manifest holds it."""
    return [str(dtype).removeprefix("torch."), list(shape)]


def _check_complete(manifest: Manifest) -> None:
    """ValueError unless the slices cover each element once and every file that is named is recorded."""
    needed = {*manifest.slices, STATE}
    if needed != set(manifest.files) or not all(_FILE_NAME.fullmatch(name) for name in needed):
        raise ValueError("its files are not those that its index needs")
    if any(len(record.blocks) != -(-record.size_bytes // BLOCK_BYTES) for record in manifest.files.values()):
        raise ValueError("it has not one hash for each block")
    weights = manifest.weights
    if len(weights) != len(manifest.trained) + len(manifest.frozen) + len(manifest.buffers):
        raise ValueError("one weight is of two kinds")
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in weights}
    for rows in manifest.slices.values():
        for name, start, stop in rows:
            ranges[name].append((start, stop))
    for name, entry in weights.items():
        position = 0
        for start, stop in sorted(ranges[name]):
            if start != position or stop <= start:
                raise ValueError(f"{name}: elements from {position} on are missing or stored twice")
            position = stop
        if position != math.prod(entry.shape):
            raise ValueError(f"{name}: elements from {position} on are missing")


def seal(fields: dict[str, Any]) -> str:
    """The manifest's text: canonical JSON with the hash of the same without that hash."""
    digest = xxhash.xxh3_128(_canonical(fields).encode()).hexdigest()
    return _canonical({**fields, "xxh3_128": digest})


def _canonical(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))
