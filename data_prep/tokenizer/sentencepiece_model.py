"""A sentencepiece model file as a `tokenizers` pipeline.

The pipeline follows the model's own settings (normalisation table, blanks, byte fallback, dummy prefix).
It differs from the sentencepiece library in one wanted way, that of Hugging Face's Llama tokenizers: a
text that begins with a blank gets no second one as dummy prefix, and neither does text after a control token.
"""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from data_prep.errors import BadDataError
from data_prep.tokenizer.ends import surround

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_UNIGRAM, _BPE = 1, 2
_BLANK = "▁"


def protect_pieces(backend: tokenizers.Tokenizer) -> None:
    """Make the control and byte pieces of a unigram model unreachable from plain text.

    Such a model finds every string of its vocabulary in the text, these too. A cut after the first
    character of such a string leaves it nothing to find.
    """
    control = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    byte_pieces = {f"<0x{byte:02X}>" for byte in range(256)} & backend.get_vocab(with_added_tokens=False).keys()
    rests: dict[str, list[str]] = {}
    for piece in sorted(control | byte_pieces):
        if len(piece) > 1:
            rests.setdefault(piece[0], []).append(_escape(piece[1:]))
    if not rests:
        return
    pattern = "|".join(f"{_escape(first)}(?={'|'.join(found)})" for first, found in rests.items())
    own = backend.pre_tokenizer
    if own is not None and json.dumps(pattern) in json.dumps(json.loads(backend.to_str())["pre_tokenizer"]):
        return  # a tokenizer that we saved before
    cut = pre_tokenizers.Split(Regex(pattern), behavior="merged_with_previous")
    backend.pre_tokenizer = cut if own is None else pre_tokenizers.Sequence([own, cut])


def _escape(text: str) -> str:
    return "".join(char if char.isalnum() else f"\\x{{{ord(char):X}}}" for char in text)


def convert_sentencepiece(model: bytes, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """A pipeline that encodes as a sentencepiece model does, and its named special tokens.

    `config` is the tokenizer_config.json beside the model, if any: special tokens and add_bos_token /
    add_eos_token. Without it bos goes before a text, or eos after it where the model has no bos (T5).
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    _refuse_unsupported(proto)
    # Nine digits name a single-precision score exactly, and survive tokenizer.json: longer ones drift when read.
    pieces = [(piece.piece, float(f"{piece.score:.9g}"), piece.type) for piece in proto.pieces]
    unknown = next(index for index, piece in enumerate(pieces) if piece[2] == _UNKNOWN)
    byte_pieces = [text for text, _, kind in pieces if kind == _BYTE]
    backend = tokenizers.Tokenizer(_unigram(pieces, unknown, byte_pieces) if trainer.model_type == _UNIGRAM
                                   else _bpe(pieces, unknown, byte_pieces))  # fmt: skip
    if steps := _normalizer_steps(normalizer):
        backend.normalizer = normalizers.Sequence(steps)
    # Where no piece reaches over a blank, words can be looked up one by one: same result, and they are cached.
    whole_text = any(_BLANK in text[1:] for text, _, kind in pieces if kind == _NORMAL)
    scheme = "first" if normalizer.add_dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_BLANK, prepend_scheme=scheme, split=not whole_text)
    backend.decoder = _decoder(bool(byte_pieces), normalizer.add_dummy_prefix)
    added = [AddedToken(text, special=kind in (_CONTROL, _UNKNOWN), normalized=False)
             for text, _, kind in pieces if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)]  # fmt: skip
    backend.add_tokens(added)
    specials = _special_tokens(proto, config)
    for text in specials.values():
        if backend.token_to_id(text) is None or text not in {token.content for token in added}:
            backend.add_tokens([AddedToken(text, special=True, normalized=False)])
    if trainer.model_type == _UNIGRAM:
        protect_pieces(backend)
    backend.post_processor = surround(
        backend,
        specials.get("bos_token") if config.get("add_bos_token", "bos_token" in specials) else None,
        specials.get("eos_token") if config.get("add_eos_token", "bos_token" not in specials) else None,
    )
    return backend, specials


def _refuse_unsupported(proto: Any) -> None:
    if not proto.pieces:
        raise BadDataError("not a tokenizer: the model has no pieces; copy or download it again")
    if proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise BadDataError("sentencepiece models of type word and char are not supported; use unigram or bpe")
    if proto.trainer_spec.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
        raise BadDataError("sentencepiece models that keep blanks as suffixes or unescaped are not supported")


def _normalizer_steps(normalizer: Any) -> list[Any]:
    """The steps of the pipeline's normalizer that do what the model's `normalizer_spec` does."""
    steps: list[Any] = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        # A blank at the start stands for the dummy prefix where there is one.
        outer = r" +\z" if normalizer.add_dummy_prefix else r"\A +| +\z"
        steps += [normalizers.Replace(Regex(outer), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    return steps


def _unigram(pieces: list[tuple[str, float, int]], unknown: int, byte_pieces: list[str]) -> models.Unigram:
    return models.Unigram([(text, score) for text, score, _ in pieces], unknown, bool(byte_pieces))


def _bpe(pieces: list[tuple[str, float, int]], unknown: int, byte_pieces: list[str]) -> models.BPE:
    vocabulary = {text: index for index, (text, _, _) in enumerate(pieces)}
    mergeable = {text for text, _, kind in pieces if kind == _NORMAL}
    ranked = sorted((-score, index, text) for index, (text, score, kind) in enumerate(pieces) if kind == _NORMAL)
    merges = [
        (text[:cut], text[cut:])
        for _, _, text in ranked
        for cut in range(1, len(text))
        if text[:cut] in mergeable and text[cut:] in mergeable
    ]
    return models.BPE(vocabulary, merges, unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=bool(byte_pieces))


def _decoder(byte_fallback: bool, dummy_prefix: bool) -> Any:
    steps: list[Any] = [decoders.Replace(_BLANK, " ")]
    if byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _special_tokens(proto: Any, config: Mapping[str, Any]) -> dict[str, str]:
    trainer = proto.trainer_spec
    specials: dict[str, str] = {}
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(trainer, f"{name}_id")
        if 0 <= index < len(proto.pieces):
            specials[f"{name}_token"] = proto.pieces[index].piece
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            specials[name] = value
    return specials
