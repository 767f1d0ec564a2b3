"""The model inside a tokenizer that is to be extended: its vocabulary, and how it spells words and pieces."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from data_prep.errors import DataConfigError

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class BaseModel:
    """The vocabulary and model of the tokenizer that is extended, as its tokenizer.json holds them."""

    def __init__(self, pipeline: Mapping[str, Any]):
        self.pipeline = pipeline
        self.model: Mapping[str, Any] = pipeline["model"]
        self.kind: str = self.model["type"]
        parts = json.dumps([pipeline["pre_tokenizer"], pipeline["decoder"]])
        self.is_byte_level = '"ByteLevel"' in parts
        self.added = {token["content"]: token["id"] for token in pipeline["added_tokens"]}
        self.vocabulary: dict[str, int] = (
            {piece: index for index, (piece, _) in enumerate(self.model["vocab"])}
            if self.kind == "Unigram"
            else dict(self.model["vocab"])
        )
        self.texts = {index: piece for piece, index in self.vocabulary.items()}
        self.unknown = self._unknown_id()
        #: ids that no piece may be made of: control tokens, bytes of a fallback, what stands for the unknown
        self.closed = {index for piece, index in self.vocabulary.items() if self._is_closed(piece)}
        if self.unknown is not None:
            self.closed.add(self.unknown)

    def _unknown_id(self) -> int | None:
        if self.kind == "Unigram":
            index: int | None = self.model["unk_id"]
            return index
        return self.vocabulary.get(self.model["unk_token"]) if self.model["unk_token"] else None

    def _is_closed(self, piece: str) -> bool:
        return piece in self.added or (not self.is_byte_level and _BYTE_PIECE.fullmatch(piece) is not None)

    def require_support(self) -> None:
        """DataConfigError for models that cannot be extended."""
        if self.kind not in ("BPE", "Unigram", "WordPiece"):
            raise DataConfigError(f"tokenizers of type {self.kind} cannot be extended; BPE, unigram and WordPiece can")
        if self.kind == "BPE" and (self.model["continuing_subword_prefix"] or self.model["end_of_word_suffix"]):
            raise DataConfigError("BPE tokenizers that mark the inside or end of words cannot be extended")

    def encoder(self, model: Mapping[str, Any]) -> tokenizers.Tokenizer:
        """A tokenizer of single words, as the pre-tokenizer leaves them, with the given model."""
        bare = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"))
        return tokenizers.Tokenizer.from_str(
            json.dumps({"version": "1.0", **bare, "added_tokens": [], "model": dict(model)})
        )

    def spell(self, pieces: Sequence[str]) -> list[list[int]]:
        """Base ids of pieces as they are written in the vocabulary."""
        if self.kind != "WordPiece":
            return encode_words(self.encoder(self.model), pieces)
        return [self._spell_greedily(piece) for piece in pieces]

    def _spell_greedily(self, piece: str) -> list[int]:
        """WordPiece's longest match first, also from inside a word."""
        prefix: str = self.model["continuing_subword_prefix"]
        inside, rest = piece.startswith(prefix), piece.removeprefix(prefix)
        ids = []
        while rest:
            lead = prefix if inside else ""
            stop = next((n for n in range(len(rest), 0, -1) if lead + rest[:n] in self.vocabulary), 0)
            if stop == 0:
                assert self.unknown is not None
                return [self.unknown]
            ids.append(self.vocabulary[lead + rest[:stop]])
            rest, inside = rest[stop:], True
        return ids


def encode_words(encoder: tokenizers.Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """Ids of every word."""
    return [encoding.ids for encoding in encoder.encode_batch_fast(list(words), add_special_tokens=False)]
