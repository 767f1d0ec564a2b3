"""A tokenizer: encodes, and is written as a Hugging Face folder that gives the same ids.

Everything becomes one `tokenizers` pipeline: a tokenizer.json as it is, a sentencepiece model or a BERT
vocabulary converted (see tokenizer_files.py). The same pipeline is what prepares data and what is saved,
so training and inference cannot drift apart.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken

from data_prep.tokenizer.folder_files import FolderFiles
from data_prep.tokenizer.word_borders import word_begins

#: How new tokens are spelled in older ones: written by `extend_tokenizer`, read by the engine.
EXTENSION_NAME = "extension.json"
_JOINT = "\ufdef"  # a noncharacter: no text holds it
_REMEMBERED_WORDS = 200_000  # some 30 MB
_SUB_BATCH_TEXTS = 64  # the library keeps all results of a call: larger calls cost memory and time

#: Ids of all texts, one after the other, in the type in which they are stored; int64 end of each text.
FlatIds = tuple[np.ndarray, np.ndarray]


class Tokenizer:
    """A tokenizer with its special ids and chat template. Made by `open_tokenizer`.

    prefix_ids and suffix_ids are what the tokenizer itself puts around a single text; notes: lines about what opening
    decided.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: str | None,
        extension: str | None = None,
        folder_files: FolderFiles | None = None,
        notes: tuple[str, ...] = (),
    ):
        self._folder_files = folder_files or FolderFiles()
        self.notes = notes
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self.extension = extension
        self._backend = backend
        # User text never becomes control tokens: their strings are ordinary text here.
        backend.encode_special_tokens = True

        added = self._backend.get_added_tokens_decoder()
        self.control_ids = frozenset(index for index, token in added.items() if token.special)
        self.control_strings = tuple(token.content for token in added.values() if token.special)
        self.plain_added_strings = tuple(token.content for token in added.values() if not token.special)
        self.vocab_size = self._count_ids()
        self.id_type = id_type(self.vocab_size)
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        self.unk_id = self._id_of("unk_token")
        self.mask_id = self._id_of("mask_token")
        pad_id = self._id_of("pad_token")
        self.pad_id = pad_id if pad_id is not None else self.eos_id if self.eos_id is not None else 0
        self._forbidden_ids = self.control_ids - {self.unk_id}

        around = self._backend.encode("a")
        own = [index for index, special in enumerate(around.special_tokens_mask) if not special]
        first, last = (own[0], own[-1] + 1) if own else (len(around.ids), len(around.ids))
        self.prefix_ids: list[int] = around.ids[:first]
        self.suffix_ids: list[int] = around.ids[last:]

    def _count_ids(self) -> int:
        """One more than the largest id; there may be holes below it."""
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        if self._backend.id_to_token(size - 1) is not None and self._backend.id_to_token(size) is None:
            return size  # no holes, as nearly always
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def pipeline_json(self) -> str:
        """The whole pipeline as tokenizer.json holds it."""
        return str(self._backend.to_str(pretty=False))

    def pipeline_with(self, **parts: Any) -> str:
        """`pipeline_json` with other values of some of its parts, without reading the vocabulary in it."""
        text = self.pipeline_json
        for name, value in parts.items():
            start = text.index(f'"{name}":') + len(name) + 3
            _, stop = json.JSONDecoder().raw_decode(text, start)
            text = f"{text[:start]}{json.dumps(value)}{text[stop:]}"
        return text

    def pipeline_part(self, name: str) -> Any:
        """One part of the pipeline, such as pre_tokenizer, as plain values."""
        start = self.pipeline_json.index(f'"{name}":') + len(name) + 3
        value, _ = json.JSONDecoder().raw_decode(self.pipeline_json, start)
        return value

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def remember_words(self) -> None:
        """Let a BPE remember more words than the library's 10,000, which saves a tenth of the time on large inputs."""
        resize = getattr(self._backend.model, "_resize_cache", None)
        if resize is not None:
            resize(_REMEMBERED_WORDS)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, without special tokens; strings of control tokens are encoded as plain text."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """As `encode_batch`, in arrays."""
        return self._flat(texts)

    def encode_rendered(self, texts: Sequence[str]) -> FlatIds:
        """Ids of rendered chats, in which strings of control tokens are control tokens."""
        # Only the offsets of such texts need another pipeline (see `_rendered`), so their ids come from this one.
        self._backend.encode_special_tokens = False
        try:
            return self._flat(texts)
        finally:
            self._backend.encode_special_tokens = True

    def _flat(self, texts: Sequence[str]) -> FlatIds:
        blocks: list[np.ndarray] = []
        for start in range(0, len(texts), _SUB_BATCH_TEXTS):
            batch = list(texts[start : start + _SUB_BATCH_TEXTS])
            encodings = self._backend.encode_batch_fast(batch, add_special_tokens=False)
            blocks += [np.array(encoding.ids, dtype=self.id_type) for encoding in encodings]
        ends = np.cumsum([len(block) for block in blocks], dtype=np.int64)
        return np.concatenate([np.zeros(0, dtype=self.id_type), *blocks]), ends

    def rendered_with_offsets(self, pieces: Sequence[str]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of one rendered chat given in pieces, and the character span [start, stop) of every token.

        Control tokens are found inside pieces, never across their joints.
        """
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        base = 0
        for index, piece in enumerate(pieces):
            # A text inside is not at the start: behind the joint, no pipeline gives it a blank as prefix.
            skip = 1 if index else 0
            encoding = self._joined.encode((_JOINT if index else "") + piece, add_special_tokens=False)
            ids += encoding.ids[skip:]
            offsets += [(base + start - skip, base + stop - skip) for start, stop in encoding.offsets[skip:]]
            base += len(piece)
        return ids, offsets

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and character spans of plain texts, without special tokens."""
        encodings = self._rendered_as_text.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def encode_with_words(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
        """Ids of plain texts, without special tokens, and which of them begin a word (bool [ids])."""
        encodings = self._rendered_as_text.encode_batch(list(texts), add_special_tokens=False)
        return [
            (encoding.ids, word_begins(text, encoding.offsets, encoding.word_ids))
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def encode_words(self, sentences: Sequence[Sequence[str]]) -> list[tuple[list[int], list[int | None]]]:
        """Ids of sentences given as words, and the number of the word each id belongs to."""
        if self._words_need_blanks:
            sentences = [[word if not index else f" {word}" for index, word in enumerate(words)] for words in sentences]
        encodings = self._backend.encode_batch(
            [list(words) for words in sentences], is_pretokenized=True, add_special_tokens=False
        )
        return [(encoding.ids, encoding.word_ids) for encoding in encodings]

    @cached_property
    def _words_need_blanks(self) -> bool:
        # Byte-level pipelines keep the blank before a word with it, and do not add it to words given apart.
        levels = pre_tokenizer_steps(self.pipeline_part("pre_tokenizer"))
        return any(part["type"] == "ByteLevel" and not part.get("add_prefix_space") for part in levels)

    def holds_control_ids(self, ids: Sequence[int]) -> bool:
        """True if encoded content came out with a control token in it after all."""
        return not self._forbidden_ids.isdisjoint(ids)

    @cached_property
    def forbidden(self) -> np.ndarray:
        """bool [vocab_size]: the control tokens that content must not hold."""
        table = np.zeros(self.vocab_size, dtype=bool)
        table[sorted(self._forbidden_ids)] = True
        return table

    @cached_property
    def first_forbidden(self) -> int:
        """The smallest of the forbidden ids, or the size of the vocabulary."""
        return min(self._forbidden_ids, default=self.vocab_size)

    @cached_property
    def is_byte_level(self) -> bool:
        """True if it is a BPE whose pieces spell one byte a character."""
        steps = pre_tokenizer_steps(self.pipeline_part("pre_tokenizer"))
        return type(self._backend.model).__name__ == "BPE" and any(step["type"] == "ByteLevel" for step in steps)

    def token_bytes(self, ids: np.ndarray) -> np.ndarray:
        """int32 [len(ids)]: bytes of text behind every token of a byte-level BPE, whose pieces spell one a character.

        Ids without a token have none. The pieces are looked up as they are met: a vocabulary takes long to list.
        """
        lengths: np.ndarray = self._piece_bytes[ids]
        unknown = lengths < 0
        if unknown.any():
            for index in np.unique(ids[unknown]).tolist():
                self._piece_bytes[index] = len(self._backend.id_to_token(index) or "")
            lengths = self._piece_bytes[ids]
        return lengths

    @cached_property
    def _piece_bytes(self) -> np.ndarray:
        lengths = np.full(self.vocab_size, -1, dtype=np.int32)
        for index, token in self._backend.get_added_tokens_decoder().items():
            lengths[index] = len(token.content.encode())
        return lengths

    @property
    def has_dropout(self) -> bool:
        """True if its BPE leaves out merges at random."""
        return bool(getattr(self._backend.model, "dropout", None))

    @cached_property
    def keeps_text(self) -> bool:
        """True if no normaliser changes the text before it is encoded."""
        return self._backend.normalizer is None

    @cached_property
    def pair_middle_ids(self) -> list[int]:
        """What the tokenizer itself puts between the two texts of a pair."""
        one = self._backend.encode("a", "a")
        own = [index for index, special in enumerate(one.special_tokens_mask) if not special]
        split = next(index for index, kind in enumerate(one.sequence_ids) if kind == 1)
        before = max(index for index, kind in enumerate(one.sequence_ids) if kind == 0)
        assert own
        ids: list[int] = one.ids
        return ids[before + 1 : split]

    @cached_property
    def _rendered(self) -> tokenizers.Tokenizer:
        # The post-processors of byte-level tokenizers trim blanks off the offsets; rendering needs them exact.
        return tokenizers.Tokenizer.from_str(self.pipeline_with(post_processor=None))

    @cached_property
    def _rendered_as_text(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self._rendered.to_str())
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def _joined(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self._rendered.to_str())
        backend.add_tokens([AddedToken(_JOINT, special=False, normalized=False)])
        return backend

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def files(self, chat_template: str | None) -> dict[str, str]:
        """The pipeline, config, template and extension (name -> text) of a folder of this tokenizer."""
        config = self._folder_files.settings(self.special_tokens, chat_template)
        files = {
            "tokenizer.json": self._folder_files.pipeline or self.pipeline_json,
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }
        if chat_template is not None:
            files["chat_template.jinja"] = chat_template
        if self.extension is not None:
            files[EXTENSION_NAME] = self.extension
        return files

    def all_files(self, chat_template: str | None) -> dict[str, bytes]:
        """Every file (name in the folder -> content) of a Hugging Face folder with the given chat template."""
        own = {name: text.encode() for name, text in self.files(chat_template).items()}
        return {**dict(self._folder_files.template_files()), **self._folder_files.others, **own}

    def save(self, folder: Path, chat_template: str | None = None) -> None:
        """Write a complete Hugging Face tokenizer folder; AutoTokenizer reads it to the same ids."""
        for name, content in self.all_files(chat_template or self.chat_template).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def id_type(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """The stored type of token ids."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


def pre_tokenizer_steps(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of the pre-tokenizer of a tokenizer.json, sequences taken apart."""
    if component is None:
        return []
    if component["type"] == "Sequence":
        return [part for inner in component["pretokenizers"] for part in pre_tokenizer_steps(inner)]
    return [component]
