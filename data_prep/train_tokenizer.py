"""Trains a sentencepiece tokenizer on texts or on files of records."""

import io
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import BadDataError, CannotWriteError, DataConfigError, MissingInputError
from data_prep.records import read_records

_CHUNK_CHARACTERS = 2000


def train_sentencepiece(
    inputs: Iterable[str | Path],
    out_dir: Path,
    vocab_size: int,
    kind: Literal["unigram", "bpe"] = "bpe",
    num_threads: int = 1,
) -> None:
    """Train a sentencepiece model and write it to `out_dir` as a tokenizer folder (tokenizer.model and its config).

    An input is a text (str) or a file (Path): of a .jsonl file every text in every record, of any other
    the file itself. Every text can be encoded and decoded exactly: no normalisation, blanks kept, bytes
    for what is unknown. Pieces: unk 0, bos 1, eos 2, pad 3. The same inputs give the same model.
    Raises BadDataError, MissingInputError, or DataConfigError for a vocabulary these texts cannot fill.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(chunk for text in _texts(inputs) for chunk in _chunks(text)),
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
            max_sentence_length=4 * _CHUNK_CHARACTERS,  # in bytes
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=num_threads,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).rpartition("] ")[2].strip()
        raise DataConfigError(f"sentencepiece cannot train {vocab_size} pieces from these texts: {reason}") from error
    config = {"add_bos_token": True, "add_eos_token": False}
    files = {"tokenizer_config.json": json.dumps(config).encode() + b"\n", "tokenizer.model": model.getvalue()}
    _write_folder(out_dir, files)


def _write_folder(out_dir: Path, files: dict[str, bytes]) -> None:
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


def _texts(inputs: Iterable[str | Path]) -> Iterator[str]:
    for entry in inputs:
        if isinstance(entry, str):
            yield entry
        elif not entry.is_file():
            raise MissingInputError(f"{entry}: no such file")
        elif entry.suffix == ".jsonl":
            for record in read_records(str(entry)):
                yield from _strings(record.value)
        else:
            try:
                yield entry.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise BadDataError(f"{entry}: not UTF-8: {error.reason}") from error


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys and roles left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("role", "label"):
                yield from _strings(item)


def _chunks(text: str) -> Iterator[str]:
    """Pieces of a text that the trainer takes whole: it skips what is longer than its limit."""
    chunk = ""
    for line in text.splitlines(keepends=True):
        if len(chunk) + len(line) > _CHUNK_CHARACTERS and chunk:
            yield chunk
            chunk = ""
        if len(line) > _CHUNK_CHARACTERS:
            yield from (line[at : at + _CHUNK_CHARACTERS] for at in range(0, len(line), _CHUNK_CHARACTERS))
        else:
            chunk += line
    if chunk:
        yield chunk
