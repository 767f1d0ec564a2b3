"""Adds pieces learned from new text to an existing tokenizer; old pieces keep their ids.

The result is a tokenizer.json whose model knows the new pieces; they are no added tokens, which would be cut
out of the text before the model sees it. New ids follow the largest old one. ``extension.json`` beside it
says how the base tokenizer spells each new piece, for the engine to make its first weights of::

    {"format": 1, "base_vocab_size": 50257, "pieces": {"50257": [40792, 32368, 121], ...}}
"""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from data_prep.errors import DataConfigError, PreparationError
from data_prep.tokenizer.base_model import BaseModel
from data_prep.tokenizer.extension_pieces import NewPieces, learn_pieces
from data_prep.tokenizer.folder_files import PLAIN_CLASS
from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.texts import LearningTexts
from data_prep.tokenizer.tokenizer import EXTENSION_NAME, Tokenizer
from data_prep.tokenizer.train import Density, measure, require_new_folder, write_folder

_FORMAT = 1
_MOST_WORDS = 4_000_000
_BLANK_WORDS = re.compile("▁+[^▁]*|[^▁]+")


@dataclass(frozen=True)
class ExtensionReport:
    """What an extension brought, measured on text that was held out where there was enough."""

    num_pieces: int
    num_parts: int  # of these, pieces that only build longer ones
    before: Density
    after: Density
    new_tokens: int  # tokens of the sample that are new pieces
    most_used: tuple[tuple[str, int], ...]  # the new pieces that stand most often in the sample, as text


def extend_tokenizer(base_name: str, inputs: Iterable[str | Path], out_dir: Path, num_pieces: int) -> ExtensionReport:
    """Learn `num_pieces` pieces from the inputs (as `train_sentencepiece` takes them) and write the larger tokenizer.

    Fewer are added when no more pieces occur twice. Checked before `out_dir` appears: ids and names of old
    pieces and special tokens, and that what could be encoded and decoded exactly still can.
    Raises CannotWriteError for an `out_dir` that holds something, DataConfigError for a kind of tokenizer
    that cannot be extended or texts with nothing to learn, and as `open_tokenizer` and `train_sentencepiece` do.
    """
    require_new_folder(out_dir)
    base = open_tokenizer(base_name)
    saved = json.loads(base.files(None)["tokenizer.json"])
    limits = {name: saved[name] for name in ("truncation", "padding")}
    pipeline = {**json.loads(base.pipeline_json), **limits}
    model = BaseModel(pipeline)
    model.require_support()
    texts = LearningTexts(inputs, progress=True)
    pieces = learn_pieces(model, _count_words(pipeline, texts, model), num_pieces)
    if not pieces.pieces:
        raise DataConfigError("the texts hold no piece that occurs twice and that the tokenizer does not have")
    files = {
        "tokenizer.json": json.dumps(_extended(model, pieces, base.vocab_size), ensure_ascii=False),
        "tokenizer_config.json": _config(base),
        EXTENSION_NAME: _spelling(model, pieces, base),
    }
    if base.chat_template is not None:
        files["chat_template.jinja"] = base.chat_template
    contents = {name: text.encode() for name, text in files.items()}
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder) / "tokenizer", contents)
        extended = open_tokenizer(str(Path(folder) / "tokenizer"))
    sample = texts.sample()
    _check(base, extended, len(pieces.pieces), sample[0])
    write_folder(out_dir, contents)
    return _report(base, extended, pieces, sample)


def _count_words(pipeline: dict[str, Any], texts: Iterable[str], model: BaseModel) -> Counter[str]:
    """Words as the model gets them, and how often; strings of added tokens left out."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(pipeline))
    strings = sorted(model.added, key=len, reverse=True)
    added = re.compile("|".join(map(re.escape, strings))) if strings else None
    words: Counter[str] = Counter()
    for text in texts:
        for part in added.split(text) if added else [text]:
            if backend.normalizer is not None:
                part = backend.normalizer.normalize_str(part)
            cutter = backend.pre_tokenizer
            cut = [part] if cutter is None else [word for word, _ in cutter.pre_tokenize_str(part)]
            if not model.is_byte_level:  # some pipelines leave the whole text to the model
                cut = [word for whole in cut for word in _BLANK_WORDS.findall(whole)]
            words.update(cut)
        if len(words) > _MOST_WORDS:  # words that came once in so much text would not become pieces
            words = Counter({word: count for word, count in words.items() if count > 1})
    words.pop("", None)
    return words


def _extended(model: BaseModel, new: NewPieces, first: int) -> dict[str, Any]:
    """The pipeline with the new pieces from id `first`.

    Added tokens move into the model's vocabulary, with their ids: outside it they would be numbered
    from its size when the file is read, and so collide with the new pieces.
    """
    values = dict(model.model)
    if model.kind == "Unigram":
        lowest = min(score for _, score in values["vocab"])
        by_id = {index: text for text, index in model.added.items()}
        between = [(by_id[index], lowest) for index in range(len(values["vocab"]), first)]
        values["vocab"] = [*values["vocab"], *between, *zip(new.pieces, new.scores, strict=True)]
    else:
        numbered = {piece: first + place for place, piece in enumerate(new.pieces)}
        values["vocab"] = {**model.vocabulary, **model.added, **numbered}
    if model.kind == "BPE":
        values["merges"] = [*values["merges"], *map(list, new.merges)]
    return {**model.pipeline, "model": values}


def _config(base: Tokenizer) -> str:
    """The base's tokenizer_config.json; its class may cut text in its own way, so the plain one takes its place."""
    values = json.loads(base.files(None)["tokenizer_config.json"]) | {"tokenizer_class": PLAIN_CLASS}
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _spelling(model: BaseModel, new: NewPieces, base: Tokenizer) -> str:
    """extension.json; of a base that was itself extended, with its own new pieces, which may spell ours."""
    first: dict[str, Any] = {"base_vocab_size": base.vocab_size, "pieces": {}}
    earlier = json.loads(base.extension) if base.extension else first
    pieces = dict(earlier["pieces"])
    for place, ids in enumerate(model.spell(new.pieces)):
        pieces[str(base.vocab_size + place)] = ids
    return json.dumps({"format": _FORMAT, "base_vocab_size": earlier["base_vocab_size"], "pieces": pieces}) + "\n"


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    model = BaseModel(json.loads(tokenizer.pipeline_json))
    return {**model.vocabulary, **model.added}


def _check(base: Tokenizer, extended: Tokenizer, num_new: int, sample: list[str]) -> None:
    """What must not have changed. A fault is ours: the files are not written, exit code 70."""
    old, new = _vocabulary(base), _vocabulary(extended)
    faults = []
    if any(new.get(piece) != index for piece, index in old.items()):
        faults.append("an old piece has another id")
    if sorted(set(new.values()) - set(old.values())) != list(range(base.vocab_size, base.vocab_size + num_new)):
        faults.append("new ids do not follow the old ones")
    same = ("special_tokens", "control_ids", "prefix_ids", "suffix_ids", "chat_template")
    faults += [f"{name} changed" for name in same if getattr(base, name) != getattr(extended, name)]
    texts = [*sample, *base.control_strings]
    for text, before, after in zip(texts, base.encode_batch(texts), extended.encode_batch(texts), strict=True):
        if base.decode(before) == text != extended.decode(after):
            faults.append(f"a text no longer comes back as it was: {text[:40]!r}")
        if extended.holds_control_ids(after) and not base.holds_control_ids(before):
            faults.append(f"plain text became a control token: {text[:40]!r}")
    if faults:
        raise PreparationError(f"the extended tokenizer failed its check, nothing was written: {'; '.join(faults[:3])}")


def _report(base: Tokenizer, extended: Tokenizer, pieces: NewPieces, sample: tuple[list[str], bool]) -> ExtensionReport:
    uses = Counter(index for ids in extended.encode_batch(sample[0]) for index in ids if index >= base.vocab_size)
    most = tuple((extended.decode([index]), count) for index, count in uses.most_common(10))
    return ExtensionReport(
        len(pieces.pieces), pieces.num_parts, measure(base, sample), measure(extended, sample), uses.total(), most
    )
