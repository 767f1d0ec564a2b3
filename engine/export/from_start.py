"""The starting weights of a run as a Hugging Face folder: of a run that has no checkpoint yet. One process, no GPU."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data_prep.token_store import TokenStore
from engine.config import RunConfig
from engine.errors import DataError
from engine.export.card import model_card
from engine.export.folder import check_free, empty_model, model_shapes, read_config, weight_dtype
from engine.export.from_checkpoint import write_export
from engine.export.taught import taught_by
from engine.model.build import StoreFacts, build_model, fitting_task, model_folder
from engine.model.model_folder import write_model_folder
from engine.model.starting_weights import StartingWeights
from engine.tensor_files.slices import LiveSlice
from engine.tensor_files.writer import TensorSource
from engine.zero.zero_model import persistent_buffers


def export_start(config: RunConfig, store: TokenStore, out_dir: Path, dtype: str, max_shard_bytes: int) -> None:
    """Write what the run starts from as a folder that `from_pretrained` loads alone.

    A tensor at a time is in memory; fresh weights are whole. Raises as `build_model` and `export_checkpoint` do.
    """
    weight_dtype(dtype)
    check_free(out_dir)
    facts = StoreFacts.of(store)
    task = fitting_task(config.model, config.trained_task.on(store), facts, config.data.one_document_a_row)
    model, weights = build_model(config.model, task, facts, config.seed)
    sources = {name: _source(weights, name, shape) for name, shape in model_shapes(model).items()}
    held = persistent_buffers(model)
    sources |= {name: _of_buffer(weights, name, held[name]) for name in sources.keys() & held.keys()}
    card = model_card(config.run_dir, config.model_dump(mode="json"), None, store.manifest)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model_folder(model, model_folder(config.model), folder)
        values, hf_config = read_config(folder)
        empty = empty_model(hf_config, type(model).__name__, folder)
        if {name: source.shape for name, source in sources.items()} != model_shapes(empty):
            raise DataError(f"{config.run_dir}: the starting model is not what its own config.json describes")
        write_export(
            out_dir, empty, sources, values, folder, store.tokenizer_dir, dtype, max_shard_bytes, card,
            taught_by(store, task),
        )  # fmt: skip


def _source(weights: StartingWeights, name: str, shape: tuple[int, ...]) -> TensorSource:
    """A parameter in fp32, as the masters of a run hold it."""

    def chunks() -> Iterator[Tensor]:
        values = torch.empty(shape).view(-1)
        weights.read_into([LiveSlice(name, 0, len(values), values)])
        yield values

    return TensorSource(name, torch.float32, shape, chunks)


def _of_buffer(weights: StartingWeights, name: str, buffer: Tensor) -> TensorSource:
    """A buffer in its own type, from the files where they have it."""
    if name in weights.stored:
        weights.read_into([LiveSlice(name, 0, buffer.numel(), buffer.view(-1))])
    return TensorSource(name, buffer.dtype, tuple(buffer.shape), partial(_chunk, buffer))


def _chunk(buffer: Tensor) -> Iterator[Tensor]:
    yield buffer.detach().reshape(-1)
