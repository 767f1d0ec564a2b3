"""A target text for a source text, for models with an encoder and a decoder."""

from collections.abc import Sequence

import numpy as np

from data_prep.encode.blocks import Block, Column, block_of_documents, cut_columns, ragged
from data_prep.encode.content import Context, encode_texts, refuse_untrainable_at
from data_prep.errors import BadDataError
from data_prep.shapes.examples import Example, PromptExample
from data_prep.sources.records import Record
from data_prep.tasks.data_task import DataTask, DocumentView, Histogram
from data_prep.token_store import TokenStore

#: The target text with its end token.
_TARGET_IDS = Column("target_ids", per="ragged", are_targets=True)


def encode(records: Sequence[Record], examples: Sequence[Example], context: Context) -> Block:
    """Documents of a source text; the target text is a column. Raises BadDataError."""
    tokenizer = context.tokenizer
    assert tokenizer.eos_id is not None
    chosen = [one for one in examples if isinstance(one, PromptExample)]
    sources = encode_texts([one.prompt for one in chosen], records, context)
    targets = encode_texts([one.response for one in chosen], records, context)
    empty = [index for index, pair in enumerate(zip(sources, targets, strict=True)) if not all(pair)]
    refuse_untrainable_at(empty, records, "the source or the target text is empty")
    around = len(tokenizer.prefix_ids) + len(tokenizer.suffix_ids)
    documents, outputs, cut_tokens, cut_targets = [], [], [], []
    for record, source, target in zip(records, sources, targets, strict=True):
        kept = source if context.limit_tokens is None else source[: context.limit_tokens - around]
        output = _cut_target(record, target, context)
        documents.append([*tokenizer.prefix_ids, *kept, *tokenizer.suffix_ids])
        outputs.append([*output, tokenizer.eos_id])
        cut_tokens.append(len(source) - len(kept))
        cut_targets.append(len(target) - len(output))
    block = block_of_documents(documents, [record.line for record in records], context.id_type)
    columns = {**block.columns, **ragged(_TARGET_IDS, outputs, context.id_type)}
    columns |= cut_columns(cut_tokens, cut_targets)
    num_truncated = sum(map(any, zip(cut_tokens, cut_targets, strict=True)))
    return Block(columns, num_targets=len(columns[_TARGET_IDS.name]), num_truncated=num_truncated)


def _cut_target(record: Record, target: list[int], context: Context) -> list[int]:
    """The target without its end token, cut to the longest one that the settings allow."""
    limit = context.target_limit_tokens
    if limit is None or len(target) + 1 <= limit:
        return target
    if context.limit_tokens is None:
        raise BadDataError(
            f"{record.where}: a target of {len(target) + 1} tokens is longer than {limit}"
            " (data.target_tokens); raise it, or set data.overlong: truncate"
        )
    return target[: limit - 1]


def _view(store: TokenStore, document: int, start: int, stop: int) -> DocumentView:
    answer = store.ragged(_TARGET_IDS.name, document).tolist()
    return DocumentView(np.zeros(stop - start, dtype=bool), len(answer), answer=tuple(answer))


def _histograms(store: TokenStore) -> list[Histogram]:
    """Documents by the length of their target, in powers of two."""
    lengths = store.ragged_lengths(_TARGET_IDS.name)
    bits = np.bincount(np.frexp(np.maximum(lengths - 1, 0).astype(np.float64))[1])
    labels = tuple(f"\u2264{1 << power:,}" for power in range(len(bits)))
    return [Histogram("Documents by length of target", labels, "documents", tuple(bits.tolist()))]


TASK = DataTask(
    name="seq2seq_lm",
    shapes=("prompt", "alpaca", "parallel"),
    columns=(_TARGET_IDS,),
    encode=encode,
    needs_eos=True,
    learned="target",
    view=_view,
    histograms=_histograms,
)
