"""A whole model of a Hugging Face folder on one device, with the loss of its task."""

import torch
from torch import nn

from data_prep.token_store import Rows, TokenStore
from engine.errors import ConfigError, DataError
from engine.finding import warning_lines
from engine.fit.model_facts import ModelFacts
from engine.fit.positions import check_positions
from engine.model.build import StoreFacts, build_model, fitting_task, say
from engine.model.positions import positions_of
from engine.model.starting_weights import StartingWeights, exchange_parameters
from engine.model.task_model import TaskModel, label_numbers
from engine.sections import ModelSection
from engine.tasks.task import Task
from engine.tensor_files.slices import LiveSlice


def load_model(
    folder: str, task: Task, one_document_a_row: bool, store: TokenStore, rows: Rows, device: torch.device
) -> TaskModel:
    """The model in evaluation mode, in the type of its files. It is built as for training, so it computes the same.

    DataError for a folder that does not fit the store, or without weights of a head for the task.
    """
    section = ModelSection(path=folder, activation_checkpointing=False)
    facts = StoreFacts.of(store)
    task = fitting_task(section, task, facts, one_document_a_row)
    model, weights = build_model(section, task, facts, seed=0)
    if weights.whole:
        raise DataError(
            f"{folder}: has no trained weights for task {task.name} and the labels of these records "
            f"({', '.join(sorted(weights.whole)[:3])}): give the folder that training has exported"
        )
    vocab_size: int = model.get_input_embeddings().weight.shape[0]
    finding = check_positions(ModelFacts(folder, vocab_size, positions_of(model)), ((store, rows),))
    if finding.verdict == "error":
        raise ConfigError(finding.text)
    say(warning_lines(finding))
    if store.pad_id >= vocab_size:
        store.pad_id = 0  # padding is never looked at, but must have a row
    _fill(model, weights)
    return TaskModel(model, task, label_numbers(model, store.label_names)).to(device).eval()


def _fill(model: nn.Module, weights: StartingWeights) -> None:
    """Give every parameter and stored buffer memory and its value."""

    def exchange(parameter: nn.Parameter) -> nn.Parameter:
        dtype = torch.bfloat16 if parameter.dtype == torch.bfloat16 else torch.float32
        new = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)
        new.__dict__.update(parameter.__dict__)
        return new

    exchange_parameters(model, exchange)
    pieces = [
        LiveSlice(name, 0, parameter.numel(), parameter.data.view(-1)) for name, parameter in model.named_parameters()
    ]
    is_wide = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if buffer.is_floating_point() and is_wide:
                module._buffers[name] = buffer.float()
    stored = {name: buffer for name, buffer in model.named_buffers() if name in weights.stored}
    flat = {name: buffer.detach().clone().view(-1) for name, buffer in stored.items()}
    pieces += [LiveSlice(name, 0, len(values), values) for name, values in flat.items()]
    weights.read_into(pieces)
    for name, buffer in stored.items():
        buffer.copy_(flat[name].view(buffer.shape))
