"""The ledger: what became of every record, document, token and target, per source and reason, exactly.

These hold for every source and in total, and are asserted when the ledger is made::

    records_read = records_of_other_split + duplicates + sum(dropped_at_encoding) + documents - extra_documents
    documents    = kept + split + truncated + sum(dropped)
    tokens       = tokens_in_rows + tokens_cut + sum(tokens_dropped)
    targets      = targets_in_rows + targets_cut + sum(targets_dropped)

Targets are cut with the tokens of truncated documents, and where a piece begins inside a document:
nothing precedes its first token, so it cannot be predicted. Where rows hold one document each, encoding cuts what is
too long: the store lacks those tokens and targets, but they are counted here, as cut, like those that are cut later.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from data_prep.config import Overlong, SourceConfig
from data_prep.errors import BadDataError
from data_prep.token_store import TokenStore

_BLOCK = 1 << 16  # documents that are sorted into the histogram at once
_SHOWN_PLACES = 3
REASONS = ("overlong", "too_few_targets")
_COUNTS = (
    "records_read", "records_of_other_split", "duplicates", "extra_documents", "truncated_at_encoding", "answers_moved",
    "documents", "kept", "split", "truncated", "tokens", "tokens_in_rows", "tokens_cut", "targets", "targets_in_rows",
    "targets_cut", "rows", "rows_per_epoch", "tokens_per_epoch",
)  # fmt: skip
_NOTES = {
    "nulls_left_out": "nulls left out: {count} fields of objects are null in a table, which gives each all fields",
    "systems_folded": "folded: {count} system prompts stand in the user turn that follows them",
    "answers_inside_tokens": "answers inside tokens: {count} begin or end within a token, so their spans are longer",
    "texts_split": "split: {count} texts are longer than a row and became several documents",
    "windowed": "windows: {count} records longer than a row are overlapping windows, each word a target in one of them",
    "turns_merged": "merged: {count} turns are part of the turn of the same role before them",
}
_IF_ANY = ("tokens_cut_at_encoding", "targets_cut_at_encoding", "answers_cut", "answers_dropped")
_BY_REASON = ("dropped_at_encoding", "dropped", "tokens_dropped", "targets_dropped")


class SourceAccount:
    """Running sums of one source while its documents are arranged."""

    def __init__(self, source: Mapping[str, Any]):
        self.source = source
        self.documents = self.kept = self.rows = 0
        self.tokens = self.tokens_in_rows = self.tokens_cut = 0
        self.targets = self.targets_in_rows = self.targets_cut = 0
        self.cut_documents = {"split": 0, "truncated": 0}
        self.answers_cut = self.answers_dropped = 0
        self.dropped = dict.fromkeys(REASONS, 0)
        self.tokens_dropped = dict.fromkeys(REASONS, 0)
        self.targets_dropped = dict.fromkeys(REASONS, 0)
        self._histogram = np.zeros((2, 64), dtype=np.int64)  # documents and tokens of up to 2**i tokens

    def add_documents(self, lengths: np.ndarray, targets: np.ndarray) -> None:
        """Documents (int64 [D] tokens and targets each) that are to be arranged."""
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())
        self.targets += int(targets.sum())
        for first in range(0, len(lengths), _BLOCK):
            block = lengths[first : first + _BLOCK]
            _, bucket = np.frexp((block - 1).astype(np.float64))  # the bits of a whole number below 2**53
            for row, weights in enumerate((None, block)):
                self._histogram[row] += np.bincount(bucket, weights=weights, minlength=64).astype(np.int64)

    def settle(
        self, lengths: np.ndarray, targets: np.ndarray, *, poor: np.ndarray, long: np.ndarray, placed: np.ndarray,
        policy: Overlong,
    ) -> None:  # fmt: skip
        """The fate of documents (bool [D] each): which were not `placed` for their length, which are `poor`
        in targets and dropped for it, and which of the others came in pieces or shortened (`long`)."""
        for reason, gone in (("overlong", ~placed), ("too_few_targets", placed & poor)):
            self.dropped[reason] += int(gone.sum())
            self.tokens_dropped[reason] += int(lengths.sum(where=gone))
            self.targets_dropped[reason] += int(targets.sum(where=gone))
        in_rows = placed & ~poor
        self.kept += int((in_rows & ~long).sum())
        self.cut_documents["split" if policy == "split" else "truncated"] += int((in_rows & long).sum())

    def cut(self, tokens: int, targets: int) -> None:
        """What is missing of documents that are in rows."""
        self.tokens_cut += tokens
        self.targets_cut += targets

    def lose_answers(self, cut: int, dropped: int) -> None:
        """Answers that end behind the end of their row, and those of documents that have no row."""
        self.answers_cut += cut
        self.answers_dropped += dropped

    def add_rows(self, rows: int, tokens: int, targets: int) -> None:
        """Rows as they are written."""
        self.rows += rows
        self.tokens_in_rows += tokens
        self.targets_in_rows += targets

    def entry(self, rows_per_epoch: int, row_tokens: int | None) -> dict[str, Any]:
        """The ledger's entry of this source."""
        source = self.source
        before = {name: source.get(name, 0) for name in ("documents_cut", "tokens_cut", "targets_cut")}
        entry: dict[str, Any] = {
            "name": source["name"],
            "records_read": source["records_read"],
            "records_of_other_split": source["records_of_other_split"],
            "duplicates": source["duplicates"],
            "dropped_at_encoding": dict(source["dropped"]),
            "extra_documents": source["extra_documents"],
            "truncated_at_encoding": source["records_truncated"],
            "answers_moved": source["answers_moved"],
            **({"notes": dict(source["notes"])} if "notes" in source else {}),
            "documents": self.documents,
            "kept": self.kept - before["documents_cut"],
            "split": self.cut_documents["split"],
            "truncated": self.cut_documents["truncated"] + before["documents_cut"],
            "dropped": self.dropped,
            "tokens": self.tokens + before["tokens_cut"],
            "tokens_in_rows": self.tokens_in_rows,
            "tokens_cut": self.tokens_cut + before["tokens_cut"],
            "tokens_dropped": self.tokens_dropped,
            "targets": self.targets + before["targets_cut"],
            "targets_in_rows": self.targets_in_rows,
            "targets_cut": self.targets_cut + before["targets_cut"],
            "targets_dropped": self.targets_dropped,
            "rows": self.rows,
            "padding_tokens": None if row_tokens is None else self.rows * row_tokens - self.tokens_in_rows,
            "rows_per_epoch": rows_per_epoch,
            "tokens_per_epoch": round(self.tokens_in_rows * rows_per_epoch / self.rows) if self.rows else 0,
            "epochs": rows_per_epoch / self.rows if self.rows else 0.0,
            "lengths": self._lengths(),
        }
        if any(before.values()):
            entry |= {"tokens_cut_at_encoding": before["tokens_cut"], "targets_cut_at_encoding": before["targets_cut"]}
        if self.answers_cut or self.answers_dropped:
            entry |= {"answers_cut": self.answers_cut, "answers_dropped": self.answers_dropped}
        check_identities(entry)
        return entry

    def _lengths(self) -> list[dict[str, int]]:
        return [
            {"up_to": 1 << bucket, "documents": int(documents), "tokens": int(tokens)}
            for bucket, (documents, tokens) in enumerate(self._histogram.T)
            if documents
        ]


def check_identities(entry: Mapping[str, Any]) -> None:
    """Assert what the ledger promises of a source's entry or the total."""
    encoded = entry["documents"] - entry["extra_documents"]
    left_out = entry["records_of_other_split"] + entry["duplicates"] + sum(entry["dropped_at_encoding"].values())
    assert entry["records_read"] == left_out + encoded, entry
    fates = entry["kept"] + entry["split"] + entry["truncated"] + sum(entry["dropped"].values())
    assert entry["documents"] == fates, entry
    for unit in ("tokens", "targets"):
        accounted = entry[f"{unit}_in_rows"] + entry[f"{unit}_cut"] + sum(entry[f"{unit}_dropped"].values())
        assert entry[unit] == accounted and entry[f"{unit}_cut"] >= 0, entry
    for key in ("documents", "tokens"):
        stored = entry[key] - entry.get(f"{key}_cut_at_encoding", 0)
        assert stored == sum(bucket[key] for bucket in entry["lengths"]), entry


def ledger(
    store: TokenStore, accounts: Sequence[SourceAccount], rows_per_epoch: Sequence[int], row_tokens: int | None
) -> dict[str, Any]:
    """The ledger of a store: {"sources": entries, "total": their sum}. `row_tokens` where rows are filled up."""
    entries = [account.entry(used, row_tokens) for account, used in zip(accounts, rows_per_epoch, strict=True)]
    total: dict[str, Any] = {"name": "total"}
    for key in _COUNTS:
        total[key] = sum(entry[key] for entry in entries)
    for key in _IF_ANY:
        if any(key in entry for entry in entries):
            total[key] = sum(entry.get(key, 0) for entry in entries)
    for key in (*_BY_REASON, "notes"):
        total[key] = {}
        for entry in entries:
            for reason, count in entry.get(key, {}).items():
                total[key][reason] = total[key].get(reason, 0) + count
    if not total["notes"]:
        del total["notes"]
    total["padding_tokens"] = None if row_tokens is None else sum(entry["padding_tokens"] for entry in entries)
    total["epochs"] = total["rows_per_epoch"] / total["rows"] if total["rows"] else 0.0
    total["lengths"] = _add_histograms(entries)
    check_identities(total)
    stored = [total[key] - total.get(f"{key}_cut_at_encoding", 0) for key in ("documents", "tokens", "targets")]
    assert stored == [store.num_documents, store.num_tokens, store.num_targets]
    return {"sources": entries, "total": total}


def _add_histograms(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, int]]:
    buckets: dict[int, dict[str, int]] = {}
    for bucket in (bucket for entry in entries for bucket in entry["lengths"]):
        whole = buckets.setdefault(bucket["up_to"], {"up_to": bucket["up_to"], "documents": 0, "tokens": 0})
        for key in ("documents", "tokens"):
            whole[key] += bucket[key]
    return [buckets[up_to] for up_to in sorted(buckets)]


def ledger_table(manifest: Mapping[str, Any]) -> str:
    """The ledger for people: a line a source and the total, then the reasons of what is missing."""
    table, reasons = ledger_cells(manifest)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table]
    return "\n".join(text + reasons)


def ledger_cells(manifest: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    """What `ledger_table` shows: the table with its headings, and a line for every reason.

    Columns that hold nothing but zeros are left out.
    """
    entries = list(manifest["ledger"]["sources"])
    total = manifest["ledger"]["total"]
    lines = [*entries, total] if len(entries) > 1 else entries
    columns = [
        ("source", [entry["name"] for entry in lines]),
        ("records", _numbers(lines, "records_read")),
        ("other split", _numbers(lines, "records_of_other_split")),
        ("duplicates", _numbers(lines, "duplicates")),
        ("unusable", [f"{sum(entry['dropped_at_encoding'].values()):,}" for entry in lines]),
        ("documents", _numbers(lines, "documents")),
        ("kept", _numbers(lines, "kept")),
        ("split", _numbers(lines, "split")),
        ("truncated", [f"{_num_truncated(entry):,}" for entry in lines]),
        ("dropped", [f"{sum(entry['dropped'].values()):,}" for entry in lines]),
        ("tokens", _numbers(lines, "tokens")),
        ("in rows", _numbers(lines, "tokens_in_rows")),
        ("targets", _numbers(lines, "targets_in_rows")),
        ("rows", _numbers(lines, "rows")),
        ("filled", [_filled(entry) for entry in lines]),
        ("epochs", [f"{entry['epochs']:.3g}" for entry in lines]),
    ]
    always = {"source", "records", "documents", "tokens", "in rows", "targets", "rows"}
    empty = {"split": "0", "truncated": "0", "filled": "", "epochs": "1"}
    shown = [
        (title, values)
        for title, values in columns
        if title in always or any(value != empty.get(title, "0") for value in values)
    ]
    table = [[title for title, _ in shown], *([values[line] for _, values in shown] for line in range(len(lines)))]
    return table, _missing(total, entries, manifest["sources"])


def _num_truncated(entry: Mapping[str, Any]) -> int:
    """Truncated documents; ledgers of earlier versions had those that encoding cut beside the others."""
    counted = "tokens_cut_at_encoding" in entry
    return int(entry["truncated"] + (0 if counted else entry["truncated_at_encoding"]))


def _numbers(lines: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return [f"{entry[key]:,}" for entry in lines]


def _filled(entry: Mapping[str, Any]) -> str:
    if entry["padding_tokens"] is None or entry["rows"] == 0:
        return ""
    return f"{entry['tokens_in_rows'] / (entry['tokens_in_rows'] + entry['padding_tokens']):.2%}"


def _missing(
    total: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], sources: Sequence[Mapping[str, Any]]
) -> list[str]:
    def by_source(key: str, reason: str) -> str:
        counts = [(entry["name"], entry[key].get(reason, 0)) for entry in entries]
        return "" if len(entries) < 2 else f": {', '.join(f'{name} {count:,}' for name, count in counts if count)}"

    lines = [
        f"unusable: {count:,} {reason}{by_source('dropped_at_encoding', reason)}{_places(sources, reason, count)}"
        for reason, count in total["dropped_at_encoding"].items()
        if count
    ]
    lines += [
        f"dropped: {count:,} {reason} ({total['tokens_dropped'][reason]:,} tokens){by_source('dropped', reason)}"
        for reason, count in total["dropped"].items()
        if count
    ]
    if total["tokens_cut"] or total["targets_cut"]:
        lines.append(f"cut off: {total['tokens_cut']:,} tokens, {total['targets_cut']:,} targets")
    if total.get("answers_cut"):
        lines.append(f"answers cut: {total['answers_cut']:,} (their row ends before their stop token)")
    if total["answers_moved"]:
        lines.append(f"moved: {total['answers_moved']:,} answers stand elsewhere in their context than they say")
    return lines + _note_lines(total.get("notes", {}))


def _note_lines(notes: Mapping[str, int]) -> list[str]:
    """A line for everything that was counted of the records and that people should know."""
    lines = []
    if lost := notes.get("reasoning_lost", 0):
        last = notes.get("last_reasoning_lost", 0)
        advice = "`data.chat.train_turns: each` makes a document of each trained turn, `last` trains the last alone"
        if last:
            what = "give a template that writes reasoning"
            advice = f"of these {last:,} end their conversation: {what}; for the others {advice}"
        turns, are = ("turn", "is") if lost == 1 else ("turns", "are")
        lines.append(
            f"reasoning lost: {lost:,} trained {turns}, whose reasoning the chat template does not write, {are} trained"
            f" without it: {advice}"
        )
    for name, words in _NOTES.items():
        if notes.get(name):
            lines.append(words.format(count=f"{notes[name]:,}"))
    return lines


def _places(sources: Sequence[Mapping[str, Any]], reason: str, count: int) -> str:
    """The first places of records that were left out for `reason`."""
    found = [place for source in sources for why, place, _ in source.get("unusable", ()) if why == reason]
    shown = found[:_SHOWN_PLACES]
    return f" ({', '.join(shown)}{' ...' if count > len(shown) else ''})" if shown else ""


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
