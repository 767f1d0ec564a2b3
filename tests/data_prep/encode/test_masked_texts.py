"""Texts for masked language modelling: where words begin, how long texts are split, and what the ledger says of it."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fixtures import bert_vocabulary, byte_level_folder, sentences, write_jsonl
from preparations import assert_ledger_reconciles, run
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from data_prep.config import DataConfig
from data_prep.errors import DataConfigError, UnusableError
from data_prep.prepare import prepare
from data_prep.token_store import TokenStore, open_rows
from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.word_borders import word_begins


def section(folder: Path, texts: list[str], **more: Any) -> dict[str, Any]:
    return {
        "store_dir": str(folder / "stores"), "workers": 1, "row_tokens": 24, "overlong": "split",
        "train": str(write_jsonl(folder / "train.jsonl", [{"text": text} for text in texts])),
        "tokenizer": str(bert_vocabulary(folder / "vocab.txt")), **more,
    }  # fmt: skip


def prepared(values: dict[str, Any]) -> TokenStore:
    return TokenStore.open(run(values, "masked_lm")["train"])


def words_of(store: TokenStore, document: int) -> list[str]:
    """The words that the column gives a document, from the texts of its tokens."""
    pieces = store.token_column("word_pieces", document)
    texts = (store.tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    names = {index: text for text, index in json.loads(texts)["model"]["vocab"].items()}
    found: list[str] = []
    for token, piece in zip(store.tokens(document).tolist(), pieces.tolist(), strict=True):
        if piece == 1:
            found.append(names[token])
        elif piece == 2:
            found[-1] += names[token].removeprefix("##")
    return found


def test_words_are_whole_and_special_and_unknown_tokens_are_none(tmp_path: Path) -> None:
    store = prepared(section(tmp_path, ["the river, zzzq runs", "under % xyz"]))
    assert words_of(store, 0) == ["the", "river", "zzzq", "runs"]  # the comma is unknown here
    assert words_of(store, 1) == ["under", "xyz"]
    assert store.token_column("word_pieces", 0).tolist() == [0, 1, 1, 0, 1, 2, 2, 2, 1, 0]
    assert store.targets(0).tolist() == (store.token_column("word_pieces", 0) > 0).tolist()
    assert store.manifest["mask_id"] == 4 and store.manifest["control_ids"] == [0, 1, 2, 3, 4]
    assert store.manifest["largest_id"] >= store.manifest["mask_id"]


def test_longer_texts_are_split_between_words_and_nothing_is_lost(tmp_path: Path, capsys: Any) -> None:
    texts = [*sentences(60), "z" * 60]
    store = prepared(section(tmp_path, texts))
    total = assert_ledger_reconciles(store, open_rows(store, 24))
    whole = prepared(section(tmp_path / "whole", texts, row_tokens=512))
    expected = [words_of(whole, document) for document in range(whole.num_documents)]
    lines = [int(store.locate(document).rpartition(":")[2]) - 1 for document in range(store.num_documents)]
    found: list[list[str]] = [[] for _ in texts]
    for document, line in enumerate(lines):
        assert store.tokens(document)[[0, -1]].tolist() == [2, 3]
        assert len(store.tokens(document)) <= 24
        found[line] += words_of(store, document)
    assert found[:-1] == expected[:-1]
    assert "".join(found[-1]).replace("##", "") == "z" * 60  # no word begins in a row of it, so rows end inside
    many = sum(lines.count(line) > 1 for line in set(lines))
    assert total["extra_documents"] == store.num_documents - len(texts) > 0
    assert total["notes"] == {"texts_split": many} and total["tokens_cut"] == 0


def test_truncation_ends_behind_a_word_and_is_counted(tmp_path: Path) -> None:
    texts = sentences(60)
    store, split = (prepared(section(tmp_path / how, texts, overlong=how)) for how in ("truncate", "split"))
    total = assert_ledger_reconciles(store, open_rows(store, 24))
    assert store.num_documents == len(texts) and total["truncated"] == split.ledger["total"]["notes"]["texts_split"]
    assert total["tokens_cut"] == split.num_tokens - store.num_tokens - 2 * (split.num_documents - len(texts))
    firsts = [document for document in range(split.num_documents) if _is_first(split, document)]
    assert [words_of(store, place) for place in range(len(texts))] == [words_of(split, place) for place in firsts]


def _is_first(store: TokenStore, document: int) -> bool:
    return document == 0 or store.locate(document) != store.locate(document - 1)


def test_a_text_without_a_known_word_is_an_error_and_a_tokenizer_without_a_mask_too(tmp_path: Path) -> None:
    with pytest.raises(UnusableError, match=r"train.jsonl:2: .* the tokenizer knows no word of it"):
        prepared(section(tmp_path, ["the river", "% %"]))
    values = section(tmp_path, ["the river"]) | {"tokenizer": str(byte_level_folder(tmp_path / "bytes"))}
    with pytest.raises(DataConfigError, match="has no mask token, which masked_lm needs"):
        prepare(DataConfig.model_validate(values), values, "masked_lm", progress=False)


def test_other_tasks_still_refuse_to_split(tmp_path: Path) -> None:
    values = section(tmp_path, ["the river"])
    with pytest.raises(DataConfigError, match=r"data.overlong: split would cut"):
        prepare(DataConfig.model_validate(values), values, "sequence_classification", progress=False)


def starts_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words of a text, as its characters."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    starts = word_begins(text, encoding.offsets, encoding.word_ids)
    borders = [encoding.offsets[place][0] for place in np.flatnonzero(starts)] + [len(text)]
    return [text[begin:stop] for begin, stop in pairwise(borders)]


TEXTS = ["Hello world, don't stop! naïve café", "这是一个很长的句子。hello 你好 wide"]


def test_words_of_pipelines_that_cut_at_blanks_and_of_those_that_do_not() -> None:
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, show_progress=False)
    byte_level.train_from_iterator(TEXTS, trainer)
    assert starts_of(byte_level, TEXTS[0]) == ["Hello", " world", ",", " don", "'t", " stop", "!", " naïve", " café"]
    line = Tokenizer(models.Unigram())
    line.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    unigram = trainers.UnigramTrainer(
        vocab_size=60, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"], max_piece_length=2
    )
    line.train_from_iterator(TEXTS * 4, unigram)
    assert starts_of(line, TEXTS[0]) == ["Hello", " world,", " don't", " stop!", " naïve", " café"]
    plain = Tokenizer(models.BPE())  # as Llama 2's: no pre-tokenizer at all
    plain.normalizer = normalizers.Replace(" ", "\u2581")
    plain.train_from_iterator(list("".join(TEXTS)), trainers.BpeTrainer(vocab_size=80, show_progress=False))
    assert starts_of(plain, TEXTS[0]) == ["Hello", " world,", " don't", " stop!", " naïve", " café"]
    chinese = ["这", "是", "一", "个", "很", "长", "的", "句", "子", "。", "hello"]
    assert starts_of(plain, TEXTS[1])[:11] == chinese and starts_of(plain, TEXTS[1])[-1] == " wide"
    assert starts_of(byte_level, TEXTS[1])[:11] == chinese


def test_a_run_without_blanks_counts_as_several_words(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(bert_vocabulary(tmp_path / "vocab.txt")))
    ((ids, starts),) = tokenizer.encode_with_words(["z" * 40])
    assert len(ids) == 40 and np.flatnonzero(starts).tolist() == [0, 16, 32]
