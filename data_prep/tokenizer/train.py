"""Trains a tokenizer on texts or on files of records: sentencepiece BPE or unigram, or byte-level BPE."""

import io
import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from data_prep.errors import CannotWriteError, DataConfigError
from data_prep.tokenizer.bpe_files import cut_words
from data_prep.tokenizer.chatml import CHAT_TEMPLATE, CHAT_TOKENS
from data_prep.tokenizer.texts import CHUNK_CHARACTERS, LearningTexts

if TYPE_CHECKING:
    from data_prep.tokenizer.tokenizer import Tokenizer

Kind = Literal["sentencepiece-bpe", "sentencepiece-unigram", "byte-bpe"]


@dataclass(frozen=True)
class Density:
    """Tokens that a sample of text takes."""

    num_tokens: int
    num_characters: int
    num_unknown: int  # tokens that stand for text the vocabulary cannot spell
    held_out: bool  # False: the sample was learned from, for there was too little text

    @property
    def tokens_per_character(self) -> float:
        return self.num_tokens / max(self.num_characters, 1)


def measure(tokenizer: "Tokenizer", sample: tuple[list[str], bool]) -> Density:
    """How many tokens `tokenizer` makes of a sample as `LearningTexts.sample` gives it."""
    texts, held_out = sample
    encoded = tokenizer.encode_batch(texts)
    num_unknown = sum(ids.count(tokenizer.unk_id) for ids in encoded) if tokenizer.unk_id is not None else 0
    return Density(sum(map(len, encoded)), sum(map(len, texts)), num_unknown, held_out)


def train_tokenizer(
    inputs: Iterable[str | Path],
    out_dir: Path,
    vocab_size: int,
    kind: Kind,
    num_threads: int = 1,
    chat: bool = False,
) -> Density:
    """Train a tokenizer with `vocab_size` ids and write it to `out_dir`; returns how densely it encodes held-out text.

    Every text can be encoded and decoded exactly, and the same inputs give the same tokenizer. With `chat` it has the
    special tokens and the template of ChatML.
    Raises CannotWriteError for an `out_dir` that holds something, and as `train_sentencepiece` does.
    """
    require_new_folder(out_dir)
    from data_prep.tokenizer.open import open_tokenizer

    texts = LearningTexts(inputs, progress=True)
    controls = CHAT_TOKENS if chat else ()
    match kind:
        case "byte-bpe":
            files = _train_byte_bpe(texts, vocab_size, controls)
        case "sentencepiece-bpe":
            files = _train_sentencepiece(texts, vocab_size, "bpe", num_threads, controls)
        case "sentencepiece-unigram":
            files = _train_sentencepiece(texts, vocab_size, "unigram", num_threads, controls)
    if chat:
        files["chat_template.jinja"] = CHAT_TEMPLATE.encode()
    write_folder(out_dir, files)
    return measure(open_tokenizer(str(out_dir)), texts.sample())


def train_sentencepiece(
    inputs: Iterable[str | Path],
    out_dir: Path,
    vocab_size: int,
    kind: Literal["unigram", "bpe"] = "bpe",
    num_threads: int = 1,
) -> None:
    """Train a sentencepiece model and write it to `out_dir` as a tokenizer folder (tokenizer.model and its config).

    An input is a text (str) or a file, folder or glob (Path) of anything that data is prepared from: every text
    in every record counts, and of plain text the whole file. Every text can be encoded and decoded exactly: no
    normalisation, blanks kept, bytes for what is unknown. Pieces: unk 0, bos 1, eos 2, pad 3. The same inputs
    give the same model.
    Raises BadDataError, MissingInputError, or DataConfigError for a vocabulary these texts cannot fill.
    """
    write_folder(out_dir, _train_sentencepiece(LearningTexts(inputs), vocab_size, kind, num_threads))


def _train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    kind: Literal["unigram", "bpe"],
    num_threads: int,
    controls: Sequence[str] = (),
) -> dict[str, bytes]:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=4 * CHUNK_CHARACTERS,  # in bytes
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=list(controls),
            num_threads=num_threads,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataConfigError(_training_fault(str(error), vocab_size)) from error
    config = {"add_bos_token": True, "add_eos_token": False}
    return {"tokenizer_config.json": json.dumps(config).encode() + b"\n", "tokenizer.model": model.getvalue()}


def _training_fault(text: str, vocab_size: int) -> str:
    """Our words for an error of the sentencepiece library; its own where it is another."""
    if match := re.search(r"value <= ([0-9]+)", text):
        return f"--vocab-size {vocab_size} is too large: these texts give at most {match[1]} pieces; write {match[1]}"
    if match := re.search(r"smaller than required_chars[^0-9]*[0-9]+ vs ([0-9]+)", text):
        return f"--vocab-size {vocab_size} is too small for the characters of these texts: write {match[1]} or more"
    if "Vocabulary size" in text and (match := re.search(r"([0-9]+)\D*$", text)):
        return f"--vocab-size {vocab_size} does not suit these texts, which need {match[1]}"
    if "sentences_.empty" in text or "Input corpus" in text:
        return "the files hold no text to learn from"
    return f"no tokenizer of {vocab_size} ids can be trained on these texts: {text.rpartition('] ')[2].strip() or text}"


def _train_byte_bpe(texts: Iterable[str], vocab_size: int, controls: Sequence[str]) -> dict[str, bytes]:
    """Special tokens bos 0, eos 1, pad 2, then `controls`, the 256 bytes, and what is merged from them."""
    bos, eos, pad = ("<s>", "</s>", "<pad>")
    specials = (bos, eos, pad, *controls)
    backend = tokenizers.Tokenizer(models.BPE())
    cut_words(backend)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in specials],
        show_progress=False,
    )
    backend.train_from_iterator(iter(texts), trainer)
    if (found := backend.get_vocab_size()) != vocab_size:
        least = 256 + len(specials)
        fault = f"at least {least} are needed" if vocab_size < found else f"they fill only {found}: write {found}"
        raise DataConfigError(f"--vocab-size {vocab_size} does not suit these texts: {fault}")
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, 0)]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
    }
    return {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode() + b"\n",
    }


def require_new_folder(out_dir: Path) -> None:
    """Raise CannotWriteError if `out_dir` holds something."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CannotWriteError(f"{out_dir}: exists and is not an empty folder; remove it or name another")


def write_folder(out_dir: Path, files: dict[str, bytes]) -> None:
    """A new folder appears whole; into one that exists every file is moved when it is complete."""
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}.") as temporary:
            staged = Path(temporary) / "tokenizer"
            staged.mkdir()
            for name, content in files.items():
                (staged / name).write_bytes(content)
            if not out_dir.exists():
                staged.rename(out_dir)
                return
            for name in files:
                (staged / name).replace(out_dir / name)
    except OSError as error:
        raise CannotWriteError(f"{error.filename or out_dir}: {error.strerror}") from error
