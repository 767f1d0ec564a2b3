"""Small real tokenizers and record files for the tests of data preparation."""

import functools
import json
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from repository import ROOT
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from data_prep.token_store import Rows, TokenStore, open_rows
from data_prep.tokenizer.train import train_sentencepiece

SAMPLES = Path(os.environ.get("FULLTUNE_SAMPLES", ROOT.parent / "shared" / "data"))

WORDS = (
    "the river runs under an old stone bridge while children watch boats and birds drift past in warm evening light "
    "nobody answers when a merchant asks how many barrels of oil were sold before winter Zürich naïve café 漢字 "
    "def return import class self value index range print User Assistant System number 12 345 9.5 "
).split()


def sentences(count: int, seed: int = 0, longest_words: int = 40) -> list[str]:
    """Texts of random words; the same for the same arguments."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest_words))) for _ in range(count)]


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@functools.cache
def _byte_level_json(bos: str, eos: str, add_bos: bool, extra: tuple[str, ...]) -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(sentences(400), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (bos, eos, *extra)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return str(tokenizer.to_str())


def byte_level_folder(
    folder: Path,
    chat_template: str | None = None,
    bos: str = "<|begin|>",
    eos: str = "<|end|>",
    add_bos: bool = False,
    extra: tuple[str, ...] = (),
) -> Path:
    """A Hugging Face folder of a byte-level BPE with the given special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_byte_level_json(bos, eos, add_bos, extra), encoding="utf-8")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@functools.cache
def _sentencepiece_model(kind: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        train_sentencepiece(sentences(1500, longest_words=200), Path(folder) / kind, 380, kind)
        return (Path(folder) / kind / "tokenizer.model").read_bytes()


def sentencepiece_folder(folder: Path, kind: str = "bpe") -> Path:
    """A folder as `train_sentencepiece` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_sentencepiece_model(kind))
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true, "add_eos_token": false}', encoding="utf-8")
    return folder


def bert_vocabulary(path: Path) -> Path:
    """A vocab.txt of letters and some words; one piece holds a line separator."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a\u2028b",
        *letters,
        *(f"##{letter}" for letter in letters),
    ]
    pieces += sorted({word.lower() for word in WORDS if word.isascii() and word.isalpha() and len(word) > 1})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\n".join(pieces) + "\n").encode())
    return path


def section(folder: Path, tokenizer: Path, train: Any, **more: Any) -> dict[str, Any]:
    """A ``data`` section as a run file holds it."""
    entries = train if isinstance(train, list) else [train]
    trained = [entry if isinstance(entry, dict) else str(entry) for entry in entries]
    values = {"store_dir": str(folder / "stores"), "train": trained, "tokenizer": str(tokenizer), "row_tokens": 64}
    return {**values, "workers": 1, **more}


def prepared(values: dict[str, Any], task: str = "causal_lm", split: str = "train") -> tuple[TokenStore, Rows]:
    """Prepare quietly and open one split."""
    folders = prepare(DataConfig.model_validate(values), values, task, progress=False)
    store = TokenStore.open(folders[split])
    return store, open_rows(store, values["row_tokens"])
