"""The figures of a token store as a whole: sources, settings, tokenizer, distributions. Reads no tokens."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from data_prep.inspect_rows import _column, _has, source_name
from data_prep.token_store import CURRENT_NAME, Rows, TokenStore
from data_prep.token_text import TokenText

_FILL_PERCENT = (0, 50, 80, 90, 95, 98, 99, 99.9, 100)
_TAG_BLOCK = 1 << 22
_MOST_NAMES = 40


@dataclass(frozen=True)
class Histogram:
    """Counts in labelled bins; `second` counts the same bins in another unit."""

    title: str
    labels: tuple[str, ...]
    unit: str
    counts: tuple[int, ...]
    second_unit: str = ""
    second: tuple[int, ...] = ()


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
    packed = bool(store.ledger["total"].get("padding_tokens") is not None)
    histograms = [_lengths("Documents by length", "documents", store.document_lengths)]
    if packed:
        histograms.append(_fill(sizes, rows.row_tokens))
    histograms += _outcomes(store)
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
    first = np.concatenate(([0], rows.row_ends[:-1]))
    sizes: np.ndarray = np.add.reduceat(rows.lengths, first, dtype=np.int64)
    return sizes


def _totals(store: TokenStore, rows: Rows, in_rows: int, packed: bool) -> tuple[tuple[str, str], ...]:
    places = rows.num_rows * rows.row_tokens
    mean = store.num_tokens / max(store.num_documents, 1)
    totals = [
        ("documents", count(store.num_documents)),
        ("tokens", f"{count(store.num_tokens)} ({mean:,.1f} a document)"),
        ("targets", f"{count(store.num_targets)}{_share_of_tokens(store)}"),
        ("rows", f"{count(rows.num_rows)} (of {'' if packed else 'at most '}{count(rows.row_tokens)} tokens)"),
    ]
    if packed and places:
        totals.append(("filled", f"{in_rows / places:.2%}"))
    if rows.num_rows and packed:
        totals.append(("documents a row", f"{len(rows.documents) / rows.num_rows:,.1f}"))
    size = sum(entry["bytes"] for entry in store.manifest["files"].values())
    totals.append(("on disk", f"{size / 1e6:,.1f} MB"))
    return tuple(totals)


def _share_of_tokens(store: TokenStore) -> str:
    if store.task not in ("causal_lm", "token_classification") or not store.num_tokens:
        return ""
    return f" ({store.num_targets / store.num_tokens:.1%} of the tokens)"


def _shares(rows: Rows, in_rows: int, packed: bool) -> tuple[tuple[str, int], ...]:
    if not packed:
        return ()
    targets = min(int(rows.row_targets.sum()), in_rows)
    padding = rows.num_rows * rows.row_tokens - in_rows
    return (("targets", targets), ("context", in_rows - targets), ("padding", padding))


def _sources(store: TokenStore) -> tuple[tuple[str, ...], ...]:
    table = [("", "source", "shape", "files", "documents", "tokens", "share")]
    for index, source in enumerate(store.manifest["sources"]):
        first, number = int(source["first_document"]), int(source["num_documents"])
        tokens = int(store.document_lengths[first : first + number].sum())
        share = f"{tokens / max(store.num_tokens, 1):.1%}"
        files = count(len(source.get("files", [None])))
        shape = str(source.get("shape") or "-")
        table.append((str(index), source_name(source), shape, files, count(number), count(tokens), share))
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


def _lengths(title: str, unit: str, lengths: np.ndarray) -> Histogram:
    """Lengths in powers of two."""
    bins = np.frexp(np.maximum(lengths, 1))[1] - 1  # the exponent of the highest bit
    counts = np.bincount(bins)
    tokens = np.bincount(bins, weights=lengths).astype(np.int64)
    first = int(np.flatnonzero(counts)[0]) if len(lengths) else 0
    labels = tuple(count(1 << power) for power in range(first, len(counts)))
    return Histogram(title, labels, unit, tuple(counts[first:].tolist()), "tokens", tuple(tokens[first:].tolist()))


def _fill(sizes: np.ndarray, row_tokens: int) -> Histogram:
    """Rows by how full they are; those without any padding are a bin of their own."""
    borders = [0.0, *(percent / 100 for percent in _FILL_PERCENT[1:-1]), np.nextafter(1.0, 0.0), 2.0]
    counts, _ = np.histogram(sizes / row_tokens, bins=borders)
    labels = [f"{low}-{high} %" for low, high in pairwise(_FILL_PERCENT)]
    return Histogram("Rows by share filled", (*labels, "full"), "rows", tuple(counts.tolist()))


def _outcomes(store: TokenStore) -> list[Histogram]:
    """How often each label or tag is used, and how long targets are."""
    found = []
    for column, title, unit in (("labels", "Labels", "documents"), ("label_sets", "Labels", "documents")):
        if _has(store, column):
            found.append(_names(store, title, unit, np.bincount(_column(store, column))))
    if _has(store, "tags"):
        tags = _column(store, "tags")
        counts = np.zeros(len(store.label_names), dtype=np.int64)
        for begin in range(0, len(tags), _TAG_BLOCK):
            block = tags[begin : begin + _TAG_BLOCK]
            counts += np.bincount(block[block >= 0], minlength=len(counts))
        found.append(_names(store, "Tags", "words", counts))
    if _has(store, "scores"):
        counts, borders = np.histogram(_column(store, "scores"), bins=10)
        found.append(
            Histogram("Scores", tuple(f"{low:.3g}" for low in borders[:-1]), "documents", tuple(counts.tolist()))
        )
    if _has(store, "target_ids"):
        lengths = np.diff(_column(store, "target_ids_ends").astype(np.int64), prepend=0)
        found.append(_lengths("Documents by length of target", "documents", lengths))
    if _has(store, "answer_spans"):
        spans = np.diff(_column(store, "answer_spans_ends").astype(np.int64), prepend=0) // 2
        counts = np.bincount(np.minimum(spans, 2), minlength=3)
        labels = ("no answer", "one answer", "several answers")
        found.append(Histogram("Windows by answers in them", labels, "windows", tuple(counts.tolist())))
    return found


def _names(store: TokenStore, title: str, unit: str, counts: np.ndarray) -> Histogram:
    names = [store.label_names[index] if index < len(store.label_names) else str(index) for index in range(len(counts))]
    order = np.argsort(-counts, kind="stable")
    shown = order[:_MOST_NAMES]
    labels, values = [names[index] for index in shown], [int(counts[index]) for index in shown]
    if len(order) > len(shown):
        labels.append(f"{len(order) - len(shown)} more")
        values.append(int(counts[order[_MOST_NAMES:]].sum()))
    return Histogram(title, tuple(labels), unit, tuple(values))
