"""Which stored tensor becomes which weight of a model, by transformers' own rules for names and layouts.

Most stored tensors only need another name, or none: their bytes are the weight's. Some families
store in pieces what the model holds as one tensor (the experts of a mixture). Where the pieces lie
in it one after the other, their bytes are the weight's, too; transformers' own converters make the
rest.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from engine.errors import DataError
from engine.model.model_files import FileTensor, check_types


@dataclass
class Conversion:
    """Weights `targets` that transformers' `converter` makes of the stored tensors `sources`, in this order."""

    first_target: str
    converter: Any
    sources: list[tuple[str, FileTensor]] = field(default_factory=list)  # (pattern of the converter, tensor)
    targets: dict[str, str] = field(default_factory=dict)  # name it is made under, to the weight's own

    def convert(self, model: Any, load: Callable[[FileTensor], Tensor]) -> dict[str, Tensor]:
        """The targets, whole, from what `load` gives for each source; DataError when they do not fit together."""
        converter = deepcopy(self.converter)
        for pattern, source in self.sources:
            tensor = load(source)
            converter.add_tensor(self.first_target, source.name, pattern, lambda tensor=tensor: tensor)
        try:
            made = converter.convert(self.first_target, model=model, config=model.config)
        except Exception as error:
            # Its operations are many, and raise whatever torch does for pieces that do not fit.
            reason = " ".join(str(error).split())
            raise DataError(f"{self.sources[0][1]}: {self.first_target} cannot be made of it: {reason}") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def pieces(self) -> list[FileTensor] | None:
        """The sources in the order in which their elements make up the only target; None for any other layout."""
        lists: dict[str, list[FileTensor]] = {pattern: [] for pattern in self.converter.source_patterns}
        for pattern, source in self.sources:
            lists[pattern].append(source)
        present = [sources for sources in lists.values() if sources]
        operations = [(type(operation), getattr(operation, "dim", None)) for operation in self.converter.operations]
        if len(self.targets) != 1:
            return None
        if operations == [(MergeModulelist, 0), (Concatenate, 1)]:  # expert by expert, in each pattern by pattern
            return [source for expert in zip(*present, strict=True) for source in expert]
        if operations in ([(MergeModulelist, 0)], [(Concatenate, 0)]):
            return [source for sources in present for source in sources]
        return None

    @property
    def source_type(self) -> torch.dtype:
        """The type that all sources are read in: their own if they agree."""
        types = {source.dtype for _, source in self.sources}
        return types.pop() if len(types) == 1 else torch.float32


@dataclass(frozen=True)
class NameMap:
    """Where each weight of a model comes from, by its name in `state_dict`.

    `direct` weights are stored as they are, some in pieces that lie in them one after the other;
    `conversions` make others, `missing` ones are in no file
    (tied ones count as one weight: none of its names is stored), `copies` are further stored
    tensors of a tied weight. `left_out` tensors belong to a head that this model has not, `own_head` are those
    of its head for other labels.
    """

    direct: dict[str, list[FileTensor]]
    conversions: list[Conversion]
    copies: dict[str, list[FileTensor]]
    missing: list[str]
    left_out: list[FileTensor]
    own_head: list[FileTensor] = field(default_factory=list)


def is_head(model: Any, name: str) -> bool:
    """True for a weight that stands outside the body of the model."""
    return not name.startswith(f"{model.base_model_prefix}.")


def map_names(
    model: Any,
    stored: Mapping[str, FileTensor],
    shapes: Mapping[str, tuple[int, ...]],
    other_heads: bool,
    keeps_head: bool = True,
) -> NameMap:
    """Match the tensors of a folder with the weights of `model`, which may be on the meta device; ties are made.

    `shapes` are those that the stored weights must have. With `other_heads`, heads of another task
    are left out; anything else that the model does not have, and any other shape, is a DataError
    that names file and tensor. Without `keeps_head` the stored head is one for other labels.
    """
    matched, conversions, unexpected = _match(model, stored, set(shapes))
    left_out = _check_unexpected(model, unexpected, other_heads)
    canonical = _tied_names(model)
    own_head = [] if keeps_head else [matched.pop(name) for name in sorted(matched) if is_head(model, name)]
    direct: dict[str, list[FileTensor]] = {}
    copies: dict[str, list[FileTensor]] = defaultdict(list)
    # Of a tied weight, what is stored under its own name comes first.
    for name, tensor in sorted(matched.items(), key=lambda item: item[0] != canonical[item[0]]):
        _check_shape(tensor, tensor.shape, shapes[name])
        if canonical[name] in direct:
            copies[canonical[name]].append(tensor)
        else:
            direct[canonical[name]] = [tensor]
    parameters = {name for name, _ in model.named_parameters()}
    check_types(tensor for name, (tensor,) in direct.items() if name in parameters)
    found, slow = set(direct), []
    for conversion in conversions:
        check_types(source for _, source in conversion.sources)
        made = conversion.convert(model, lambda source: torch.empty(source.shape, dtype=source.dtype, device="meta"))
        for name, value in made.items():
            if name not in shapes or canonical[name] in found:
                raise DataError(f"{conversion.sources[0][1]}: would become {name}, which is not its place")
            _check_shape(conversion.sources[0][1], tuple(value.shape), shapes[name])
            conversion.targets[name] = canonical[name]
        found.update(conversion.targets.values())
        if (pieces := conversion.pieces()) is None:
            slow.append(conversion)
        else:
            direct.update(dict.fromkeys(conversion.targets.values(), pieces))
    missing = sorted({canonical[name] for name in shapes} - found)
    return NameMap(direct, slow, dict(copies), missing, left_out, own_head)


def _match(
    model: Any, stored: Mapping[str, FileTensor], names: set[str]
) -> tuple[dict[str, FileTensor], list[Conversion], dict[str, FileTensor]]:
    """(tensors that only need a name, conversions, tensors that fit nowhere by the name they would get).

    The same steps in the same order as transformers' `convert_and_load_state_dict_in_model`.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known: dict[str, Any] = dict.fromkeys(names, True)  # only asked whether a name is there
    prefix = model.base_model_prefix
    matched: dict[str, FileTensor] = {}
    conversions: dict[str, Conversion] = {}
    unexpected: dict[str, FileTensor] = {}
    for stored_name in sorted(stored, key=dot_natural_key):
        tensor = stored[stored_name]
        name, pattern = rename_source_key(stored_name, renamings, converters, prefix, known)
        if name not in known and stored_name in known:
            name, pattern = rename_source_key(stored_name, [], [], prefix, known)
        if name not in known:
            unexpected[name] = tensor
        elif pattern is not None:
            conversion = conversions.setdefault(name, Conversion(name, by_pattern[pattern]))
            conversion.sources.append((pattern, tensor))
        elif name in matched:
            raise DataError(f"{tensor} and {matched[name]} are both stored for {name}")
        else:
            matched[name] = tensor
    for name, conversion in conversions.items():
        if name in matched:
            raise DataError(f"{conversion.sources[0][1]} and {matched[name]} are both stored for {name}")
    return matched, list(conversions.values()), unexpected


def _check_unexpected(model: Any, unexpected: Mapping[str, FileTensor], other_heads: bool) -> list[FileTensor]:
    """The tensors that belong to the head of another task. DataError for one that has no place at all."""
    ignored = _ignored_patterns(model)
    own = {name for name, _ in model.named_children()} | {name for name, _ in model.named_parameters(recurse=False)}
    body = getattr(model, model.base_model_prefix, model)
    own |= {name for name, _ in body.named_children()} | {name for name, _ in body.named_parameters(recurse=False)}
    left_out = []
    for name, tensor in sorted(unexpected.items()):
        if any(re.search(pattern, name) for pattern in ignored):
            continue
        # A pooler in the body belongs to heads that read it; the bodies of models with other heads have none.
        is_other_pooler = "pooler" in name and getattr(body, "pooler", None) is None
        if not other_heads or (name.split(".")[0] in own and not is_other_pooler):
            raise DataError(
                f"{tensor} has no place in {type(model).__name__}: config.json and weights do not belong together, or "
                "the model is another one than its configuration says"
            )
        left_out.append(tensor)
    return left_out


def _ignored_patterns(model: Any) -> Iterable[str]:
    """What transformers does not miss the place of: its own lists, and buffers that files used to hold."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return patterns


def _tied_names(model: Any) -> dict[str, str]:
    """Every name in `state_dict` with the one that `named_parameters` uses for the same tensor."""
    first: dict[int, str] = {}
    names = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[name] = first.setdefault(id(tensor), name)
    return names


def _check_shape(source: FileTensor, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise DataError(f"{source} has the shape {list(shape)}, the model needs {list(wanted)}: not its weights?")
