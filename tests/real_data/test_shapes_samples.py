"""Every real sample file of a known shape: recognised from its first records, then read whole."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import SAMPLES
from shape_fixtures import SHAPES_OF

from data_prep.config import SourceConfig
from data_prep.shapes.chat import ROLES
from data_prep.shapes.examples import PromptExample, TextExample
from data_prep.shapes.recognise import recognise
from data_prep.shapes.shape import to_example
from data_prep.sources.read import read_records
from data_prep.sources.scan import find_sources

pytestmark = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")


def everything(
    name: str | dict[str, str], task: str, description: str, **options: Any
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The records of a file (or of aligned ones) and their examples; the first 100 are recognised as described."""
    if isinstance(name, dict):
        options["aligned"] = {field: str(SAMPLES / path) for field, path in name.items()}
    else:
        options["path"] = str(SAMPLES / name)
    config = SourceConfig(**options)
    [[source]] = find_sources((config,), "data.train", Path("never-used"))
    shape = recognise(list(islice(read_records(source), 100)), config, task, SHAPES_OF)
    assert shape.describe().startswith(description), shape.describe()
    records = list(read_records(source))
    return [record.value for record in records], [to_example(shape, record) for record in records]


def test_gsm8k() -> None:
    raw, read = everything(
        "generation/gsm8k/train.jsonl",
        "causal_lm",
        "prompt: prompt = question, response = answer (100 records seen agree)",
    )
    assert read == [PromptExample(one["question"], one["answer"]) for one in raw] and len(read) == 7473


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("c4_demo/c4_demo.jsonl", 300),
        ("wiki_demo/wiki_demo.txt", 30),
        ("cluecorpussmall/CLUECorpusSmall_sampled.txt", 2500),
        ("tinyshakespeare/input.txt", 7222),
    ],
)
def test_plain_text(name: str, count: int) -> None:
    options = {"document": "blank_line"} if name.startswith("tiny") else {}
    raw, read = everything(f"pretraining/{name}", "causal_lm", "text: text = text (", **options)
    assert read == [TextExample(one["text"]) for one in raw] and len(read) == count


@pytest.mark.parametrize(("language", "count"), [("en", 999), ("zh", 1000)])
@pytest.mark.parametrize("task", ["causal_lm", "seq2seq_lm"])
def test_alpaca(language: str, count: int, task: str) -> None:
    raw, read = everything(
        f"generation/alpaca_demo/alpaca_{language}_demo.json",
        task,
        "alpaca: prompt = instruction + input, response = output (100 records seen agree)",
    )
    assert len(read) == count and sum(one["input"] != "" for one in raw) > 100
    for one, example in zip(raw, read, strict=True):
        prompt = one["instruction"] + ("\n\n" + one["input"] if one["input"] else "")
        assert example == PromptExample(prompt, one["output"])


def test_seed_tasks_with_nested_fields() -> None:
    raw, read = everything(
        "generation/seed_tasks/seed_tasks.jsonl",
        "causal_lm",
        "alpaca: prompt = instruction + instances.0.input, response = instances.0.output (",
        fields={"input": "instances.0.input", "output": "instances.0.output"},
    )
    assert len(read) == 175 and all(len(one["instances"]) == 1 for one in raw)
    assert [one.response for one in read] == [one["instances"][0]["output"] for one in raw]


@pytest.mark.parametrize("split", ["dev", "test"])
def test_scitldr(split: str) -> None:
    raw, read = everything(
        f"generation/scitldr/{split}.jsonl",
        "seq2seq_lm",
        "parallel: prompt = source, response = target (100 records seen agree; the sentences of a source are joined"
        " with blanks; of several targets the first is taken; not used: ",
    )
    assert read == [PromptExample(" ".join(one["source"]), one["target"][0]) for one in raw]


def test_translations_and_titles() -> None:
    files = {language: f"generation/multi30k/val.{language}.gz" for language in ("en", "de")}
    raw, read = everything(
        files, "seq2seq_lm", "parallel: prompt = en, response = de (", fields={"source": "en", "target": "de"}
    )
    assert read == [PromptExample(one["en"], one["de"]) for one in raw] and len(read) == 1014
    _, read = everything(
        "generation/csl_ts/dev.tsv",
        "causal_lm",
        "parallel: prompt = source, response = target (100 records seen agree; not used: kind)",
        columns=["kind", "source", "target"],
        quoting=False,
    )
    assert len(read) == 1000


def test_glaive_with_tool_calls() -> None:
    raw, read = everything(
        "generation/chat/glaive_toolcall_en_demo.json",
        "causal_lm",
        "sharegpt: messages = conversations (from, value), tools = tools (100 records seen agree)",
    )
    calls = 0
    for one, example in zip(raw, read, strict=True):
        assert [tool["function"] for tool in example.tools or []] == json.loads(one["tools"])
        for turn, message in zip(one["conversations"], example.messages, strict=True):
            if turn["from"] == "function_call":
                calls += 1
                assert [call["function"] for call in message["tool_calls"]] == [json.loads(turn["value"])]
            else:
                assert message == {"role": ROLES[turn["from"]], "content": turn["value"]}
    assert len(read) == 300 and calls == 211


def test_messages_of_parts_with_weights() -> None:
    raw, read = everything(
        "generation/chat/v1_sft_demo.jsonl",
        "causal_lm",
        "messages: messages = messages (role, content) (100 records seen agree; some turns say themselves",
    )
    assert all(one.trained == (False, True) for one in read) and len(read) == 500
    assert [one.messages[1]["content"] for one in read] == [one["messages"][1]["content"][0]["value"] for one in raw]


def test_reasoning_and_tool_calls_in_parts() -> None:
    _, read = everything(
        "generation/chat/reason_tool_use_demo_50.jsonl",
        "causal_lm",
        "messages: messages = messages (role, content), tools = tools (50 records seen agree)",
    )
    assistants = [message for one in read for message in one.messages if message["role"] == "assistant"]
    assert all(message["reasoning_content"] for message in assistants)
    assert sum(len(message.get("tool_calls", ())) for message in assistants) == 41 + 2 * 9 + 3 * 3
    assert all(one.trained is None for one in read)


@pytest.mark.parametrize(
    ("name", "options", "description", "count", "labels"),
    [
        ("classification/sst2/train.tsv", {"columns": ["text", "label"]}, "label: text = text, label = label (", 6920, {"0", "1"}),
        ("classification/sst2/dev.tsv", {"columns": ["text", "label"]}, "label: text = text, label = label (", 872, {"0", "1"}),
        ("classification/chnsenticorp/dev.tsv", {"quoting": False}, "label: text = text_a, label = label (", 1200, {"0", "1"}),
        ("classification/chnsenticorp/test.tsv", {"quoting": False}, "label: text = text_a, label = label (", 1200, {"0", "1"}),
        ("classification/ag_news/test.csv", {"columns": ["class", "title", "description"], "fields": {"text": "title", "pair": "description", "label": "class"}}, "label: text = title, label = class, pair = description (", 7600, {"1", "2", "3", "4"}),
        ("classification/clinc150/data_small.json", {"columns": ["text", "label"], "split": "train"}, "label: text = text, label = label (", 7500, 150),
        ("understanding/ocnli/train.3k.json", {}, "label: text = sentence1, pair = sentence2, label = label (100 records seen agree; not used: level, ", 3000, {"entailment", "neutral", "contradiction", "-"}),
        ("understanding/ocnli/dev.json", {}, "label: text = sentence1, pair = sentence2, label = label (", 3000, {"entailment", "neutral", "contradiction", "-"}),
    ],
)  # fmt: skip
def test_labels(name: str, options: dict[str, Any], description: str, count: int, labels: set[str] | int) -> None:
    raw, read = everything(name, "sequence_classification", description, **options)
    found = {one.labels[0] for one in read}
    assert len(read) == len(raw) == count and (labels == len(found) if isinstance(labels, int) else labels == found)


def test_aligned_files_of_snli() -> None:
    parts = {"premise": "s1", "hypothesis": "s2", "label": "labels", "explanation": "preproc1_expl_1"}
    raw, read = everything(
        {field: f"understanding/snli_dev_esnli/{part}.dev" for field, part in parts.items()},
        "sequence_classification",
        "label: text = premise, pair = hypothesis, label = label (100 records seen agree; not used: explanation)",
    )
    assert [(one.text, one.pair, *one.labels) for one in read] == [
        (one["premise"], one["hypothesis"], one["label"]) for one in raw
    ]
    assert len(read) == 9842 and len({one.labels for one in read}) == 3


@pytest.mark.parametrize(("split", "count"), [("train", 5749), ("dev", 1500)])
def test_similarity_scores(split: str, count: int) -> None:
    raw, read = everything(
        f"understanding/stsb_en/stsb-en-{split}.csv",
        "sequence_classification",
        "score: text = sentence1, pair = sentence2, score = score (",
        columns=["sentence1", "sentence2", "score"],
    )
    assert [one.score for one in read] == [float(one["score"]) for one in raw] and len(read) == count


@pytest.mark.parametrize(
    ("name", "options", "description", "count"),
    [
        ("msra_ner/dev.tsv", {"quoting": False}, "tags: words = text_a, tags = label (100 records seen agree; texts are split at blanks)", 2318),
        ("wnut17/wnut17train.conll", {}, "tags: words = tokens, tags = tags (100 records seen agree)", 3394),
        ("wnut17/emerging.dev.conll", {}, "tags: words = tokens, tags = tags (100 records seen agree)", 1009),
        ("ud_english_ewt/en_ewt-ud-dev.conllu", {}, "tags: words = tokens, tags = tags (100 records seen agree; not used: lemmas, xpos, deprel)", 2001),
        ("up_english_ewt/en_ewt-up-dev.conllu", {}, "tags: words = tokens, tags = tags (100 records seen agree; not used: ", 2002),
    ],
)  # fmt: skip
def test_tags(name: str, options: dict[str, Any], description: str, count: int) -> None:
    _, read = everything(f"sequence_labelling/{name}", "token_classification", description, **options)
    assert len(read) == count and all(len(one.words) == len(one.tags) > 0 for one in read)
    tags = {tag.split("-")[0] for one in read for tag in one.tags}
    assert tags == {"O", "B", "I"} if "ewt" not in name else {"NOUN", "VERB", "PUNCT"} < tags


@pytest.mark.parametrize(
    ("name", "count", "moved", "several"),
    [("cmrc2018/cmrc2018_trial.json", 1002, 5, 0), ("policyqa/dev.json", 3809, 0, 1583)],
)
def test_questions(name: str, count: int, moved: int, several: int) -> None:
    _, read = everything(
        f"understanding/{name}",
        "question_answering",
        "question: question = question, context = context, answers = answers (100 records seen agree; not used: id, title)",
    )
    assert len(read) == count and sum(one.num_moved for one in read) == moved
    assert sum(len(one.answers) > 1 for one in read) == several
    assert all(one.context.startswith(text, start) for one in read for start, text in one.answers)
