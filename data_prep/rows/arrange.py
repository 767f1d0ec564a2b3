"""Arranges the documents of a store into rows, source by source and window by window, and writes the plan.

A window holds enough documents for some thousand rows, so memory is bounded whatever the size of the
store, and packing within it wastes less than a row. Rows never mix sources.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.config import Overlong, Packing, SourceConfig
from data_prep.errors import OVERLONG_ADVICE, BadDataError, DataConfigError, overlong_message
from data_prep.rows.ledger import SourceAccount, ledger, rows_per_epoch
from data_prep.rows.pack import Truncation, pack_rows, wrap_rows
from data_prep.rows.row_files import RowFiles, unsigned_type
from data_prep.token_store import TokenStore

_WINDOW_ROWS = 4096  # packing apart loses about one row of them
_WINDOW_DOCUMENTS = (1 << 16, 1 << 21)  # fewest and most; each takes some 60 bytes of memory


@dataclass(frozen=True)
class RowPlan:
    """How documents become rows: four keys of the ``data`` section, and how the task has its targets."""

    row_tokens: int
    packing: Packing = "best_fit"
    overlong: Overlong = "error"
    min_targets: int = 1
    packs: bool = (
        True  # documents share rows, and nothing predicts the first token of a piece; else rows hold one whole
    )
    target_column: str | None = None  # the ragged column whose values are the targets


@dataclass(frozen=True)
class Segments:
    """Pieces of documents that fit a row, [S] each; `row_ends` [R] if they are in the order of rows."""

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray  # uint32, its first token left out
    row_ends: np.ndarray

    def at(self, chosen: Any, row_ends: np.ndarray) -> "Segments":
        """The chosen segments, in rows that end at `row_ends`."""
        return Segments(
            self.documents[chosen], self.starts[chosen], self.lengths[chosen], self.targets[chosen], row_ends
        )


_NO_ROWS = np.zeros(0, dtype=np.int64)


def write_rows(
    store: TokenStore,
    plan: RowPlan,
    mixture: Sequence[SourceConfig] | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Arrange the documents of `store` into rows, write them into its folder, and account for every record.

    `mixture` has the settings of each of the store's sources; None (validation): every row once.
    `advance` is told how many documents were arranged. Returns the manifest keys row_tokens, packing,
    overlong, min_targets, num_rows, num_segments, row_sources and ledger, and the entries of the files.
    BadDataError names the first record that the plan refuses: one longer than a row where overlong is
    ``error``, or one with a prompt or turns that would be split.
    """
    sources = store.manifest["sources"]
    if plan.packing == "wrap":
        _require_text(sources)
    writer = RowFiles(store, plan.row_tokens)
    accounts = []
    for source in sources:
        account = SourceAccount(source)
        for rows in _arrange_source(store, source, plan, account, advance):
            account.add_rows(len(rows.row_ends), int(rows.lengths.sum(dtype=np.int64)), int(rows.targets.sum()))
            writer.append(rows.documents, rows.starts, rows.lengths, rows.targets, rows.row_ends)
        accounts.append(account)
    num_rows, num_tokens = [account.rows for account in accounts], [account.tokens_in_rows for account in accounts]
    of_epoch = num_rows if mixture is None else rows_per_epoch(num_rows, num_tokens, mixture)
    return {
        "row_tokens": plan.row_tokens,
        "packing": plan.packing,
        "overlong": plan.overlong,
        "min_targets": plan.min_targets,
        "num_rows": sum(num_rows),
        "num_segments": writer.num_segments,
        "row_sources": _row_sources(accounts, of_epoch),
        "ledger": ledger(store, accounts, of_epoch, plan.row_tokens if plan.packing != "none" else None),
        "files": writer.close(),
    }


def _row_sources(accounts: Sequence[SourceAccount], rows_per_epoch: Sequence[int]) -> list[dict[str, Any]]:
    """Lists for each source its first row, the number of its rows, and how many of them an epoch uses."""
    result: list[dict[str, Any]] = []
    first_row = 0
    for account, used in zip(accounts, rows_per_epoch, strict=True):
        name = account.source["name"]
        result.append({"name": name, "first_row": first_row, "num_rows": account.rows, "rows_per_epoch": used})
        first_row += account.rows
    return result


def _arrange_source(
    store: TokenStore, source: Mapping[str, Any], plan: RowPlan, account: SourceAccount,
    advance: Callable[[int], None] | None,
) -> Iterator[Segments]:  # fmt: skip
    """Rows of one source, some thousand at a time."""
    truncation = Truncation(store, plan.row_tokens)
    unfinished: Segments | None = None
    for first, stop in _windows(store, source, plan.row_tokens):
        given = (store, source, first, stop, plan, account, truncation)
        match plan.packing:
            case "best_fit":
                segments = _Window(*given).cut()
                order, row_ends = pack_rows(segments.lengths, plan.row_tokens)
                yield segments.at(order, row_ends)
            case "none":
                segments = _Window(*given).cut()
                yield segments.at(slice(None), np.arange(1, len(segments.lengths) + 1))
            case "wrap":
                segments = _Window(*given).wrap(unfinished)
                finished = int(segments.row_ends[-1]) if len(segments.row_ends) else 0
                yield segments.at(slice(finished), segments.row_ends)
                unfinished = segments.at(slice(finished, None), _NO_ROWS)
        store.release_memory()
        if advance is not None:
            advance(stop - first)
    if unfinished is not None and len(unfinished.lengths):
        yield unfinished.at(slice(None), np.array([len(unfinished.lengths)]))


def _windows(store: TokenStore, source: Mapping[str, Any], row_tokens: int) -> Iterator[tuple[int, int]]:
    first = source["first_document"]
    end = first + source["num_documents"]
    fewest, most = _WINDOW_DOCUMENTS
    while first < end:
        enough = store.documents_within(first, end, _WINDOW_ROWS * row_tokens)
        # Very long documents are cut into many pieces: those of a window are bounded too.
        bounded = store.documents_within(first, end, most * row_tokens)
        stop = max(first + 1, min(max(enough, first + fewest), bounded, first + most, end))
        yield first, stop
        first = stop


class _Window:
    """Consecutive documents of one source, and what becomes of each. Tells the account."""

    def __init__(
        self, store: TokenStore, source: Mapping[str, Any], first: int, stop: int, plan: RowPlan,
        account: SourceAccount, truncation: Truncation,
    ):  # fmt: skip
        self.store, self.source, self.first, self.plan = store, source, first, plan
        self.account, self.truncation = account, truncation
        self.begins, ends = store.borders_between(first, stop)
        self.lengths = ends - self.begins
        column = plan.target_column
        self.counts_targets = store.marks_targets or column is not None
        self.targets = (
            store.document_targets(first, stop) if column is None else store.ragged_lengths(column, first, stop)
        )
        account.add_documents(self.lengths, self.targets)

    def cut(self) -> Segments:
        """The pieces to place, in the order of the store."""
        lengths, row_tokens, overlong = self.lengths, self.plan.row_tokens, self.plan.overlong
        long = np.flatnonzero(lengths > row_tokens)
        documents = np.arange(len(lengths), dtype=np.uint32)
        starts = np.zeros(len(lengths), dtype=np.uint32)
        sizes = lengths.astype(np.uint32)
        if len(long):
            self._refuse(int(long[0]))
            match overlong:
                case "truncate":
                    shape = self.source["shape"]
                    for index in long.tolist():
                        sizes[index] = self.truncation.kept_tokens(self.first + index, shape)
                case "split":
                    pieces = -(-lengths // row_tokens)
                    documents = np.repeat(documents, pieces)
                    first_piece = np.repeat(np.cumsum(pieces) - pieces, pieces)
                    starts = ((np.arange(len(documents)) - first_piece) * row_tokens).astype(np.uint32)
                    sizes = np.minimum(lengths[documents] - starts, row_tokens).astype(np.uint32)
                case _:
                    kept = lengths <= row_tokens
                    documents, starts, sizes = documents[kept], starts[kept], sizes[kept]
        segments = Segments(documents, starts, sizes, self._targets(documents, starts, sizes), _NO_ROWS)
        if not len(long):
            return self._without_poor(segments, segments.targets, np.ones(len(lengths), dtype=bool))
        left = np.bincount(documents, weights=segments.targets, minlength=len(lengths))
        placed = np.zeros(len(lengths), dtype=bool)
        placed[documents] = True
        return self._without_poor(segments, left, placed)

    def wrap(self, unfinished: Segments | None) -> Segments:
        """The stream of all documents behind the `unfinished` row, cut where rows are full."""
        placed = np.ones(len(self.lengths), dtype=bool)
        poor = self._poor(self.targets, placed)
        numbers = np.flatnonzero(~poor)
        filled = 0 if unfinished is None else int(unfinished.lengths.sum())
        lengths = self.lengths[numbers]
        cuts, which, row_ends = wrap_rows(lengths, filled, self.plan.row_tokens)
        begins = np.concatenate(([filled], cuts[:-1]))[: len(cuts)]
        starts = begins - (filled + np.cumsum(lengths) - lengths)[which]
        sizes = cuts - begins
        documents = numbers[which]
        pieces = np.bincount(documents, minlength=len(self.lengths))
        targets = self._targets(documents, starts, sizes)
        self.account.settle(self.lengths, self.targets, poor=poor, long=pieces > 1, placed=placed, policy="split")
        self.account.cut(0, int(self.targets[numbers].sum()) - int(targets.sum()))
        segments = Segments(documents + self.first, starts, sizes, targets, row_ends)
        if unfinished is None:
            return segments
        return Segments(
            np.concatenate((unfinished.documents, segments.documents)),
            np.concatenate((unfinished.starts, segments.starts)),
            np.concatenate((unfinished.lengths, segments.lengths)),
            np.concatenate((unfinished.targets, segments.targets)),
            row_ends + len(unfinished.lengths),
        )

    def _without_poor(self, segments: Segments, left: np.ndarray, placed: np.ndarray) -> Segments:
        """Leave out documents with too few targets in their pieces; a document is kept or dropped whole."""
        poor = self._poor(left, placed)
        kept = ~poor[segments.documents]
        segments = segments.at(kept if poor.any() else slice(None), _NO_ROWS)
        long = self.lengths > self.plan.row_tokens
        self.account.settle(self.lengths, self.targets, poor=poor, long=long, placed=placed, policy=self.plan.overlong)
        in_rows = placed & ~poor
        self.account.cut(
            int(self.lengths.sum(where=in_rows)) - int(segments.lengths.sum(dtype=np.int64)),
            int(self.targets.sum(where=in_rows)) - int(segments.targets.sum(dtype=np.int64)),
        )
        self._count_lost_answers(segments, np.flatnonzero(~in_rows))
        numbers = segments.documents.astype(unsigned_type(self.store.num_documents))
        numbers += self.first
        return Segments(numbers, segments.starts, segments.lengths, segments.targets, _NO_ROWS)

    def _count_lost_answers(self, segments: Segments, dropped: np.ndarray) -> None:
        """Count the answers that end behind their row, and those in `dropped` documents.

        An answer is a run of targets: its prompt or the next turn's header stands between it and the next one.
        """
        if not self.plan.packs or self.source["shape"] == "text":
            return
        cut = 0
        shortened = np.flatnonzero(segments.lengths < self.lengths[segments.documents])
        for index in shortened.tolist():
            marks = self.store.targets(self.first + int(segments.documents[index]))
            cut += len(answer_ends(marks)) - int((answer_ends(marks) <= int(segments.lengths[index])).sum())
        gone = sum(len(answer_ends(self.store.targets(self.first + number))) for number in dropped.tolist())
        self.account.lose_answers(cut, gone)

    def _poor(self, targets: np.ndarray, placed: np.ndarray) -> np.ndarray:
        if not self.counts_targets:
            return np.zeros(len(targets), dtype=bool)  # one label a document is not few
        return placed & (targets < self.plan.min_targets)

    def _targets(self, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if not self.plan.packs:
            whole: np.ndarray = self.targets[documents].astype(np.uint32)
            return whole
        begins = self.begins[documents]
        begins += starts
        ends = begins + lengths
        begins += 1
        return self.store.count_targets(begins, ends).astype(np.uint32)

    def _refuse(self, index: int) -> None:
        length, row_tokens = int(self.lengths[index]), self.plan.row_tokens
        if self.plan.overlong == "error":
            said = overlong_message(self.store.locate(self.first + index), length, row_tokens)
            raise BadDataError(f"{said}; {OVERLONG_ADVICE}")
        if self.plan.overlong == "split" and self.source["shape"] != "text":
            raise BadDataError(
                f"{self.store.locate(self.first + index)}: {length} tokens do not fit a row of {row_tokens}, and"
                " data.overlong split is for plain text: the pieces of an answer would be trained without its"
                " prompt; use truncate or drop"
            )


def answer_ends(marks: np.ndarray) -> np.ndarray:
    """The ends of the runs of targets in a document; `marks` (bool [tokens]) is true at each target."""
    ends: np.ndarray = np.flatnonzero(marks & ~np.append(marks[1:], False)) + 1
    return ends


def _require_text(sources: Sequence[Mapping[str, Any]]) -> None:
    for source in sources:
        if source["shape"] != "text":
            raise DataConfigError(
                f"data.packing: wrap is for plain text, but {source['name']} holds {source['shape']} records: answers"
                " would be cut from their prompts where a row ends; use best_fit"
            )
