"""How many positions a built model has: tables that are looked up, or the length that it was made for."""

from typing import Any

from torch import nn

from engine.fit.model_facts import Positions

#: What families call a table with a row for each position; relative positions have other names.
_TABLES = ("wpe", "position_embeddings", "position_embedding", "embed_positions", "position_embeds_layer")
_NOT_TEXT = ("vision", "visual", "image", "audio", "speech", "patch")


def positions_of(model: Any) -> Positions | None:
    """The positions of a model, which may be on the meta device; None where documents may be of any length."""
    counts = [_rows_for_text(table) for name, table in model.named_modules() if _is_table(name, table)]
    counts += [buffer.shape[0] for name, buffer in model.named_buffers() if _is_of_text(name, ("embed_positions",))]
    if counts:
        return Positions(min(counts), "table")
    made_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Positions(made_for, "trained") if isinstance(made_for, int) and made_for > 0 else None


def _is_table(name: str, module: nn.Module) -> bool:
    # A few families compute a longer table when they need one.
    return isinstance(module, nn.Embedding) and not hasattr(module, "make_weight") and _is_of_text(name, _TABLES)


def _is_of_text(name: str, endings: tuple[str, ...]) -> bool:
    return name.rpartition(".")[2] in endings and not any(word in name for word in _NOT_TEXT)


def _rows_for_text(table: Any) -> int:
    """Rows without those in front: RoBERTa's begin after the one for padding, OPT's and BART's after two of no use."""
    in_front = table.padding_idx + 1 if table.padding_idx is not None else getattr(table, "offset", 0)
    return int(table.num_embeddings) - int(in_front)
