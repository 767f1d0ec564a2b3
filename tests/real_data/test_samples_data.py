"""Real data: every sample set is prepared from its upstream files, accounted for, and its text comes back out."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fixtures import SAMPLES, prepared, section
from preparations import assert_ledger_reconciles
from transformers import AutoTokenizer

from data_prep.errors import BadDataError
from data_prep.token_store import TokenStore

pytestmark = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")

TOKENIZERS = SAMPLES / "tokenizers"
BYTE_LEVEL = TOKENIZERS / "bytelevel_bpe_2k"  # lossless
GPT2 = TOKENIZERS / "gpt2"
T5 = TOKENIZERS / "t5_sentencepiece_32k"
ENGLISH, CASED, CHINESE = (TOKENIZERS / f"bert_{name}" for name in ("uncased_en", "cased_en", "zh"))

# (files, options of the source, task, tokenizer, options of the data section, records)
CASES: dict[str, tuple[str | dict[str, str], dict[str, Any], Any, Path, dict[str, Any], int]] = {
    "sst2 train": ("classification/sst2/train.tsv", {"columns": ["text", "label"], "quoting": False},
                   "sequence_classification", ENGLISH, {}, 6920),
    "sst2 dev": ("classification/sst2/dev.tsv", {"columns": ["text", "label"], "quoting": False},
                 "sequence_classification", TOKENIZERS / "sentencepiece_2k", {"row_tokens": 256}, 872),
    "chnsenticorp": ("classification/chnsenticorp/*.tsv", {"quoting": False, "fields": {"text": "text_a"}},
                     "sequence_classification", CHINESE, {"overlong": "truncate"}, 2400),
    **{f"clinc150 {split}": ("classification/clinc150/data_small.json",
                             {"split": split, "columns": ["text", "label"]},
                             "sequence_classification", ENGLISH, options, count)
       for split, count, options in (("train", 7500, {}), ("val", 3000, {}), ("test", 4500, {}),
                                     ("oos_train", 100, {"label_names": ["oos", "in_scope"]}),
                                     ("oos_val", 100, {"label_names": ["oos", "in_scope"]}),
                                     ("oos_test", 1000, {"label_names": ["oos", "in_scope"]}))},
    "ag_news": ("classification/ag_news/test.csv", {"columns": ["label", "title", "description"],
                                                    "fields": {"text": "title", "pair": "description"}},
                "sequence_classification", ENGLISH, {"overlong": "truncate"}, 7600),
    "ocnli": ("understanding/ocnli/*.json", {"format": "jsonl"}, "sequence_classification", CHINESE, {}, 6000),
    "snli": ({"premise": "understanding/snli_dev_esnli/s1.dev", "hypothesis": "understanding/snli_dev_esnli/s2.dev",
              "label": "understanding/snli_dev_esnli/labels.dev"}, {}, "sequence_classification", ENGLISH, {}, 9842),
    "snli explanations": ({"prompt": "understanding/snli_dev_esnli/s1.dev",
                           "response": "understanding/snli_dev_esnli/preproc1_expl_1.dev"}, {},
                          "causal_lm", GPT2, {"min_targets": 1}, 9842),
    "stsb": ("understanding/stsb_en/*.csv", {"columns": ["sentence1", "sentence2", "score"], "shape": "score"},
             "sequence_classification", ENGLISH, {}, 7249),
    "wnut17": ("sequence_labelling/wnut17/*.conll", {}, "token_classification", CASED, {}, 4403),
    "msra_ner": ("sequence_labelling/msra_ner/dev.tsv", {"quoting": False, "fields": {"words": "text_a", "tags": "label"}},
                 "token_classification", CHINESE, {"overlong": "truncate"}, 2318),
    "ud_english_ewt": ("sequence_labelling/ud_english_ewt/*.conllu", {}, "token_classification", CASED, {}, 2001),
    "up_english_ewt": ("sequence_labelling/up_english_ewt/*.conllu", {}, "token_classification", CASED, {}, 2002),
    "policyqa": ("understanding/policyqa/dev.json", {}, "question_answering", ENGLISH,
                 {"row_tokens": 128, "stride_tokens": 32}, 3809),
    "cmrc2018": ("understanding/cmrc2018/cmrc2018_trial.json", {}, "question_answering", CHINESE,
                 {"row_tokens": 256, "stride_tokens": 64}, 1002),
    **{f"multi30k {name}": ({"source": f"generation/multi30k/{name}.en.gz", "target": f"generation/multi30k/{name}.de.gz"},
                            {}, "seq2seq_lm", T5, {"row_tokens": 128}, count)
       for name, count in (("train", 29000), ("val", 1014), ("test_2016_flickr", 1000))},
    "scitldr": ("generation/scitldr/*.jsonl", {}, "seq2seq_lm", T5, {"row_tokens": 1024, "target_tokens": 256}, 1237),
    "csl_ts": ("generation/csl_ts/dev.tsv", {"columns": ["task", "source", "target"], "quoting": False},
               "causal_lm", BYTE_LEVEL, {"row_tokens": 4096}, 1000),
    "gsm8k": ("generation/gsm8k/train.jsonl", {}, "causal_lm", BYTE_LEVEL, {"row_tokens": 1024}, 7473),
    "alpaca en": ("generation/alpaca_demo/alpaca_en_demo.json", {}, "causal_lm", GPT2,
                  {"row_tokens": 2048, "min_targets": 1}, 999),
    "alpaca zh": ("generation/alpaca_demo/alpaca_zh_demo.json", {}, "causal_lm", GPT2,
                  {"row_tokens": 4096, "min_targets": 1}, 1000),
    "glaive": ("generation/chat/glaive_toolcall_en_demo.json", {}, "causal_lm", GPT2, {"row_tokens": 4096}, 300),
    "v1 chat": ("generation/chat/v1_sft_demo.jsonl", {}, "causal_lm", GPT2, {"row_tokens": 4096}, 500),
    "reasoning with tools": ("generation/chat/reason_tool_use_demo_50.jsonl", {}, "causal_lm", GPT2,
                             {"row_tokens": 16384}, 50),
    "shakespeare": ("pretraining/tinyshakespeare/input.txt", {"document": "blank_line"}, "causal_lm", BYTE_LEVEL,
                    {"row_tokens": 512, "overlong": "split"}, 7222),
    "wiki": ("pretraining/wiki_demo/wiki_demo.txt", {}, "causal_lm", GPT2,
             {"row_tokens": 1024, "overlong": "split"}, 30),
    "c4": ("pretraining/c4_demo/c4_demo.jsonl", {}, "causal_lm", BYTE_LEVEL,
           {"row_tokens": 1024, "overlong": "split", "packing": "wrap"}, 300),
    "cluecorpussmall": ("pretraining/cluecorpussmall/CLUECorpusSmall_sampled.txt", {}, "causal_lm",
                        TOKENIZERS / "tiktoken_small", {"row_tokens": 1024, "overlong": "split"}, 2500),
}  # fmt: skip


def source_of(files: str | dict[str, str], options: dict[str, Any]) -> dict[str, Any]:
    if isinstance(files, str):
        return {"path": str(SAMPLES / files), **options}
    return {"aligned": {name: str(SAMPLES / path) for name, path in files.items()}, **options}


def add_chat_template(tokenizer: Path, folder: Path) -> Path:
    """GPT-2's files with a chat template that knows tools, as a model's folder would bring it."""
    copy = folder / tokenizer.name
    copy.mkdir()
    for path in tokenizer.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "chat_template.jinja").write_text(
        "{% if tools %}{{ '<|tools|>\\n' + (tools | tojson) + '\\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.reasoning_content or '' }}{{ m.content or '' }}"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )
    return copy


#: One of each kind of file, shape and tokenizer; the others are much like one of them.
ALWAYS = {
    "sst2 train", "sst2 dev", "chnsenticorp", "clinc150 oos_val", "ag_news", "snli", "snli explanations", "stsb", "wnut17",
    "up_english_ewt", "cmrc2018", "multi30k val", "scitldr", "csl_ts", "alpaca zh", "glaive", "reasoning with tools", "wiki",
    "cluecorpussmall",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.long]) for name in CASES]
)
def test_every_sample_set_is_prepared_and_reconciles(name: str, tmp_path: Path) -> None:
    files, options, task, tokenizer, more, records = CASES[name]
    if task == "causal_lm":
        tokenizer = add_chat_template(tokenizer, tmp_path)
    values = section(tmp_path, tokenizer, [source_of(files, options)], **{"row_tokens": 512, **more})
    store, rows = prepared(values, task)
    total = assert_ledger_reconciles(store, rows)
    assert total["records_read"] == records
    assert total["tokens"] > 3 * records
    lost = total["records_read"] - total["kept"] - total["split"] - total["truncated"]
    assert lost + store.manifest["sources"][0]["extra_documents"] < 0.06 * records or task == "question_answering"


def test_speeches_of_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(SAMPLES / "pretraining/inaugural/inaugural.zip") as archive:
        archive.extractall(tmp_path)
    latin = tmp_path / "inaugural" / "2005-Bush.txt"  # one speech is not UTF-8, which is told and not guessed
    with pytest.raises(BadDataError, match=r"2005-Bush\.txt:3: not UTF-8"):
        prepared(section(tmp_path, GPT2, [{"path": str(latin), "document": "file"}]))
    latin.write_text(latin.read_text(encoding="latin-1"), encoding="utf-8")
    source = {"path": str(tmp_path / "inaugural" / "*.txt"), "document": "file"}
    store, rows = prepared(section(tmp_path, GPT2, [source], row_tokens=8192, overlong="split"))
    total = assert_ledger_reconciles(store, rows)
    assert store.num_documents >= 58 and total["tokens_in_rows"] == total["tokens"]


def decoded(store: TokenStore, trained_only: bool) -> list[str]:
    saved = AutoTokenizer.from_pretrained(store.tokenizer_dir)
    texts = []
    for document in range(store.num_documents):
        ids = store.tokens(document)
        kept = ids[store.targets(document)] if trained_only else ids
        texts.append(kept.tolist())
    return list(saved.batch_decode(texts))


def test_gsm8k_questions_and_answers(tmp_path: Path) -> None:
    path = SAMPLES / "generation/gsm8k/train.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    store, rows = prepared(section(tmp_path, BYTE_LEVEL, path, row_tokens=1024))
    end = "<|end_of_sentence|>"
    assert decoded(store, True) == [record["answer"] + end for record in records]
    assert decoded(store, False) == [f"{record['question']}{record['answer']}{end}" for record in records]
    assert store.ledger["total"]["padding_tokens"] / (rows.num_rows * 1024) < 0.02


def test_tinyshakespeare_comes_back_whole(tmp_path: Path) -> None:
    path = SAMPLES / "pretraining/tinyshakespeare/input.txt"
    source = {"path": str(path), "document": "file"}
    store, rows = prepared(section(tmp_path, BYTE_LEVEL, [source], row_tokens=512, packing="wrap", overlong="split"))
    assert decoded(store, False) == [path.read_text() + "<|end_of_sentence|>"]
    assert rows.lengths.tolist()[:-1] == [512] * (rows.num_rows - 1)
    assert store.ledger["total"]["tokens_in_rows"] == store.num_tokens


def test_sst2_sentences_with_a_bert_vocabulary(tmp_path: Path) -> None:
    lines = (SAMPLES / "classification/sst2/train.tsv").read_text(encoding="utf-8").split("\n")
    pairs = [line.rsplit("\t", 1) for line in lines if line]
    source = source_of("classification/sst2/train.tsv", {"columns": ["text", "label"], "quoting": False})
    store, rows = prepared(
        section(tmp_path, ENGLISH, [source], row_tokens=32, overlong="truncate"), "sequence_classification"
    )
    total = assert_ledger_reconciles(store, rows)
    assert store.label_names == ("0", "1")
    assert store.column("labels").tolist() == [int(label) for _, label in pairs]
    saved = AutoTokenizer.from_pretrained(store.tokenizer_dir)
    theirs = saved([text for text, _ in pairs], truncation=True, max_length=32)["input_ids"]
    assert [store.tokens(document).tolist() for document in range(store.num_documents)] == theirs
    assert (
        total["truncated_at_encoding"]
        == sum(len(ids) > 32 for ids in saved([text for text, _ in pairs])["input_ids"])
        > 0
    )


def test_pairs_are_encoded_as_transformers_does(tmp_path: Path) -> None:
    files, options, task, tokenizer, _, _ = CASES["snli"]
    store, _ = prepared(section(tmp_path, tokenizer, [source_of(files, options)], row_tokens=128), task)
    assert isinstance(files, dict)
    first, second, labels = ((SAMPLES / path).read_text(encoding="utf-8").split("\n")[:500] for path in files.values())
    saved = AutoTokenizer.from_pretrained(store.tokenizer_dir)
    theirs = saved(first, second).encodings
    starts = store.column("pair_starts")
    for document in range(500):
        assert store.tokens(document).tolist() == theirs[document].ids
        assert theirs[document].type_ids.index(1) == starts[document]
    assert [store.label_names[number] for number in store.column("labels")[:500]] == labels


def test_answers_stand_where_their_spans_say(tmp_path: Path) -> None:
    files, options, task, tokenizer, more, _ = CASES["policyqa"]
    assert isinstance(files, str)
    store, _ = prepared(section(tmp_path, tokenizer, [source_of(files, options)], **more), task)
    saved = AutoTokenizer.from_pretrained(store.tokenizer_dir)
    articles = json.loads((SAMPLES / files).read_text(encoding="utf-8"))["data"]
    questions = [qa for article in articles for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
    found: dict[int, set[str]] = {}
    numbers = store.column("questions")
    for document in range(store.num_documents):
        spans = store.ragged("answer_spans", document).reshape(-1, 2)
        ids = store.tokens(document)
        assert len(ids) <= 128
        for start, stop in spans:
            found.setdefault(int(numbers[document]), set()).add(saved.decode(ids[start:stop]).replace(" ", ""))
    assert len(found) > 0.95 * len(questions)
    for number, texts in found.items():
        wanted = {saved.decode(saved(a["text"], add_special_tokens=False)["input_ids"]).replace(" ", "")
                  for a in questions[number]["answers"]}  # fmt: skip
        # An annotator's answer may end inside a word; the token goes on.
        assert all(any(text.startswith(answer) for answer in wanted) for text in texts), (questions[number], texts)


def test_tags_stand_on_the_first_piece_of_their_word(tmp_path: Path) -> None:
    files, options, task, tokenizer, _, _ = CASES["wnut17"]
    assert isinstance(files, str)
    store, _ = prepared(section(tmp_path, tokenizer, [source_of(files, options)], row_tokens=512), task)
    sentences: list[list[list[str]]] = [[]]
    for path in sorted(SAMPLES.glob(files)):
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                sentences[-1].append(line.rstrip("\r").split("\t"))
            elif sentences[-1]:
                sentences.append([])
        if sentences[-1]:
            sentences.append([])
    sentences.pop()
    saved = AutoTokenizer.from_pretrained(store.tokenizer_dir)
    for document, words in enumerate(sentences):
        own = store.token_column("tags", document)
        marked = np.flatnonzero(own >= 0)
        assert [store.label_names[number] for number in own[marked]] == [word[1] for word in words]
        theirs = saved([word[0] for word in words], is_split_into_words=True).word_ids()
        if {word for word in theirs if word is not None} == set(range(len(words))):  # no word became nothing
            assert [theirs[place] for place in marked] == list(range(len(words)))
