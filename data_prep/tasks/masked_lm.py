"""Texts whose masked words are predicted: documents with the tokenizer's special tokens, and where their words begin.

Which words are masked is drawn at training, anew at every step; a store holds what may be.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.encode.blocks import Block, Column, block_of_documents, cut_columns
from data_prep.encode.content import Context, refuse_untrainable_at
from data_prep.errors import BadDataError
from data_prep.shapes.examples import Example, TextExample
from data_prep.sources.records import Record
from data_prep.tasks.data_task import DataTask, DocumentView
from data_prep.token_store import TokenStore

_SPECIAL, _FIRST, _FURTHER = 0, 1, 2
#: 1 for the first token of a word, 2 for its further ones, 0 for special and unknown tokens, which are never masked.
_WORD_PIECES = Column("word_pieces", per="token")


def encode(records: Sequence[Record], examples: Sequence[Example], context: Context) -> Block:
    """A document for every text, or several where a longer one is split; their targets are what may be masked.

    Raises BadDataError.
    """
    tokenizer = context.tokenizer
    texts = [one.text for one in examples if isinstance(one, TextExample)]
    encoded = tokenizer.encode_with_words(texts)
    known = [any(token != tokenizer.unk_id for token in ids) for ids, _ in encoded]
    faulty = [place for place, is_known in enumerate(known) if not is_known]
    refuse_untrainable_at(faulty, records, "the text is empty, or the tokenizer knows no word of it")
    documents: list[list[int]] = []
    pieces: list[np.ndarray] = []
    owners: list[int] = []
    cut: list[int] = []
    for number, (record, (ids, starts)) in enumerate(zip(records, encoded, strict=True)):
        if tokenizer.holds_control_ids(ids):
            raise BadDataError(
                f"{record.where}: this tokenizer turns part of the text into a control token", "control_token"
            )
        stretches = list(_stretches(starts, context))
        for begin, stop in stretches if context.splits else stretches[:1]:
            documents.append([*tokenizer.prefix_ids, *ids[begin:stop], *tokenizer.suffix_ids])
            pieces.append(_word_pieces(ids[begin:stop], starts[begin:stop], context))
            owners.append(number)
            cut.append(0 if context.splits else len(ids) - stop)
    return _block(records, documents, np.concatenate(pieces), owners, cut, context)


def _block(
    records: Sequence[Record],
    documents: Sequence[Sequence[int]],
    pieces: np.ndarray,
    owners: Sequence[int],
    cut: Sequence[int],
    context: Context,
) -> Block:
    block = block_of_documents(documents, [records[owner].line for owner in owners], context.id_type)
    marked = (pieces != _SPECIAL).astype(np.uint8)
    columns = {**block.columns, "marks": marked, _WORD_PIECES.name: pieces, **cut_columns(cut, cut)}
    num_split = int(np.count_nonzero(np.bincount(owners, minlength=len(records)) > 1))
    return Block(
        columns,
        num_targets=int(marked.sum(dtype=np.int64)),
        num_truncated=sum(tokens > 0 for tokens in cut),
        num_extra=len(documents) - len(records),
        notes={"texts_split": num_split},
        owners=np.array(owners),
    )


def _stretches(starts: np.ndarray, context: Context) -> Iterator[tuple[int, int]]:
    """Begin and stop of the stretches of a text that fit a row, whole words where a word fits."""
    if context.limit_tokens is None:
        yield 0, len(starts)
        return
    room = context.limit_tokens - len(context.tokenizer.prefix_ids) - len(context.tokenizer.suffix_ids)
    begin = 0
    while len(starts) - begin > room:
        inner = np.flatnonzero(starts[begin + 1 : begin + room + 1])
        stop = begin + (int(inner[-1]) + 1 if len(inner) else room)
        yield begin, stop
        begin = stop
    yield begin, len(starts)


def _word_pieces(ids: Sequence[int], starts: np.ndarray, context: Context) -> np.ndarray:
    """The column of one document, of which `ids` are the tokens between the special ones; words begin at `starts`."""
    tokenizer = context.tokenizer
    body = np.where(starts, _FIRST, _FURTHER)
    body[:1] = _FIRST  # a word longer than a row goes on in the next document
    if tokenizer.unk_id is not None:
        unknown = np.array(ids) == tokenizer.unk_id
        body[1:][unknown[:-1]] = _FIRST  # what follows an unknown token is a word of its own
        body[unknown] = _SPECIAL
    around = [np.full(len(ids), _SPECIAL) for ids in (tokenizer.prefix_ids, tokenizer.suffix_ids)]
    return np.concatenate([around[0], body, around[1]]).astype(np.uint8)


def _view(store: TokenStore, document: int, start: int, stop: int) -> DocumentView:
    pieces = store.token_column(_WORD_PIECES.name, document, start, stop)
    return DocumentView(pieces == _FIRST, int((pieces != _SPECIAL).sum()))


TASK = DataTask(
    name="masked_lm",
    shapes=("text",),
    columns=(_WORD_PIECES,),
    encode=encode,
    marks_tokens=True,
    splits=True,
    needs_mask=True,
    learned="begins a word",
    view=_view,
)
