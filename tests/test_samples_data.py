"""Real data: every sample set is prepared, accounted for, and its text comes back out of the store."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import SAMPLES, prepared, section, write_jsonl
from test_prepare import assert_ledger_reconciles
from transformers import AutoTokenizer

from data_prep.token_store import TokenStore

pytestmark = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")

BYTE_LEVEL = SAMPLES / "tokenizers" / "bytelevel_bpe_2k"  # lossless


def decoded(store: TokenStore, trained_only: bool) -> list[str]:
    saved = AutoTokenizer.from_pretrained(store.tokenizer_dir)
    texts = []
    for document in range(store.num_documents):
        ids = store.tokens(document)
        kept = ids[store.targets(document)] if trained_only else ids
        texts.append(kept.tolist())
    return list(saved.batch_decode(texts))


def test_gsm8k_questions_and_answers(tmp_path: Path) -> None:
    lines = (SAMPLES / "generation/gsm8k/train.jsonl").read_text().splitlines()[:1000]
    records = [json.loads(line) for line in lines]
    path = write_jsonl(
        tmp_path / "gsm8k.jsonl",
        [{"prompt": record["question"] + "\n", "response": record["answer"]} for record in records],
    )
    store, rows = prepared(section(tmp_path, BYTE_LEVEL, path, row_tokens=1024))
    total = assert_ledger_reconciles(store, rows)
    assert total["kept"] == total["records"] == len(records)
    end = "<|end_of_sentence|>"
    assert decoded(store, True) == [record["answer"] + end for record in records]
    assert decoded(store, False) == [f"{record['question']}\n{record['answer']}{end}" for record in records]
    assert total["padding_tokens"] / (rows.num_rows * 1024) < 0.03


@pytest.mark.parametrize("language", ["en", "zh"])
def test_alpaca_as_conversations(tmp_path: Path, language: str) -> None:
    name = f"generation/alpaca_demo/alpaca_{language}_demo.json"
    examples = json.loads((SAMPLES / name).read_text(encoding="utf-8"))
    examples = [example for example in examples if example["output"].strip()]
    records: list[dict[str, Any]] = []
    for example in examples:
        question = "\n".join(part for part in (example["instruction"], example["input"]) if part)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": example["output"]}]
        records.append({"messages": turns})
    path = write_jsonl(tmp_path / "alpaca.jsonl", records)
    store, rows = prepared(section(tmp_path, BYTE_LEVEL, path, row_tokens=2048, overlong="drop"))
    total = assert_ledger_reconciles(store, rows)
    assert total["records"] == len(examples) and total["kept"] > 0.95 * len(examples)
    assert decoded(store, True) == [f" {example['output']}<|end_of_sentence|>" for example in examples]


def test_tinyshakespeare_in_full_rows(tmp_path: Path) -> None:
    text = (SAMPLES / "pretraining/tinyshakespeare/input.txt").read_text()
    scenes = [text[begin : begin + 5000] for begin in range(0, len(text), 5000)]
    path = write_jsonl(tmp_path / "plays.jsonl", [{"text": scene} for scene in scenes])
    values = section(tmp_path, BYTE_LEVEL, path, row_tokens=512, overlong="split", validation_fraction=0.1)
    store, rows = prepared(values)
    held_out, held_out_rows = prepared(values, split="validation")
    for one, its_rows in ((store, rows), (held_out, held_out_rows)):
        total = assert_ledger_reconciles(one, its_rows)
        assert total["records_read"] == len(scenes)
        assert total["tokens_in_rows"] == total["tokens"]  # split keeps every token
        assert total["padding_tokens"] / (its_rows.num_rows * 512) < 0.03
    texts = [text.removesuffix("<|end_of_sentence|>") for one in (store, held_out) for text in decoded(one, False)]
    assert sorted(texts) == sorted(scenes)


def test_sst2_sentences_with_a_bert_vocabulary(tmp_path: Path) -> None:
    lines = (SAMPLES / "classification/sst2/train.tsv").read_text(encoding="utf-8").split("\n")[:1500]
    pairs = [line.rsplit("\t", 1) for line in lines if line]
    path = write_jsonl(tmp_path / "sst2.jsonl", [{"text": text, "label": int(label)} for text, label in pairs])
    vocabulary = SAMPLES / "tokenizers" / "bert_uncased_en"
    store, rows = prepared(
        section(tmp_path, vocabulary, path, row_tokens=32, overlong="truncate"), "sequence_classification"
    )
    total = assert_ledger_reconciles(store, rows)
    assert store.label_names == ("0", "1") and total["records"] == len(pairs)
    assert store.column("labels").tolist() == [int(label) for _, label in pairs]
    saved = AutoTokenizer.from_pretrained(store.tokenizer_dir)
    theirs = saved([text for text, _ in pairs], truncation=True, max_length=32)["input_ids"]
    assert [store.tokens(document).tolist() for document in range(store.num_documents)] == theirs
    assert total["truncated"] == sum(len(ids) > 32 for ids in saved([text for text, _ in pairs])["input_ids"]) > 0
