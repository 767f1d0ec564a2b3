"""What turns texts into ids: the `tokenizers` library, or gigatoken where it gives exactly the same ids.

gigatoken (an optional extra) encodes byte-level BPE some twenty times faster. It is used only behind a
gate: fixed canary texts when it is opened, the first texts of every process and a sample of all others are
encoded by both, and one different id ends the preparation.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.errors import BadDataError, DataConfigError
from data_prep.tokenizer.tokenizer import FlatIds, Tokenizer, pre_tokenizer_steps

_GATE_FIRST_TEXTS = 256
_GATE_FIRST_CHARACTERS = 1 << 13
_GATE_EVERY_TEXTS = 1024
_GATE_EVERY_CHARACTERS = 4 << 20
_GATE_CHARACTERS = 512  # the other encoder is a hundred times slower: of long texts it sees the start
_JOIN_BELOW_CHARACTERS = 1024
_JOIN_FROM_TEXTS = 16  # joining fewer costs more than it saves
_MEASURED_EVERY_CHARACTERS = 4 << 20  # how often the growth of the process is looked at
_JOIN_CHUNK_CHARACTERS = 1 << 20
_GROWTH_LIMIT_BYTES = 512 << 20
_SEPARATOR = "\ufdee"  # a noncharacter that only ever stands between texts
_CANARIES = (
    "a", " a", "  a b\n\n c\t\td ", "I'll don't WE'VE it's", "1234567 12,345.67 ½ ٣", "naïve café ﬁ Å e\u0301 Å",
    "漢字とカナ 한국어", "\u200b\u200d\ufeff\u00a0x", "👩‍👩‍👧 🇩🇪", "a\u0300\u0301\u0302b", "\x00\x01\x7f", "\r\n\r\n",
    "def f(x):\n    return {'a': [1, 2]}  # done\n", "https://a.b/c?d=e&f=g#h", "مرحبا שלום नमस्ते", "\U0010ffff",
)  # fmt: skip


class Backend(Protocol):
    """Encodes batches of texts to ids in their stored type, laid end to end, and the int64 end of each text."""

    name: str

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Plain texts: control strings in them are ordinary text."""
        ...

    def encode_rendered(self, texts: Sequence[str]) -> FlatIds:
        """Rendered conversations: control strings in them are control tokens."""
        ...


class TokenizersBackend:
    """The `tokenizers` library as it is."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer):
        tokenizer.remember_words()
        self.encode = tokenizer.encode_flat
        self.encode_rendered = tokenizer.encode_rendered


class GigatokenBackend:
    """gigatoken behind the gate, made ready for plain texts or for `rendered` conversations.

    Raises DataConfigError for a tokenizer that it does not encode the same way.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer, rendered: bool = False):
        self._reference = tokenizer
        self._added: list[dict[str, Any]] = tokenizer.pipeline_part("added_tokens")
        self._references = {"plain": tokenizer.encode_flat, "rendered": tokenizer.encode_rendered}
        self._separator_id = tokenizer.vocab_size
        self._refuse_unsafe()
        self._texts_since_gate = self._characters_since_gate = self._characters_since_measured = 0
        self._first_characters = _GATE_FIRST_CHARACTERS
        self._engines: dict[str, Any] = {}
        self._opened_bytes = _resident_bytes()
        self._engine("rendered" if rendered else "plain")  # what cannot be opened is told at once

    def _refuse_unsafe(self) -> None:
        """What gigatoken 0.10 reads without complaint but encodes in its own way."""
        flags = [token for token in self._added if token["single_word"] or token["lstrip"] or token["rstrip"]]
        normalizer = self._reference.pipeline_part("normalizer")
        steps = pre_tokenizer_steps(self._reference.pipeline_part("pre_tokenizer"))
        splits = any(step["type"] == "Split" or (step["type"] == "ByteLevel" and step["use_regex"]) for step in steps)
        if (
            not self._reference.is_byte_level
            or flags
            or not splits
            or any(step.get("add_prefix_space") for step in steps)
            or self._reference.has_dropout
            or (normalizer is not None and normalizer["type"] != "NFC")
        ):
            raise DataConfigError("gigatoken encodes byte-level BPE tokenizers only (data.backend)")

    def _engine(self, kind: str) -> Any:
        """The engine for ``plain`` texts or ``rendered`` conversations, opened and tried on the canaries when needed.

        Its cache of words has no bound, so it is opened anew when the process has grown too much.
        """
        if self._characters_since_measured >= _MEASURED_EVERY_CHARACTERS:
            self._characters_since_measured = 0
            if _resident_bytes() > self._opened_bytes + _GROWTH_LIMIT_BYTES:
                self._engines.clear()
                self._opened_bytes = _resident_bytes()
        engine = self._engines.get(kind)
        if engine is None:
            plain = kind == "plain"
            engine = self._load([token for token in self._added if not (plain and token["special"])])
            self._engines[kind] = engine
            self._gate(_CANARIES, self._encode(engine, _CANARIES), self._references[kind])
        return engine

    def _load(self, added: list[dict[str, Any]]) -> Any:
        from gigatoken.gigatoken_rs import load_hf_json

        separator = {
            "id": self._separator_id, "content": _SEPARATOR, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }  # fmt: skip
        try:
            return load_hf_json(self._reference.pipeline_with(added_tokens=[*added, separator], post_processor=None))
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise DataConfigError(f"gigatoken cannot open this tokenizer (data.backend): {reason}") from error

    def encode(self, texts: Sequence[str]) -> FlatIds:
        """Plain texts: control strings in them are ordinary text. Raises BadDataError if the gate closes."""
        return self._gated(texts, "plain")

    def encode_rendered(self, texts: Sequence[str]) -> FlatIds:
        """Rendered conversations. Raises BadDataError if the gate closes."""
        return self._gated(texts, "rendered")

    def _encode(self, engine: Any, texts: Sequence[str]) -> FlatIds:
        blocks: list[np.ndarray] = []
        sizes: list[int] = []
        short: list[str] = []
        characters = 0
        for text in texts:
            if len(text) < _JOIN_BELOW_CHARACTERS and characters < _JOIN_CHUNK_CHARACTERS:
                short.append(text)
                characters += len(text)
                continue
            self._encode_short(engine, short, blocks, sizes)
            short, characters = [], 0
            ids = engine.encode(text)
            blocks.append(ids)
            sizes.append(len(ids))
        self._encode_short(engine, short, blocks, sizes)
        stored = self._reference.id_type
        if not blocks:
            return np.zeros(0, dtype=stored), np.zeros(0, dtype=np.int64)
        # Its ids are those of the vocabulary it was given, so they fit.
        return np.concatenate(blocks, dtype=stored, casting="unsafe"), np.cumsum(sizes, dtype=np.int64)

    def _encode_short(self, engine: Any, texts: list[str], blocks: list[np.ndarray], sizes: list[int]) -> None:
        """Many short texts in one call, which costs less than a call each; the separators are taken out again."""
        if len(texts) < _JOIN_FROM_TEXTS:
            found = [engine.encode(text) for text in texts]
            blocks += found
            sizes += map(len, found)
            return
        ids = engine.encode(_SEPARATOR.join(texts))
        inside = ids != self._separator_id
        blocks.append(ids[inside])
        sizes += (np.diff(np.flatnonzero(~inside), prepend=-1, append=len(ids)) - 1).tolist()

    def _gated(self, texts: Sequence[str], kind: str) -> FlatIds:
        """Ids of `texts`, a sample of which both encode; long ones by their start. Beyond ASCII is preferred."""
        engine, reference = self._engine(kind), self._references[kind]
        if any(_SEPARATOR in text for text in texts):
            joined: FlatIds = reference(texts)
            return joined
        result = self._encode(engine, texts)
        characters = sum(map(len, texts))
        self._texts_since_gate += len(texts)
        self._characters_since_gate += characters
        self._characters_since_measured += characters
        chosen: list[int] = []
        if self._first_characters > 0:
            for index, text in enumerate(texts[:_GATE_FIRST_TEXTS]):
                self._first_characters -= min(len(text), _GATE_CHARACTERS)
                chosen.append(index)
                if self._first_characters <= 0:
                    break
        elif self._texts_since_gate >= _GATE_EVERY_TEXTS or self._characters_since_gate >= _GATE_EVERY_CHARACTERS:
            chosen = [next((index for index, text in enumerate(texts) if not text.isascii()), len(texts) // 2)]
        if chosen:
            self._texts_since_gate = self._characters_since_gate = 0
            self._compare(texts, result, chosen, engine, reference)
        return result

    def _compare(self, texts: Sequence[str], result: FlatIds, chosen: list[int], engine: Any, reference: Any) -> None:
        ids, ends = result
        parts, sample = [], []
        for index in chosen:
            short = len(texts[index]) <= _GATE_CHARACTERS
            sample.append(texts[index][:_GATE_CHARACTERS])
            start = int(ends[index - 1]) if index else 0
            parts.append(ids[start : ends[index]] if short else self._encode(engine, sample[-1:])[0])
        sizes = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._gate(sample, (np.concatenate([ids[:0], *parts]), sizes), reference)

    def _gate(self, texts: Sequence[str], result: FlatIds, reference: Any) -> None:
        ids, ends = reference(texts)
        if not (np.array_equal(ids, result[0]) and np.array_equal(ends, result[1])):
            raise BadDataError(
                f"gigatoken and tokenizers encode a text differently (one of {len(texts)} that begin"
                f" {texts[0][:40]!r}); set data.backend: tokenizers"
            )


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def open_backend(choice: str, tokenizer: Tokenizer, rendered: bool = False) -> Backend:
    """The backend that data.backend asks for; ``auto``: gigatoken where it is installed and passes the gate.

    `rendered`: conversations will come first. It encodes both kinds of text in any case.
    """
    if choice == "tokenizers":
        return TokenizersBackend(tokenizer)
    if importlib.util.find_spec("gigatoken") is None:
        if choice == "gigatoken":
            raise DataConfigError("data.backend: gigatoken is not installed; pip install 'fulltune[fast]'")
        return TokenizersBackend(tokenizer)
    try:
        return GigatokenBackend(tokenizer, rendered)
    except (DataConfigError, BadDataError):
        if choice == "gigatoken":
            raise
        return TokenizersBackend(tokenizer)
