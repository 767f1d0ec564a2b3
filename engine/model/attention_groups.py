"""Attention inside documents by torch's scaled-dot-product kernels: documents of like length go through together.

One call a document would be hundreds of small calls a layer for short sentences. A group of documents is padded to
its longest by repeating each document's own last token, which no other token attends to: nothing of another document
comes near, and every gradient across a border is exactly zero.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

#: A group of documents of L tokens at most may also hold shorter ones, as long as so many positions are saved a call.
_FREE_POSITIONS = 128
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

    tokens: Tensor  # (n * L,): the position of each token; behind a document's end its last token again
    real: Tensor | None  # (n, L): False behind a document's end; None where all have L tokens
    num_documents: int
    longest: int


@dataclass(frozen=True)
class _Plan:
    """The groups of a batch, and for each token its place among the real tokens of all groups."""

    groups: tuple[_Group, ...]
    places: Tensor  # (N,)


#: The plan of borders that are in use: all layers, and both passes, have the same tensor.
_PLANS = WeakTensorKeyDictionary()


def by_groups(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, rule: Rule) -> Tensor:
    """query (1, H, N, D), key and value (1, K, N, D), borders (documents + 1,); returns (N, H, D)."""
    plan: _Plan | None = _PLANS.get(borders)  # type: ignore[no-untyped-call]
    if plan is None:
        plan = _PLANS[borders] = _plan(borders)
    outputs = [_attend(query, key, value, group, rule) for group in plan.groups]
    return torch.cat(outputs)[plan.places] if len(outputs) > 1 else outputs[0][plan.places]


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
        longest = lengths[numbers[0]]
        starts, sizes = (torch.tensor([values[number] for number in numbers])[:, None] for values in (ends, lengths))
        steps = torch.arange(longest)
        tokens, real = starts + torch.minimum(steps, sizes - 1), steps < sizes
        order.append(tokens[real])
        padding = None if bool(real.all()) else real.to(borders.device)
        groups.append(_Group(tokens.flatten().to(borders.device), padding, len(numbers), longest))
    places = torch.cat(order).argsort().to(borders.device)
    return _Plan(tuple(groups), places)


def _attend(query: Tensor, key: Tensor, value: Tensor, group: _Group, rule: Rule) -> Tensor:
    """(M, H, D): the M real tokens of a group, document after document."""
    shape = (group.num_documents, group.longest)
    q, k, v = (torch.unflatten(tensor[0][:, group.tokens], 1, shape).transpose(0, 1) for tensor in (query, key, value))
    if rule.window is None or rule.window >= group.longest:
        output = _full(q, k, v, group, rule)
    else:
        output = _banded(q, k, v, group, rule, rule.window)
    output = output.transpose(1, 2)
    return output.flatten(0, 1) if group.real is None else output[group.real]


def _full(query: Tensor, key: Tensor, value: Tensor, group: _Group, rule: Rule) -> Tensor:
    """Every token sees all of its document, or all that precede it; (n, H, L, D)."""
    # Padding stands behind the end, where no real token looks if attention is causal.
    mask = None if group.real is None or rule.is_causal else group.real[:, None, None, :]
    return F.scaled_dot_product_attention(
        query, key, value, mask, rule.dropout, rule.is_causal,
        scale=rule.scaling, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _banded(query: Tensor, key: Tensor, value: Tensor, group: _Group, rule: Rule, window: int) -> Tensor:
    """Queries in blocks of one window: a block needs the keys of itself and its neighbours alone, so the band mask
    stays (window x 3 windows) however long the documents are; (n, H, L, D)."""
    outputs = []
    for start in range(0, group.longest, window):
        stop, first = min(start + window, group.longest), max(0, start - window)
        last = stop if rule.is_causal else min(stop + window, group.longest)
        places = torch.arange(first, last, device=query.device)
        distance = torch.arange(start, stop, device=query.device)[:, None] - places
        mask = (distance < window) & (distance >= 0 if rule.is_causal else distance > -window)
        if group.real is not None and not rule.is_causal:
            # A query behind the end still needs a key: itself.
            mask = (mask & group.real[:, None, None, first:last]) | (distance == 0)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:stop], key[:, :, first:last], value[:, :, first:last], mask, rule.dropout,
                scale=rule.scaling, enable_gqa=query.shape[1] != key.shape[1],
            )
        )  # fmt: skip
    return torch.cat(outputs, dim=2)
