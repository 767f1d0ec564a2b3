"""The checkpoint's format: what lies in its folder, and how it is checked and read. One process suffices.

A checkpoint is a folder ``run_dir/checkpoints/step-00000020`` with, from every rank that wrote it,
one safetensors file of 1-D fp32 slices (masters and both moments), once the frozen parameters and
persistent buffers, the training state as JSON, and a manifest: which elements lie where, and the
hash of every block. Padding is never stored, and nothing in it can run.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor

from engine.errors import DataError
from engine.safetensors_file import (
    BLOCK_BYTES,
    FileRecord,
    check_size,
    read_file,
    read_header,
    read_range,
    verify_blocks,
)

Kind = Literal["master", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("master", "exp_avg", "exp_avg_sq")
FORMAT = "fulltune-checkpoint-1"
FROZEN = "frozen.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
_FOLDER_NAME = re.compile(r"step-(\d{8,})")
_FILE_NAME = re.compile(r"[a-z][a-z0-9-]*\.(?:safetensors|json)")
_MAX_JSON_BYTES = 2**30


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    `slices` gives for each file its (parameter, start, stop); tensors in it are called
    ``master/<parameter>`` and so on. `frozen` are the names in the frozen file.
    """

    step: int
    optimizer_steps: int
    architecture: str
    shapes: dict[str, tuple[int, ...]]
    slices: dict[str, list[tuple[str, int, int]]]
    frozen: list[str]
    files: dict[str, FileRecord]


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first, not verified. Any one process may call it."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(
        (path for path in folder.iterdir() if _FOLDER_NAME.fullmatch(path.name)), key=lambda path: step_of(path.name)
    )


def step_of(name: str) -> int:
    """The step in a checkpoint folder's name; -1 for any other name."""
    match = _FOLDER_NAME.fullmatch(name)
    return int(match[1]) if match else -1


def best_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that `mark_best` named last, if it is there. Any one process may call it."""
    path = run_dir / "checkpoints" / "best.json"
    try:
        name = json.loads(read_file(path, _MAX_JSON_BYTES))["checkpoint"]
    except (DataError, ValueError, KeyError, TypeError):
        return None
    known = isinstance(name, str) and _FOLDER_NAME.fullmatch(name) and (path.parent / name).is_dir()
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
    return parse_manifest(read_file(path / MANIFEST, _MAX_JSON_BYTES).decode("utf-8", "replace"), path)


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
            fields["architecture"],
            {name: tuple(shape) for name, shape in fields["parameters"].items()},
            {file: [(name, start, stop) for name, start, stop in rows] for file, rows in fields["slices"].items()},
            fields["frozen"],
            {name: FileRecord(name, size, tuple(blocks)) for name, (size, blocks) in fields["files"].items()},
        )
        _check_complete(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path / MANIFEST}: not a sound manifest: {error}") from None
    if manifest.step != step_of(path.name):
        raise DataError(f"{path / MANIFEST}: belongs to step {manifest.step}")
    return manifest


def _check_complete(manifest: Manifest) -> None:
    """ValueError unless the slices cover each element once and every file that is named is recorded."""
    needed = {*manifest.slices, STATE, *([FROZEN] if manifest.frozen else [])}
    if needed != set(manifest.files) or not all(_FILE_NAME.fullmatch(name) for name in needed):
        raise ValueError("its files are not those that its index needs")
    if any(len(record.blocks) != -(-record.size_bytes // BLOCK_BYTES) for record in manifest.files.values()):
        raise ValueError("it has not one hash for each block")
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest.shapes}
    for rows in manifest.slices.values():
        for name, start, stop in rows:
            ranges[name].append((start, stop))
    for name, shape in manifest.shapes.items():
        position = 0
        for start, stop in sorted(ranges[name]):
            if start != position or stop <= start:
                raise ValueError(f"{name}: elements from {position} on are missing or stored twice")
            position = stop
        if position != math.prod(shape):
            raise ValueError(f"{name}: elements from {position} on are missing")


def seal(fields: dict[str, Any]) -> str:
    """The manifest's text: canonical JSON with the hash of the same without that hash."""
    digest = xxhash.xxh3_128(_canonical(fields).encode()).hexdigest()
    return _canonical({**fields, "xxh3_128": digest})


def _canonical(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


class CheckpointReader:
    """Reads ranges of a checkpoint's parameters, whichever ranks wrote them. Any process may use it.

    DataError where a file's tensors are not those that the manifest names.
    """

    def __init__(self, path: Path):
        self.path = path
        self.manifest = read_manifest(path)
        for name, record in self.manifest.files.items():
            check_size(path / name, record)
        self._headers = {name: read_header(path / name) for name in self.manifest.files if name != STATE}
        self._slices: dict[str, list[tuple[int, int, str]]] = {name: [] for name in self.manifest.shapes}
        for file, rows in self.manifest.slices.items():
            for name, start, stop in rows:
                self._slices[name].append((start, stop, file))
                for kind in KINDS:
                    entry = self._headers[file].get(f"{kind}/{name}")
                    if entry is None or entry.shape != (stop - start,) or entry.dtype != torch.float32:
                        raise DataError(f"{path / file}: {kind}/{name} is not the slice that the manifest names")
        if set(self._headers.get(FROZEN, ())) != set(self.manifest.frozen):
            raise DataError(f"{path / FROZEN}: its tensors are not those that the manifest names")

    def read(self, kind: Kind, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened state, 1-D fp32 on the CPU."""
        values = torch.empty(stop - start)
        for first, last, file in self._slices[name]:
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                entry = self._headers[file][f"{kind}/{name}"]
                values[begin - start : end - start] = read_range(self.path / file, entry, begin - first, end - first)
        return values

    def verify_weights(self) -> None:
        """DataError unless the blocks that hold masters, frozen parameters and buffers are as written."""
        for name, header in self._headers.items():
            ends = [entry.end for tensor, entry in header.items() if name == FROZEN or tensor.startswith("master/")]
            verify_blocks(self.path / name, self.manifest.files[name], range(-(-max(ends, default=1) // BLOCK_BYTES)))

    def frozen_shape(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of a frozen parameter or buffer."""
        entry = self._headers[FROZEN][name]
        return entry.shape, entry.dtype

    def read_frozen(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened frozen parameter or buffer, 1-D, in the type it was saved in."""
        return read_range(self.path / FROZEN, self._headers[FROZEN][name], start, stop)

    def state(self) -> dict[str, Any]:
        """The training state that was given to `save_checkpoint`."""
        try:
            state = json.loads(read_file(self.path / STATE, _MAX_JSON_BYTES))
        except ValueError as error:
            raise DataError(f"{self.path / STATE}: not a training state: {error}") from None
        return dict(state)
