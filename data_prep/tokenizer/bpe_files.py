"""Byte-level BPE from its older file formats: vocabulary and merges (GPT-2, Qwen2), or tiktoken's ranks (Llama 3).

Neither format says how text is cut into words. A `tokenizer_class` in tokenizer_config.json beside them does;
without one, vocabulary and merges are taken for GPT-2's, and ranks for Llama 3's.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from data_prep.errors import BadDataError, RefusedError

#: How Qwen2 cuts text into words: runs of letters with what precedes them, single digits, punctuation, blanks.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+")
_GPT2_CLASSES = {None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"}
_QWEN2_CLASSES = {"Qwen2Tokenizer", "Qwen2TokenizerFast"}
_RANK_CLASSES = {None, "PreTrainedTokenizer", "PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast"}
_END_OF_TEXT = "<|endoftext|>"
#: Llama 3.1's control tokens follow its ranks in this order; the other names of the 256 are reserved.
_LLAMA3_CONTROL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def find_bpe_files(path: Path) -> tuple[Path, Path] | None:
    """Vocabulary and merges of a folder (or beside one of the two files), under either pair of names."""
    folder = path if path.is_dir() else path.parent
    for vocabulary, merges in _PAIRS:
        named = path.is_dir() or path.name in (vocabulary, merges)
        if named and (folder / vocabulary).is_file() and (folder / merges).is_file():
            return folder / vocabulary, folder / merges
    return None


def is_rank_file(content: bytes) -> bool:
    """True if a .model file is tiktoken's list of ranks and not a sentencepiece model."""
    return _RANK_LINE.fullmatch(content[:1000].partition(b"\n")[0].rstrip(b"\r")) is not None


def open_bpe_files(
    vocabulary_file: Path, merges_file: Path, config: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The pipeline of a vocabulary (JSON: token -> id) and merges (one a line, best first), and its special tokens."""
    vocabulary = json.loads(vocabulary_file.read_bytes())
    if not isinstance(vocabulary, dict) or not all(isinstance(index, int) for index in vocabulary.values()):
        raise BadDataError(f"{vocabulary_file}: not a vocabulary (JSON object of token -> id)")
    merges = []
    for number, line in enumerate(merges_file.read_text(encoding="utf-8").split("\n"), start=1):
        if line and not (number == 1 and line.startswith("#version")):
            pair = tuple(line.removesuffix("\r").split(" "))
            if len(pair) != 2:
                raise BadDataError(f"{merges_file}:{number}: a merge is two tokens with a blank between them")
            merges.append(pair)
    name = _class_of(config, vocabulary_file, _GPT2_CLASSES | _QWEN2_CLASSES)
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    if name in _QWEN2_CLASSES:
        backend.normalizer = normalizers.NFC()
        cut_words(backend)
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    specials: dict[str, str] = {}
    if _END_OF_TEXT in vocabulary:
        backend.add_special_tokens([AddedToken(_END_OF_TEXT, special=True, normalized=False)])
        # Nothing is unknown to bytes, so it is not named unk_token: that one alone may come out of plain text.
        used = ("eos_token", "pad_token") if name in _QWEN2_CLASSES else ("bos_token", "eos_token")
        specials = dict.fromkeys(used, _END_OF_TEXT)
    return backend, specials


def open_rank_file(
    file: Path, content: bytes, config: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The pipeline of tiktoken's ranks (base64 of the bytes, blank, rank = id), and its special tokens."""
    _class_of(config, file, _RANK_CLASSES)
    ranks = _read_ranks(file, content)
    spelled = {token: "".join(_BYTE_CHARACTERS[byte] for byte in token) for token in ranks}
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    # tiktoken looks a whole word up before it merges.
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    cut_words(backend, WORD_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))
    backend.decoder = decoders.ByteLevel()
    specials: dict[str, str] = {}
    if not config.get("added_tokens_decoder"):
        reserved = iter(range(256))
        names = [_LLAMA3_CONTROL.get(place) or f"<|reserved_special_token_{next(reserved)}|>" for place in range(256)]
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in names])
        bos, eos = names[0], names[1]
        specials = {"bos_token": bos, "eos_token": eos}
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", f"{bos}:1", "$B:1"],
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    return backend, specials


def _read_ranks(file: Path, content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            text, rank = line.split()
            ranks[base64.b64decode(text, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise BadDataError(f"{file}:{number}: not a rank (base64 of the token, blank, number)") from None
    absent = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if absent is not None:
        raise BadDataError(f"{file}: has no rank for byte {absent}")
    return ranks


def _class_of(config: Mapping[str, Any], file: Path, known: set[str | None]) -> str | None:
    name = config.get("tokenizer_class")
    if config.get("auto_map"):
        raise RefusedError(f"{file}: its tokenizer_config.json brings its own code, which is never run")
    if name not in known:
        raise BadDataError(f"{file}: how {name} cuts words is not known; give the folder's tokenizer.json instead")
    return name


def cut_words(backend: tokenizers.Tokenizer, pattern: str = WORD_PATTERN) -> None:
    """Make `backend` cut text into words by a regular expression, and spell these in bytes."""
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


_BYTE_CHARACTERS = _byte_characters()
