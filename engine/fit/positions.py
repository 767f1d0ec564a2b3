"""Positions of a model against the longest document: they restart with each document, so rows may be longer."""

from collections.abc import Sequence

from data_prep.token_store import Rows, TokenStore
from engine.finding import Finding
from engine.fit.model_facts import ModelFacts

_NAME = "positions"


def check_positions(facts: ModelFacts, stores: Sequence[tuple[TokenStore, Rows]]) -> Finding:
    """An error for a document that the model has no positions for, a warning for one longer than it was made for."""
    positions = facts.positions
    if positions is None:
        return Finding(_NAME, "ok", "of any number")
    longest, place = max((_longest(store, rows) for store, rows in stores), default=(0, ""))
    if longest <= positions.count:
        return Finding(_NAME, "ok", f"{positions.count:,}, and the longest document has {longest:,} tokens")
    if positions.kind == "table":
        found = (
            f"{facts.name} has {positions.count:,} positions, and the longest document has {longest:,} tokens "
            f"(record {place})"
        )
        to_do = (
            f"set data.row_tokens to at most {positions.count}, with data.overlong: truncate, split or drop, or take a "
            "model with more positions"
        )
        return Finding(_NAME, "error", found, to_do)
    found = (
        f"the longest document has {longest:,} tokens (record {place}), and {facts.name} was made for "
        f"{positions.count:,} (max_position_embeddings): it has not seen positions beyond"
    )
    to_do = f"set data.row_tokens to at most {positions.count}, or scale its rope_parameters, if that is not meant"
    return Finding(_NAME, "warning", found, to_do)


def check_row_length(facts: ModelFacts, row_tokens: int) -> Finding | None:
    """The same before there is a store: a document can be as long as a row."""
    positions = facts.positions
    if positions is None or row_tokens <= positions.count:
        return None
    if positions.kind == "table":
        found = (
            f"data.row_tokens is {row_tokens:,}, and {facts.name} has {positions.count:,} positions: longer documents "
            "are refused once the data are prepared"
        )
    else:
        found = (
            f"data.row_tokens is {row_tokens:,}, and {facts.name} was made for {positions.count:,} positions "
            "(max_position_embeddings): it has not seen those beyond"
        )
    to_do = f"set data.row_tokens to at most {positions.count} unless documents are short"
    return Finding(_NAME, "warning", found, to_do)


def _longest(store: TokenStore, rows: Rows) -> tuple[int, str]:
    """Tokens of the longest piece of a document in a row, and the place of its record."""
    segment = int(rows.lengths.argmax())
    return int(rows.lengths[segment]), store.locate(int(rows.documents[segment]))
