"""The figures of a token store as a whole: sources, settings, tokenizer, distributions. Reads no tokens."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from data_prep.inspect.rows import fills_rows
from data_prep.inspect.token_text import TokenText
from data_prep.tasks import TASKS
from data_prep.tasks.data_task import Histogram
from data_prep.token_store import CURRENT_NAME, Rows, TokenStore

_FILL_PERCENT = (0, 50, 80, 90, 95, 98, 99, 99.9, 100)


@dataclass(frozen=True)
class Facts:
    """What a summary of a store says, as lists of (name, value) and histograms."""

    title: str
    totals: tuple[tuple[str, str], ...]
    shares: tuple[tuple[str, int], ...]  # what the places of all rows hold: targets, context, padding
    sources: tuple[tuple[str, ...], ...]  # first the headings
    settings: tuple[tuple[str, str], ...]
    tokenizer: tuple[tuple[str, str], ...]
    histograms: tuple[Histogram, ...]


def gather(store: TokenStore, rows: Rows, text: TokenText) -> Facts:
    """The figures of a store and its rows."""
    sizes = _row_sizes(rows)
    packed = fills_rows(store)
    histograms = [_document_lengths(store.ledger["total"]["lengths"])]
    if packed:
        histograms.append(_fill(sizes, rows.row_tokens))
    histograms += TASKS[store.task].histograms(store)
    return Facts(
        title=f"{store.path.name}: {store.task}",
        totals=_totals(store, rows, int(sizes.sum()), packed),
        shares=_shares(rows, int(sizes.sum()), packed),
        sources=_sources(store),
        settings=_settings(store),
        tokenizer=_tokenizer(store, text),
        histograms=tuple(histograms),
    )


def count(number: int) -> str:
    """A whole number for people: 1,234,567."""
    return f"{number:,}"


def _row_sizes(rows: Rows) -> np.ndarray:
    """int64 [rows]: tokens in every row."""
    if rows.num_rows == 0:
        return np.zeros(0, dtype=np.int64)
    first = np.concatenate(([0], rows.row_ends[:-1].astype(np.int64)))
    sizes: np.ndarray = np.add.reduceat(rows.lengths, first, dtype=np.int64)
    return sizes


def _totals(store: TokenStore, rows: Rows, in_rows: int, packed: bool) -> tuple[tuple[str, str], ...]:
    places = rows.num_rows * rows.row_tokens
    mean = store.num_tokens / max(store.num_documents, 1)
    each = f", {len(rows.documents) / rows.num_rows:,.1f} documents each" if packed and rows.num_rows else ""
    totals = [
        ("documents", count(store.num_documents)),
        ("tokens", f"{count(store.num_tokens)} ({mean:,.1f} a document)"),
        ("targets", f"{count(store.num_targets)}{_share_of_tokens(store)}"),
        ("rows", f"{count(rows.num_rows)} (of {'' if packed else 'at most '}{count(rows.row_tokens)} tokens{each})"),
    ]
    if packed and places:
        totals.append(("filled", f"{in_rows / places:.2%}"))
    size = sum(entry["bytes"] for entry in store.manifest["files"].values())
    totals.append(("on disk", f"{size / 1e6:,.1f} MB"))
    return tuple(totals)


def _share_of_tokens(store: TokenStore) -> str:
    if not store.marks_targets or not store.num_tokens:
        return ""
    return f" ({store.num_targets / store.num_tokens:.1%} of the tokens)"


def _shares(rows: Rows, in_rows: int, packed: bool) -> tuple[tuple[str, int], ...]:
    if not packed:
        return ()
    targets = min(int(rows.row_targets.sum()), in_rows)
    padding = rows.num_rows * rows.row_tokens - in_rows
    return (("targets", targets), ("context", in_rows - targets), ("padding", padding))


def _sources(store: TokenStore) -> tuple[tuple[str, ...], ...]:
    weighted = any(source["weight"] is not None for source in store.manifest["sources"])
    headings = ("", "source", "shape", "files", "documents", "tokens each", "share of an epoch", "epochs")
    table = [(*headings, "weight") if weighted else headings]
    for index, (source, account) in enumerate(zip(store.manifest["sources"], store.ledger["sources"], strict=True)):
        documents, tokens = account["documents"], account["tokens"] - account.get("tokens_cut_at_encoding", 0)
        line = (
            str(index),
            str(source["name"]),
            str(source["shape"]),
            count(len(source["files"])),
            count(documents),
            f"{tokens / max(documents, 1):,.1f}",
            f"{account['tokens_per_epoch'] / max(store.ledger['total']['tokens_per_epoch'], 1):.1%}",
            f"{account['epochs']:.3g}",
        )
        table.append((*line, f"{source['weight'] or 0:g}") if weighted else line)
    return tuple(table)


def _settings(store: TokenStore) -> tuple[tuple[str, str], ...]:
    """The data section that the store was prepared from, where it still stands beside it."""
    own = {key: store.manifest[key] for key in ("task", "row_tokens", "overlong", "packing") if key in store.manifest}
    settings = [(key, str(value)) for key, value in own.items()]
    try:
        current = json.loads((store.path.parent / CURRENT_NAME).read_text(encoding="utf-8"))
        if store.path.name in current["splits"].values():
            settings += [(f"data.{key}", value) for key, value in _flat(current["data"]) if key not in own]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass  # a store that was moved away from its folder has none
    return tuple(settings)


def _flat(section: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in section.items()
        if value is not None
    ]


def _tokenizer(store: TokenStore, text: TokenText) -> tuple[tuple[str, str], ...]:
    bytes_of = "byte-level" if text.byte_level else "byte fallback" if text.byte_fallback else "no byte tokens"
    named = [("end of text", store.eos_id), ("beginning of text", store.bos_id), ("padding", store.pad_id)]
    facts = [
        ("model", f"{text.model}, {bytes_of}"),
        ("vocabulary", count(store.vocab_size)),
        ("control tokens", f"{len(text.control_tokens)}: {' '.join(list(text.control_tokens.values())[:12])}"),
    ]
    facts += [
        (name, f"{text.token_bytes(index).decode('utf-8', 'replace')} ({index})")
        for name, index in named
        if index is not None
    ]
    template = "tokenizer/chat_template.jinja" in store.manifest["files"]
    return (*facts, ("chat template", "yes" if template else "none"))


def _document_lengths(buckets: Sequence[Mapping[str, int]]) -> Histogram:
    """The ledger's histogram of document lengths, with the empty bins between its own."""
    found = {bucket["up_to"]: bucket for bucket in buckets}
    bounds = [min(found, default=1)]
    while bounds[-1] < max(found, default=1):
        bounds.append(2 * bounds[-1])
    documents, tokens = (
        [found[up].get(key, 0) if up in found else 0 for up in bounds] for key in ("documents", "tokens")
    )
    labels = tuple(f"\u2264{count(bound)}" for bound in bounds)
    return Histogram("Documents by length", labels, "documents", tuple(documents), "tokens", tuple(tokens))


def _fill(sizes: np.ndarray, row_tokens: int) -> Histogram:
    """Rows by how full they are; those without any padding are a bin of their own."""
    borders = [0.0, *(percent / 100 for percent in _FILL_PERCENT[1:-1]), np.nextafter(1.0, 0.0), 2.0]
    counts, _ = np.histogram(sizes / row_tokens, bins=borders)
    labels = [f"{low}-{high} %" for low, high in pairwise(_FILL_PERCENT)]
    return Histogram("Rows by share filled", (*labels, "full"), "rows", tuple(counts.tolist()))
