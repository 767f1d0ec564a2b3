"""How many rows of each source make an epoch."""

import math
from collections.abc import Sequence
from fractions import Fraction

from data_prep.config import SourceConfig
from data_prep.errors import BadDataError


def rows_per_epoch(num_rows: Sequence[int], num_tokens: Sequence[int], sources: Sequence[SourceConfig]) -> list[int]:
    """Whole rows of one epoch, for sources that have `num_rows` rows with `num_tokens` tokens in them.

    Without weights an epoch is every row `epochs` times (1 unless given), rounded, one at least. With
    weights, an epoch has as many tokens as all rows together, of which a source has its weight's share:
    whole rows by largest remainder, one at least, so small sources repeat and large ones wait for
    later epochs. Exact arithmetic: the same everywhere. BadDataError for a weighted source without rows.
    """
    for rows, source in zip(num_rows, sources, strict=True):
        if rows == 0 and (source.weight is not None or source.epochs is not None):
            where = source.name or source.path or source.hub or "a source"
            raise BadDataError(f"{where}: no row is left of it, so it cannot have a weight or epochs (data.train)")
    if any(source.weight is None for source in sources):
        return [_round(rows * Fraction(source.epochs or 1)) for rows, source in zip(num_rows, sources, strict=True)]
    weights = [Fraction(source.weight or 0) for source in sources]
    epoch_tokens = sum(num_tokens)
    quotas = [
        epoch_tokens * weight / sum(weights) * Fraction(rows, tokens)
        for rows, tokens, weight in zip(num_rows, num_tokens, weights, strict=True)
    ]
    whole = [math.floor(quota) for quota in quotas]
    missing = math.floor(sum(quotas) + Fraction(1, 2)) - sum(whole)
    by_remainder = sorted(range(len(quotas)), key=lambda index: whole[index] - quotas[index])
    for index in by_remainder[:missing]:
        whole[index] += 1
    return [max(1, count) for count in whole]


def _round(rows: Fraction) -> int:
    return max(1, math.floor(rows + Fraction(1, 2))) if rows else 0
