"""Where to cut a document that is longer than a row: after a whole turn, else a sentence, else at the row's end."""

from functools import cached_property

import numpy as np

from data_prep.token_store import TokenStore

_CHATS = frozenset({"messages", "sharegpt"})
_CLOSING = "\"'”’»)]*_`"
_STOPS = (".", "!", "?", "…")
_FULL_WIDTH_STOPS = ("。", "！", "？", "｡")


class Truncation:
    """Finds the cuts for one store; looks at its vocabulary once, when the first text needs it."""

    def __init__(self, store: TokenStore, row_tokens: int):
        self._store = store
        self._row_tokens = row_tokens

    def kept_tokens(self, document: int, shape: str) -> int:
        """How many tokens (1..row_tokens) to keep of `document`, which has more than a row of them.

        A conversation is cut after the last trained turn that fits whole. Other documents, and
        conversations whose first trained turn is too long already, end after the last sentence or line
        in the row's last quarter.
        """
        size = self._row_tokens
        if shape in _CHATS:
            marks = self._store.targets(document, 0, size + 1)
            turns = np.flatnonzero(marks[:-1] & ~marks[1:])
            if len(turns):
                return int(turns[-1]) + 1
        first = size - max(1, size // 4)
        ids = self._store.tokens(document, first, size + 1)
        if int(ids.max()) >= self._store.vocab_size:
            return size
        line, stop, closing, blank = (table[ids] for table in self._vocabulary)
        stop[1:] |= closing[1:] & stop[:-1]
        ends = np.flatnonzero(line[:-1] | (stop[:-1] & blank[1:]))
        return first + int(ends[-1]) + 1 if len(ends) else size

    @cached_property
    def _vocabulary(self) -> tuple[np.ndarray, ...]:
        """bool [V] each: ends a line, or a sentence whatever follows; ends a sentence if a blank follows; is
        nothing but quotes and brackets that may stand between the two; begins with a blank."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._store.tokenizer_dir / "tokenizer.json"))
        pieces = [tokenizer.id_to_token(index) or "" for index in range(self._store.vocab_size)]
        texts = tokenizer.decode_batch([[index] for index in range(len(pieces))], skip_special_tokens=False)
        joined = "##" if any(piece.startswith("##") for piece in pieces) else None
        bare = [text.rstrip(_CLOSING) for text in texts]
        line = [text.endswith("\n") or end.endswith(_FULL_WIDTH_STOPS) for text, end in zip(texts, bare, strict=True)]
        stop = [end.endswith(_STOPS) for end in bare]
        closing = [bool(text) and not end for text, end in zip(texts, bare, strict=True)]
        blank = [
            not piece.startswith(joined) if joined else piece.startswith(("Ġ", "▁", "Ċ")) or text[:1].isspace()
            for piece, text in zip(pieces, texts, strict=True)
        ]
        return tuple(np.array(table, dtype=bool) for table in (line, stop, closing, blank))
