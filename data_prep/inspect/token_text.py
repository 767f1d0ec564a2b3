"""Tokens as text that is safe and clear to show: whole characters, visible blanks, nothing that a terminal obeys."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import pre_tokenizers

from data_prep.errors import BadDataError

#: What encloses trained text where there is no colour; in shown text they are escaped.
OPEN, CLOSE = "\u27e6", "\u27e7"
_FIRST_IDEOGRAPH = "\u2e80"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SIGNS = {"\n": "\u21b5\n", "\t": "\u21e5", "\u007f": "\u2421"} | {
    chr(code): chr(0x2400 + code) for code in range(32) if code not in (9, 10)
}

Run = tuple[str, bool]  # text to show, and whether it is a sign that stands for something else


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of tokens [start, stop): one token, or several that share a character.

    Bytes that are no UTF-8 are lone surrogates (Python's surrogateescape).
    """

    text: str
    start: int
    stop: int
    control: bool  # a special token, shown by its name


class TokenText:
    """What every token of a prepared store's tokenizer stands for."""

    def __init__(self, tokenizer_dir: Path):
        """Read ``tokenizer_dir/tokenizer.json``. Raises BadDataError when that is no tokenizer."""
        file = tokenizer_dir / "tokenizer.json"
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise BadDataError(f"{file}: not a tokenizer: {error}; prepare the data again") from error
        self.model = type(self._backend.model).__name__
        self.vocab_size = self._backend.get_vocab_size(with_added_tokens=True)
        self._added = self._backend.get_added_tokens_decoder()
        self.control_tokens = {index: token.content for index, token in self._added.items() if token.special}
        decoder = self._backend.decoder
        state = "" if decoder is None else json.dumps(json.loads(decoder.__getstate__()))
        self.byte_level = '"ByteLevel"' in state
        self.byte_fallback = '"ByteFallback"' in state
        self._byte_of = _byte_level_alphabet() if self.byte_level else {}
        self._anchor = 0 if self.byte_level else self._find_anchor()
        self._known: dict[int, bytes] = {}

    def _find_anchor(self) -> int:
        """A plain token that the text of others is read behind, so that decoders take none for the first."""
        for index in range(self.vocab_size):
            if index not in self._added and self._decode([index]).isalnum():
                return index
        return 0

    def _decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def token_bytes(self, index: int) -> bytes:
        """The bytes that one token adds to a text; its name for control tokens and ids without a token."""
        if index not in self._known:
            self._known[index] = self._bytes_of(index)
        return self._known[index]

    def _bytes_of(self, index: int) -> bytes:
        if index in self._added:
            return self._added[index].content.encode()
        token = self._backend.id_to_token(index)
        if token is None:
            return f"<no token {index}>".encode()
        if self.byte_level and all(char in self._byte_of for char in token):
            return bytes(self._byte_of[char] for char in token)
        if self.byte_fallback and (match := _BYTE_PIECE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        before, both = self._decode([self._anchor]), self._decode([self._anchor, index])
        added = both[len(before) :] if both.startswith(before) else self._decode([index])
        # WordPiece knows no blanks: its decoder puts one before every word, and before every ideograph too.
        ideograph = self.model == "WordPiece" and token[0] >= _FIRST_IDEOGRAPH
        return (added.lstrip(" ") if ideograph else added).encode()

    def pieces(self, ids: Sequence[int], kinds: Sequence[object], from_start: bool = True) -> list[Piece]:
        """The text of `ids` in order; a piece never joins tokens of different kind.

        `from_start`: the ids begin a text, whose first blank some tokenizers add and take off again.
        """
        found: list[Piece] = []
        held, start = b"", 0
        for index, token in enumerate(ids):
            control = token in self.control_tokens
            if held and (control or kinds[index] != kinds[start]):
                found.append(Piece(held.decode("utf-8", "surrogateescape"), start, index, False))
                held = b""
            start = start if held else index
            held += self.token_bytes(token)
            if control or not _ends_inside_character(held):
                found.append(Piece(held.decode("utf-8", "surrogateescape"), start, index + 1, control))
                held = b""
        if held:
            found.append(Piece(held.decode("utf-8", "surrogateescape"), start, len(ids), False))
        return self._without_added_blank(found, ids) if from_start and not self.byte_level else found

    def _without_added_blank(self, pieces: list[Piece], ids: Sequence[int]) -> list[Piece]:
        for position, piece in enumerate(pieces):
            if not piece.control:
                if piece.text.startswith(" ") and piece.stop == piece.start + 1:
                    pieces[position] = Piece(self._decode([ids[piece.start]]), piece.start, piece.stop, False)
                break
        return pieces


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level tokenizers: printable Latin-1 is itself, the rest follows from U+0100 on."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    own = {chr(byte): byte for byte in range(256) if chr(byte) in alphabet}
    others = [byte for byte in range(256) if byte not in own.values()]
    return own | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _ends_inside_character(data: bytes) -> bool:
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return 0xC2 <= byte <= 0xF4 and back < length
        if byte < 0x80:
            return False
    return False


def visible(texts: Sequence[str]) -> list[list[Run]]:
    """How to show every text of a consecutive sequence, as runs of plain text and signs.

    Line breaks, tabs and all blanks but single ones between words become signs; control characters,
    escape sequences, direction marks and other characters without a shape are written out.
    """
    shown = []
    for position, text in enumerate(texts):
        before = texts[position - 1][-1:] if position else ""
        after = next((later[0] for later in texts[position + 1 : position + 3] if later), "")
        shown.append(_runs(text, before, after))
    return shown


def _runs(text: str, before: str, after: str) -> list[Run]:
    runs: list[Run] = []
    plain = 0
    for index, char in enumerate(text):
        if char == " ":
            left = text[index - 1] if index else before
            right = text[index + 1] if index + 1 < len(text) else after
            sign = None if left and right and not (left + right).count(" ") and not _breaks(left, right) else "\u00b7"
        elif char.isprintable() and char not in (OPEN, CLOSE):
            continue
        else:
            sign = _SIGNS.get(char) or _written_out(char)
        if sign is not None:
            if plain < index:
                runs.append((text[plain:index], False))
            runs.append((sign, True))
            plain = index + 1
    if plain < len(text):
        runs.append((text[plain:], False))
    return runs


def _breaks(left: str, right: str) -> bool:
    return left in "\n\t\r" or right in "\n\t\r"


def _written_out(char: str) -> str:
    code = ord(char)
    return f"<0x{code - 0xDC00:02X}>" if 0xDC80 <= code <= 0xDCFF else f"<U+{code:04X}>"


def clean(text: str) -> str:
    """A name or message in one line, with nothing in it that a terminal obeys."""
    return "".join(char if char.isprintable() else _SIGNS.get(char, "").strip() or _written_out(char) for char in text)
