"""Every real sample file of a known shape: recognised from its first records, then read whole.

The files are read plainly here; the readers have their own tests.
"""

import csv
import gzip
import json
from collections.abc import Sequence
from typing import Any

import pytest
from data_fixtures import SAMPLES
from shape_fixtures import records

from data_prep.chat_shapes import ROLES
from data_prep.config import SourceConfig
from data_prep.examples import PromptExample, TextExample
from data_prep.shapes import recognise, to_example

pytestmark = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")


def json_lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SAMPLES / name).read_text(encoding="utf-8").split("\n") if line.strip()]


def json_array(name: str) -> list[dict[str, Any]]:
    return list(json.loads((SAMPLES / name).read_text(encoding="utf-8")))


def columns(name: str, names: Sequence[str], skip: int = 0) -> list[dict[str, Any]]:
    lines = (SAMPLES / name).read_text(encoding="utf-8").split("\n")[skip:]
    return [dict(zip(names, line.split("\t"), strict=True)) for line in lines if line]


def squad(name: str) -> list[dict[str, Any]]:
    data = json.loads((SAMPLES / name).read_text(encoding="utf-8"))["data"]
    return [
        {"context": paragraph["context"], **question}
        for article in data
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def all_examples(found: list[dict[str, Any]], task: str, description: str, **options: Any) -> list[Any]:
    """The examples of a whole real file, whose first 100 records were recognised as described."""
    read = records(found)
    shape = recognise(read[:100], SourceConfig(path="data.jsonl", **options), task)
    assert shape.describe().startswith(description)
    return [to_example(shape, one) for one in read]


def test_real_prompts_and_text() -> None:
    found = json_lines("generation/gsm8k/train.jsonl")
    read = all_examples(found, "causal_lm", "prompt: prompt = question, response = answer (100 records seen agree)")
    assert read == [PromptExample(one["question"], one["answer"]) for one in found] and len(read) == 7473
    found = json_lines("pretraining/c4_demo/c4_demo.jsonl")
    assert all_examples(found, "causal_lm", "text: text = text (") == [TextExample(one["text"]) for one in found]
    for language in ("en", "zh"):
        found = json_array(f"generation/alpaca_demo/alpaca_{language}_demo.json")
        for task in ("causal_lm", "seq2seq_lm"):
            read = all_examples(found, task, "alpaca: prompt = instruction + input, response = output (")
            assert [one.response for one in read] == [one["output"] for one in found]
            for one, raw in zip(read, found, strict=True):
                assert one.prompt == raw["instruction"] + ("\n\n" + raw["input"] if raw["input"] else "")
    found = json_lines("generation/seed_tasks/seed_tasks.jsonl")
    fields = {"input": "instances.0.input", "output": "instances.0.output"}
    read = all_examples(found, "causal_lm", "alpaca: prompt = instruction + instances.0.input", fields=fields)
    assert [one.response for one in read] == [one["instances"][0]["output"] for one in found]
    assert all(len(one["instances"]) == 1 for one in found)


def test_real_parallel_text() -> None:
    for split in ("dev", "test"):
        found = json_lines(f"generation/scitldr/{split}.jsonl")
        read = all_examples(
            found, "seq2seq_lm", "parallel: prompt = source, response = target (100 records seen agree; the sentences"
        )
        assert read == [PromptExample(" ".join(one["source"]), one["target"][0]) for one in found]
    lines = [
        gzip.decompress((SAMPLES / f"generation/multi30k/val.{language}.gz").read_bytes()).decode().split("\n")[:-1]
        for language in ("en", "de")
    ]
    found = [{"en": one, "de": other} for one, other in zip(*lines, strict=True)]
    read = all_examples(
        found, "seq2seq_lm", "parallel: prompt = en, response = de", fields={"source": "en", "target": "de"}
    )
    assert read == [PromptExample(one["en"], one["de"]) for one in found] and len(read) == 1014
    found = columns("generation/csl_ts/dev.tsv", ("task", "source", "target"))
    read = all_examples(
        found, "causal_lm", "parallel: prompt = source, response = target (100 records seen agree; not used: task)"
    )
    assert len(read) == 1000


def test_real_conversations() -> None:
    found = json_array("generation/chat/glaive_toolcall_en_demo.json")
    read = all_examples(found, "causal_lm", "sharegpt: messages = conversations (from, value), tools = tools (")
    calls = 0
    for one, raw in zip(read, found, strict=True):
        assert [tool["function"] for tool in one.tools or []] == json.loads(raw["tools"])
        for message, turn in zip(one.messages, raw["conversations"], strict=True):
            if turn["from"] == "function_call":
                calls += 1
                assert [call["function"] for call in message["tool_calls"]] == [json.loads(turn["value"])]
            else:
                assert message == {"role": ROLES[turn["from"]], "content": turn["value"]}
    assert len(read) == 300 and calls == 211

    found = json_lines("generation/chat/v1_sft_demo.jsonl")
    read = all_examples(
        found, "causal_lm", "messages: messages = messages (role, content) (100 records seen agree; some turns"
    )
    assert all(one.trained == (False, True) for one in read) and len(read) == 500
    assert [one.messages[1]["content"] for one in read] == [one["messages"][1]["content"][0]["value"] for one in found]

    found = json_lines("generation/chat/reason_tool_use_demo_50.jsonl")
    read = all_examples(found, "causal_lm", "messages: messages = messages (role, content), tools = tools (50 records")
    assistants = [message for one in read for message in one.messages if message["role"] == "assistant"]
    assert all(message["reasoning_content"] for message in assistants)
    assert sum(len(message.get("tool_calls", ())) for message in assistants) == 41 + 2 * 9 + 3 * 3
    assert all(one.trained is None for one in read)


def test_real_labels_and_scores() -> None:
    task = "sequence_classification"
    for split in ("train.3k", "dev"):
        found = json_lines(f"understanding/ocnli/{split}.json")
        read = all_examples(
            found,
            task,
            "label: text = sentence1, pair = sentence2, label = label (100 records seen agree; not used: level",
        )
        assert len(read) == 3000 and {one.labels[0] for one in read} == {"entailment", "neutral", "contradiction", "-"}
    found = columns("classification/sst2/train.tsv", ("text", "label"))
    read = all_examples(found, task, "label: text = text, label = label (")
    assert len(read) == 6920 and {one.labels for one in read} == {("0",), ("1",)}
    found = columns("classification/chnsenticorp/dev.tsv", ("label", "text_a"), skip=1)
    assert len(all_examples(found, task, "label: text = text_a, label = label (")) == 1200
    intents = json.loads((SAMPLES / "classification/clinc150/data_small.json").read_text(encoding="utf-8"))["train"]
    found = [{"text": text, "intent": intent} for text, intent in intents]
    read = all_examples(found, task, "label: text = text, label = intent (", fields={"label": "intent"})
    assert len({one.labels for one in read}) == 150
    with (SAMPLES / "classification/ag_news/test.csv").open(encoding="utf-8", newline="") as file:
        found = [dict(zip(("class", "title", "description"), row, strict=True)) for row in csv.reader(file)]
    fields = {"label": "class", "text": "title", "pair": "description"}
    read = all_examples(found, task, "label: text = title, label = class, pair = description (", fields=fields)
    assert len(read) == 7600 and {one.labels[0] for one in read} == {"1", "2", "3", "4"}
    with (SAMPLES / "understanding/stsb_en/stsb-en-train.csv").open(encoding="utf-8", newline="") as file:
        found = [dict(zip(("sentence1", "sentence2", "score"), row, strict=True)) for row in csv.reader(file)]
    read = all_examples(found, task, "score: text = sentence1, pair = sentence2, score = score (")
    assert len(read) == 5749 and [one.score for one in read] == [float(one["score"]) for one in found]
    parts = {"premise": "s1", "hypothesis": "s2", "label": "labels"}
    lines = {ours: (SAMPLES / f"understanding/snli_dev_esnli/{part}.dev").read_text(encoding="utf-8").splitlines() for ours, part in parts.items()}  # fmt: skip
    found = [dict(zip(parts, values, strict=True)) for values in zip(*lines.values(), strict=True)]
    read = all_examples(found, task, "label: text = premise, pair = hypothesis, label = label (")
    assert len(read) == 9842 and len({one.labels for one in read}) == 3


def test_real_tags_and_questions() -> None:
    found = columns("sequence_labelling/msra_ner/dev.tsv", ("text_a", "label"), skip=1)
    read = all_examples(
        found,
        "token_classification",
        "tags: words = text_a, tags = label (100 records seen agree; texts are split at blanks)",
    )
    assert len(read) == 2318 and {tag[0] for one in read for tag in one.tags} == {"O", "B", "I"}
    cmrc = all_examples(
        squad("understanding/cmrc2018/cmrc2018_trial.json"),
        "question_answering",
        "question: question = question, context = context, answers = answers (",
    )
    assert len(cmrc) == 1002 and sum(one.num_moved for one in cmrc) == 5
    policy = all_examples(squad("understanding/policyqa/dev.json"), "question_answering", "question: ")
    assert len(policy) == 3809 and sum(one.num_moved for one in policy) == 0
    assert sum(len(one.answers) > 1 for one in policy) == 1583
    for one in (*cmrc, *policy):
        assert all(one.context.startswith(text, start) for start, text in one.answers)
