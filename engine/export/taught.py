"""The things beside the weights that training taught, as the token store shows them: end tokens, second texts."""

from dataclasses import dataclass

import numpy as np

from data_prep.token_store import TokenStore
from engine.tasks.task import Task

_LOOKED_AT_DOCUMENTS = 2000
_MOST_BLANKS = 4
#: Of the answers, those that an added token which is no control token must end to count as an end token.
_LEAST_SHARE = 0.2


@dataclass(frozen=True)
class Taught:
    """stop_ids: control tokens that trained stretches end with. second_texts: some documents are pairs of texts."""

    stop_ids: tuple[int, ...] = ()
    second_texts: bool = False


def taught_by(store: TokenStore, task: Task) -> Taught:
    """The things that `store` teaches with `task`; end tokens are those of up to 2,000 documents spread over it."""
    pairs = task.second_texts is not None and bool(store.column(task.second_texts).any())
    if not store.marks_targets:
        return Taught(second_texts=pairs)
    num_looked_at = min(store.num_documents, _LOOKED_AT_DOCUMENTS)
    documents = np.unique(np.linspace(0, store.num_documents - 1, num_looked_at).astype(np.int64))
    return Taught(_stop_ids(store, documents), pairs)


def _stop_ids(store: TokenStore, documents: np.ndarray) -> tuple[int, ...]:
    """The added tokens that end stretches of targets; blanks behind them, which a template may train, are passed over.

    The most usual one comes first.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(store.tokenizer_dir / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder()
    blank: dict[int, bool] = {}
    counts: dict[int, int] = {}
    num_ends = 0
    for document in documents.tolist():
        ids, marks = store.tokens(document), store.targets(document)
        for end in np.flatnonzero(marks & ~np.append(marks[1:], False)).tolist():
            num_ends += 1
            for place in range(end, max(end - _MOST_BLANKS, -1), -1):
                token = int(ids[place])
                if token in added:
                    counts[token] = counts.get(token, 0) + 1
                    break
                if token not in blank:
                    blank[token] = not tokenizer.decode([token], skip_special_tokens=False).strip()
                if not blank[token]:
                    break
    taught = [
        (-count, token) for token, count in counts.items() if added[token].special or count >= _LEAST_SHARE * num_ends
    ]
    return tuple(token for _, token in sorted(taught))
