"""One process of benchmarks/state.py that needs no ranks: inputs, exports, DeepSpeed's own conversion, seeking.

python benchmarks/state_process.py PHASE '{"work": ..., ...}'
"""

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from state_measure import Meter, folder_bytes, without_fsync, write_report

Arguments = dict[str, Any]


def phase_model(arguments: Arguments) -> dict[str, Any]:
    """A folder as on the Hub: random bf16 weights in sharded safetensors with an index."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from engine.tensor_files.writer import TensorSource, write_safetensors

    folder = Path(arguments["model"])
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(**arguments["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    pool = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(1)) * 0.02).to(torch.bfloat16)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shards: list[list[TensorSource]] = [[]]
    size = 0
    for number, (name, shape) in enumerate(shapes.items()):
        count = torch.Size(shape).numel()
        if size + 2 * count > arguments["shard_bytes"] and shards[-1]:
            shards.append([])
            size = 0
        size += 2 * count
        shards[-1].append(TensorSource(name, torch.bfloat16, shape, partial(_tiles, pool.roll(number), count)))
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, shard)
    where = {source.name: file for file, shard in zip(files, shards, strict=True) for source in shard}
    counts = [torch.Size(shape).numel() for shape in shapes.values()]
    index = {"metadata": {"total_size": 2 * sum(counts)}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    return {"parameters": sum(counts), "model_bytes": 2 * sum(counts), "largest_tensor_bytes": 2 * max(counts)}


def _tiles(pool: Any, count: int) -> Iterator[Any]:
    for start in range(0, count, len(pool)):
        yield pool[: min(len(pool), count - start)]


def phase_export(arguments: Arguments) -> dict[str, Any]:
    """A checkpoint as a Hugging Face folder in fp32, as `fulltune export` writes it; also without parts of the work.

    The first time gives the memory, what is imported on the way included; the others the time.
    """
    from engine.export.from_checkpoint import export_checkpoint

    checkpoint, model_dir, out = Path(arguments["checkpoint"]), Path(arguments["model_dir"]), Path(arguments["out"])

    def export(without: Callable[[], AbstractContextManager[None]]) -> Meter:
        shutil.rmtree(out, ignore_errors=True)
        with without(), Meter() as meter:
            export_checkpoint(checkpoint, model_dir, None, out, "float32")
        return meter

    first = export(nullcontext)
    whole, unsynced, unverified = [], [], []
    for _ in range(arguments["rounds"]):
        unsynced.append(export(without_fsync).seconds)
        unverified.append(export(without_verification).seconds)
        whole.append(export(nullcontext))
    return {
        "seconds": statistics.median(meter.seconds for meter in whole),
        "cpu_seconds": statistics.median(meter.cpu_seconds for meter in whole),
        "unsynced_seconds": statistics.median(unsynced),
        "unverified_seconds": statistics.median(unverified),
        "peak_mb": first.report()["peak_mb"],
        "later_peak_mb": max(meter.report()["peak_mb"] for meter in whole),
        "out_bytes": folder_bytes(out),
    }


@contextmanager
def without_verification() -> Iterator[None]:
    """Neither the checkpoint's hashes are compared, nor is what was written read back and computed with."""
    import engine.export.folder
    import engine.export.from_checkpoint
    from engine.checkpoint.reader import CheckpointReader
    from engine.tensor_files.range_reader import read_ranges

    replaced: list[tuple[Any, str, Any]] = [
        (CheckpointReader, "read_into", lambda _self, wanted: read_ranges(wanted)),
        (CheckpointReader, "verify_rest", lambda *_: None),
        (engine.export.folder, "_read_back", lambda *_: None),
        (engine.export.from_checkpoint, "check_forward", lambda *_: None),
    ]
    real = [getattr(owner, name) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(replaced, real, strict=True):
            setattr(owner, name, value)


def phase_zero_to_fp32(arguments: Arguments) -> dict[str, Any]:
    """DeepSpeed's own conversion of its own checkpoint of the same state; then until its files are on the disk.

    As for the exports, the first one gives the memory, later ones the time.
    """
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    out = Path(arguments["out"])
    meters, unsynced = [], []
    for _ in range(arguments["rounds"] + 1):
        shutil.rmtree(out, ignore_errors=True)
        with Meter() as meter:
            convert_zero_checkpoint_to_fp32_state_dict(arguments["checkpoint"], str(out), safe_serialization=True)
            unsynced.append(meter.elapsed())
            for path in out.iterdir():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        meters.append(meter)
    return {
        "seconds": statistics.median(meter.seconds for meter in meters[1:]),
        "cpu_seconds": statistics.median(meter.cpu_seconds for meter in meters[1:]),
        "unsynced_seconds": statistics.median(unsynced[1:]),
        "peak_mb": meters[0].report()["peak_mb"],
        "out_bytes": folder_bytes(out),
    }


@dataclass(frozen=True)
class Source:
    """Rows of one source, as engine.batches wants them."""

    name: str
    first_row: int
    num_rows: int
    rows_per_epoch: int


@dataclass(frozen=True)
class Index:
    """A row index in memory, as engine.batches wants it."""

    documents: Any
    starts: Any
    lengths: Any
    row_ends: Any
    sources: tuple[Source, ...]


def phase_seek(arguments: Arguments) -> dict[str, Any]:
    """Which rows and micro-batches the step at any place of a store of 10^9 tokens has."""
    import numpy as np

    from engine.micro_batches import MicroBatches, split_rows
    from engine.row_stream import stream_rows

    row_tokens, tokens = 2048, arguments["tokens"]
    num_rows, per_row = tokens // row_tokens, 8
    count = num_rows * per_row
    lengths = np.full(count, row_tokens // per_row, dtype=np.uint32)
    ends = np.arange(1, num_rows + 1, dtype=np.uint64) * np.uint64(per_row)
    sources = (Source("all", 0, num_rows, num_rows),)
    index = Index(np.arange(count, dtype=np.uint32), np.zeros(count, dtype=np.uint32), lengths, ends, sources)
    seconds = []
    for epoch in (0, 1, 7):
        for position in np.random.default_rng(epoch).integers(0, num_rows, 20):
            started = time.perf_counter()
            rows = stream_rows(epoch * num_rows + int(position), 512, sources, seed=17)
            split_rows(index, rows, 8, MicroBatches(4))
            seconds.append(time.perf_counter() - started)
    return {"seconds": max(seconds), "tokens": tokens}


PHASES = {
    "model": phase_model,
    "export": phase_export,
    "zero_to_fp32": phase_zero_to_fp32,
    "seek": phase_seek,
}


def main() -> None:
    """Run one phase and report."""
    arguments = json.loads(sys.argv[2])
    write_report(arguments, 0, PHASES[sys.argv[1]](arguments))


if __name__ == "__main__":
    main()
