"""Attention inside documents by torch's scaled-dot-product kernels, where the variable-length kernel does not run.

On a CPU each document is a call of its own: measured with sentences of 4 to 60 tokens, calls cost less than the copies
and the padding that larger ones need (`by_documents`). On an accelerator a call costs as much as thousands of tokens,
so documents of like length go through together (`by_groups`). A group is padded to its longest document by repeating
each document's own last token, which no other token attends to: nothing of another document comes near, and every
gradient across a border is exactly zero.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

#: The positions of padding that cost as much as a call on an accelerator: no group has more.
_FREE_POSITIONS = 1 << 12
#: Scores a head that the documents of a group may have together, unless one alone has more.
_MOST_SCORES = 1 << 20


@dataclass(frozen=True)
class Rule:
    """How tokens of a document attend to one another."""

    is_causal: bool
    window: int | None  # a token sees those less than so many positions away; None where it covers all documents
    scaling: float | None
    dropout: float


@dataclass(frozen=True)
class _Group:
    """Documents that are computed in one call: n documents, L tokens in the longest."""

    tokens: Tensor  # (n, L): the position of each token; behind a document's end its last token again
    real: Tensor | None  # (n, L): False behind a document's end; None where all have L tokens


@dataclass(frozen=True)
class _Plan:
    """The groups of a batch, and for each token its place among the real tokens of all groups."""

    groups: tuple[_Group, ...]
    places: Tensor  # (N,)


#: The plan of borders that are in use: all layers, and both passes, have the same tensor.
_PLANS = WeakTensorKeyDictionary()


def by_documents(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, rule: Rule) -> Tensor:
    """query (1, H, N, D), key and value (1, K, N, D), borders (documents + 1,); returns (N, H, D)."""
    lengths = borders.diff().tolist()
    documents = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([_inside(q, k, v, None, rule) for q, k, v in documents], dim=2)[0].transpose(0, 1)


def by_groups(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, rule: Rule) -> Tensor:
    """As `by_documents`, with few calls."""
    if borders not in _PLANS:
        _PLANS[borders] = _plan(borders)
    plan: _Plan = _PLANS[borders]
    outputs = []
    for group in plan.groups:
        q, k, v = (_gather(tensor, group.tokens) for tensor in (query, key, value))
        output = _inside(q, k, v, group.real, rule).transpose(1, 2)
        outputs.append(output.flatten(0, 1) if group.real is None else output[group.real])
    return torch.cat(outputs)[plan.places]


def group_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """The numbers of the documents of each group, the longest document first."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    groups: list[list[int]] = []
    longest, padding = 0, 0
    for number in order:
        length = lengths[number]
        padding += longest - length
        if (
            not groups
            or padding > _FREE_POSITIONS
            or (len(groups[-1]) + 1) * longest**2 > max(_MOST_SCORES, longest**2)
        ):
            groups.append([])
            longest, padding = length, 0
        groups[-1].append(number)
    return groups


def _plan(borders: Tensor) -> _Plan:
    ends = borders.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(ends)]
    groups, order = [], []
    for numbers in group_lengths(lengths):
        steps = torch.arange(lengths[numbers[0]])
        starts, sizes = (torch.tensor([values[number] for number in numbers])[:, None] for values in (ends, lengths))
        tokens, real = starts + torch.minimum(steps, sizes - 1), steps < sizes
        order.append(tokens[real])
        groups.append(_Group(tokens.to(borders.device), None if bool(real.all()) else real.to(borders.device)))
    return _Plan(tuple(groups), torch.cat(order).argsort().to(borders.device))


def _gather(tensor: Tensor, tokens: Tensor) -> Tensor:
    """(n, H, L, D) of tensor (1, H, N, D), for tokens (n, L)."""
    # Looked up as rows of a table, for which gradients add up in a fixed order on every device.
    rows = F.embedding(tokens, tensor[0].transpose(0, 1).flatten(1))
    return rows.view(*tokens.shape, tensor.shape[1], -1).transpose(1, 2)


def _inside(query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, rule: Rule) -> Tensor:
    """Attention inside n documents of up to L tokens, (n, H, L, D); `real` as of a group."""
    if rule.window is not None and rule.window < query.shape[2]:
        return _banded(query, key, value, real, rule, rule.window)
    # Padding stands behind the end, where no real token looks if attention is causal.
    mask = None if real is None or rule.is_causal else real[:, None, None, :]
    return _call(query, key, value, mask, rule, rule.is_causal)


def _banded(query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, rule: Rule, window: int) -> Tensor:
    """Queries in blocks of one window: a block needs the keys of itself and its neighbours alone, so the band mask
    stays (window x 3 windows) however long the documents are."""
    outputs, length = [], query.shape[2]
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(0, start - window)
        last = stop if rule.is_causal else min(stop + window, length)
        places = torch.arange(first, last, device=query.device)
        distance = torch.arange(start, stop, device=query.device)[:, None] - places
        mask = (distance < window) & (distance >= 0 if rule.is_causal else distance > -window)
        if real is not None and not rule.is_causal:
            # A query behind the end still needs a key: itself.
            mask = (mask & real[:, None, None, first:last]) | (distance == 0)
        keys, values = key[:, :, first:last], value[:, :, first:last]
        outputs.append(_call(query[:, :, start:stop], keys, values, mask, rule, False))
    return torch.cat(outputs, dim=2)


def _call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, mask, rule.dropout, is_causal,
        scale=rule.scaling, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
