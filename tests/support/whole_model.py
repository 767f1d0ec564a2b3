"""A model with all its values in one process: what the ranks of a job hold together."""

from typing import Any

import torch

from engine.model.build import StoreFacts, build_model, fitting_task
from engine.model.starting_weights import StartingWeights, exchange_parameters
from engine.sections import ModelSection
from engine.tasks import TASKS
from engine.tensor_files.slices import LiveSlice
from engine.zero.zero_model import persistent_buffers


def whole_model(section: ModelSection, task: str, facts: StoreFacts, seed: int) -> Any:
    """What `build_model` describes, filled; stored weights keep the type of their file."""
    fitting = fitting_task(section, TASKS[task], facts, one_document_a_row=False)
    return fill(*build_model(section, fitting, facts, seed))


def fill(model: Any, weights: StartingWeights) -> Any:
    types = {name: tensors[0].dtype for name, tensors in weights.stored.items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def exchange(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        dtype = types.get(names[id(parameter)], torch.float32)
        return torch.nn.Parameter(torch.full(parameter.shape, torch.nan, dtype=dtype), parameter.requires_grad)

    exchange_parameters(model, exchange)
    pieces = [LiveSlice(name, 0, p.numel(), p.detach().view(-1)) for name, p in model.named_parameters()]
    buffers = [LiveSlice(n, 0, b.numel(), b.view(-1)) for n, b in persistent_buffers(model).items() if n in types]
    weights.read_into([*pieces, *buffers])
    weights.check_copies(pieces)
    return model
