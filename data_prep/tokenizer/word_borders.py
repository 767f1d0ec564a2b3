"""Finds where words begin in the tokens of a text, from the tokenizer's own words, the blanks, and the scripts."""

from collections.abc import Sequence

import numpy as np

#: Scripts that put no blanks between words (Thai to Lao, Myanmar, Khmer, Chinese and Japanese with their full stops
#: and full-width signs), as first and last code points. Each of their tokens is a word of its own.
_WITHOUT_BLANKS = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x9FFF), (0xF900, 0xFAFF), (0xFF00, 0xFFEF),
    (0x20000, 0x3FFFF),
)  # fmt: skip
_BLANKS = np.array([ord(blank) for blank in " \t\n\r\u00a0\u2581"], dtype=np.uint32)
#: A run of more tokens without a blank, as in an address, counts as several words.
_LONGEST_WORD = 16


def word_begins(text: str, offsets: Sequence[tuple[int, int]], words: Sequence[int | None]) -> np.ndarray:
    """bool [tokens]: which tokens of `text` begin a word.

    `offsets` [tokens] are their characters [start, stop), `words` [tokens] the numbers of the pre-tokenizer's words.
    Pre-tokenizers may give a whole line as one word: there a blank begins the next one.
    """
    if not offsets:
        return np.zeros(0, dtype=bool)
    spans = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    numbers = np.array([-1 if number is None else number for number in words], dtype=np.int64)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    first = np.minimum(spans[:, 0], len(codes) - 1)
    before = np.maximum(first - 1, 0)
    apart = np.ones(len(spans), dtype=bool)  # a character may be spelled in several tokens, which belong together
    apart[1:] = (spans[1:, 0] >= spans[:-1, 1]) & (spans[1:, 0] > spans[:-1, 0])
    starts: np.ndarray = apart & (
        np.isin(codes[first], _BLANKS) | _is_without_blanks(codes[first]) | _is_without_blanks(codes[before])
    )
    starts[1:] |= numbers[1:] != numbers[:-1]
    starts[0] = True
    begins = np.flatnonzero(starts)
    inside = np.arange(len(starts)) - np.repeat(begins, np.diff(begins, append=len(starts)))
    begun: np.ndarray = starts | (inside % _LONGEST_WORD == 0)
    return begun


def _is_without_blanks(codes: np.ndarray) -> np.ndarray:
    result = np.zeros(len(codes), dtype=bool)
    for first, last in _WITHOUT_BLANKS:
        result |= (codes >= first) & (codes <= last)
    return result
