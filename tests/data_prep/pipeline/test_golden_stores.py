"""Stores of every task, byte for byte as the code of e66b70f made them: an old store is found again, not made anew.

The folder's name is the store's key, and the manifest holds the hash of every file, so its own hash stands for all
bytes of a store. The key of "chat" is that of a later version, and nothing else: e66b70f did not read training flags,
so its stores of conversations are not found again. "questions" has the columns of a later version beside its own,
which are the same bytes: e66b70f left the texts out, so its stores are made anew. The ledgers of "labels", "tags" and
"translations" are those of a later version: e66b70f left out what encoding cuts off.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from data_prep.config import DataConfig
from data_prep.errors import DataConfigError
from data_prep.prepare import prepare
from data_prep.token_store import TokenStore

WORDS = "the river runs under an old stone bridge while children watch boats drift past in warm evening light".split()


def text(number: int, size: int) -> str:
    return " ".join(WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(size))


def question(number: int) -> dict[str, Any]:
    context = text(number, 30 + number)
    word = context.split()[number]
    answers = [{"text": word, "answer_start": context.index(word)}] if number % 3 else []
    return {"question": text(number + 1, 4), "context": context, "answers": answers}


TURNS = [
    {"messages": [{"role": "user", "content": text(n, 3)}, {"role": "assistant", "content": text(n + 1, 4)}]}
    for n in range(12)
]
RECORDS: dict[str, list[dict[str, Any]]] = {
    "texts": [{"text": text(number % 20, 5 + number % 20)} for number in range(40)],
    "prompts": [{"prompt": text(number, 4), "response": text(number + 1, 6)} for number in range(9)],
    "chats": TURNS,
    "labels": [{"text": text(n % 9, 4 + n % 9), "label": f"kind {(n * 5) % 3}"} for n in range(20)],
    "pairs": [{"text": text(n, 9), "text_pair": text(n + 3, 30), "label": f"kind {2 - n % 3}"} for n in range(8)],
    "sets": [{"text": text(n, 5), "label": [f"kind {2 - k}" for k in range(n % 3)]} for n in range(9)],
    "scores": [{"text": text(n, 5), "score": n / 4} for n in range(9)],
    "tags": [{"tokens": text(n, 6 + n).split(), "tags": [f"T{(n + k) % 4}" for k in range(6 + n)]} for n in range(9)],
    "more tags": [{"tokens": text(n, 5).split(), "tags": [f"T{4 - k}" for k in range(5)]} for n in range(5)],
    "questions": [question(number) for number in range(10)],
    "more questions": [question(number) for number in range(10, 15)],
    "translations": [{"source": text(n % 9, 5 + n % 9), "target": text(n % 9, 4 + n % 9)} for n in range(20)],
}
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "text": ("causal_lm", ["texts"], {"deduplicate": True, "validation_fraction": 0.2}),
    "mixture": ("causal_lm", ["texts", "prompts"], {"overlong": "truncate", "row_tokens": 16}),
    "stream": ("causal_lm", ["texts"], {"packing": "wrap", "overlong": "split", "row_tokens": 16}),
    "chat": ("causal_lm", ["chats", "prompts"], {}),
    "labels": ("sequence_classification", ["labels", "pairs"], {"overlong": "truncate", "row_tokens": 24}),
    "unequal labels": ("sequence_classification", ["labels"], {"deduplicate": True, "validation_fraction": 0.3}),
    "held-out text": ("causal_lm", ["texts"], {"validation": "prompts.jsonl"}),
    "held-out labels": ("sequence_classification", ["labels"], {"validation": "pairs.jsonl"}),
    "label sets": ("sequence_classification", ["sets"], {}),
    "scores": ("sequence_classification", ["scores"], {"deduplicate": True}),
    "tags": ("token_classification", ["more tags", "tags"], {"overlong": "truncate", "row_tokens": 12}),
    "questions": ("question_answering", ["questions", "more questions"], {"row_tokens": 32, "stride_tokens": 8}),
    "translations": ("seq2seq_lm", ["translations"], {"overlong": "truncate", "row_tokens": 16, "target_tokens": 12}),
    "unequal translations": ("seq2seq_lm", ["translations", "prompts"], {"deduplicate": True}),
}
#: Lines of a manifest that e66b70f did not write; readers of that time ignore them.
FACTS_ADDED_SINCE = b'"largest_id"'
GOLDEN: dict[str, dict[str, str]] = {
    "text": {
        "train-c3de758c6ecbece1": "d51cb5cb89e491cfc0cc0cd778a02b3e",
        "validation-622c13dbf3e60be4": "bc5be57677e8a4357e6af46d84d68f32",
    },
    "mixture": {"train-5710446e5151e66c": "04f7ec8171eb37814cf407e9bf480cca"},
    "stream": {"train-1498403bc30de409": "e9f7b92309e626d63c57b63028f942d0"},
    "chat": {"train-47335dbb18a0b79e": "5d505ccdcfe0327b8b0e57512223ed53"},
    "labels": {"train-da7d04c8dc103a75": "9da72f20cb14fe1cf58763f63341290d"},
    "unequal labels": {
        "train-35e56c01a506790f": "6e7526cb5a661649f618be8157e37b85",
        "validation-196c5d43a161b5de": "6573b6775d7c9686a3ce6b6b5265b3df",
    },
    "held-out text": {
        "train-2738137416773d2d": "e3dfb4937426f5c30fc3c203b47d6678",
        "validation-23e0c3b87cfeb7be": "b25732983a7cbc2c010997c55c88d4e4",
    },
    "held-out labels": {
        "train-37fd393914e9d6fd": "386e99bc2e04fa119332e2dd7aaad65c",
        "validation-20e52a9d65428b98": "b5d6ac33bdf323363e424000f016517f",
    },
    "label sets": {"train-6e444a2083e4eb01": "435303987b3cffe951b0c7d8710a46e0"},
    "scores": {"train-27369324818c6058": "076a8e983ad381f76d32c947f2ead4e9"},
    "tags": {"train-6a60509e14126490": "b17ede797630244ed1546fc8283b4fd5"},
    "questions": {"train-0d02025c60a08acf": "58528d41d4e55a04fec91a82fce3b389"},
    "translations": {"train-1c9ecfa33564c87b": "8eda94aebba7f876473e1db4b285ba98"},
    "unequal translations": {"train-23f4324691585824": "0c8491d7dd886e5c372ec33a1fbfa44c"},
}


def tokenizer_folder(folder: Path) -> Path:
    """Words of the texts, with special tokens around a text and between two; written, not learned."""
    named = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]", "User", "Assistant", ":", "4"]
    index = {word: number for number, word in enumerate([*named, *WORDS])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(index, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(named[:5])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "sep_token": "[SEP]", **words})
    )
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_store_is_what_it_was(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # paths of sources are part of a store
    task, names, options = CASES[case]
    for name, records in RECORDS.items():
        lines = (json.dumps(record) + "\n" for record in records)
        Path(f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    values = {"store_dir": "stores", "train": [f"{name}.jsonl" for name in names], "row_tokens": 64, "workers": 1}
    values |= {"tokenizer": str(tokenizer_folder(Path("tokenizer"))), **options}
    folders = prepare(DataConfig.model_validate(values), values, task, progress=False)
    found = {}
    for split, folder in folders.items():
        store = TokenStore.open(folder)
        store.verify()
        lines = (folder / "manifest.json").read_bytes().splitlines(keepends=True)
        kept = b"".join(line for line in lines if not line.startswith(FACTS_ADDED_SINCE))
        found[folder.name] = hashlib.sha256(kept).hexdigest()[:32]
        assert store.num_documents and folder.name.startswith(split)
    assert found == GOLDEN[case]


def test_an_unknown_task_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    values = {"store_dir": str(tmp_path / "s"), "train": "no.jsonl", "tokenizer": "no", "row_tokens": 8}
    with pytest.raises(DataConfigError, match=r"^task dancing is none of causal_lm, .*, seq2seq_lm$"):
        prepare(DataConfig.model_validate(values), values, "dancing", progress=False)
