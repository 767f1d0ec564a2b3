"""Shapes: what records are recognised as, what they mean, and that whatever is wrong is said with its place."""

import csv
import dataclasses
import gzip
import json
import pickle
import re
from collections.abc import Sequence
from typing import Any

import pytest
from data_fixtures import SAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import chat_shapes
from data_prep.chat_shapes import ROLES
from data_prep.config import SourceConfig
from data_prep.errors import BadDataError, DataConfigError, PreparationError
from data_prep.examples import (
    ChatExample,
    Example,
    LabelledExample,
    PromptExample,
    QuestionExample,
    ScoredExample,
    TaggedExample,
    TextExample,
)
from data_prep.records import Record
from data_prep.shape_forms import TASK_SHAPES, known_fields
from data_prep.shapes import Shape, recognise, to_example


def record(value: dict[str, Any], line: int = 1) -> Record:
    return Record(value, f"data.jsonl:{line}", line)


def records(values: Sequence[dict[str, Any]]) -> list[Record]:
    return [record(value, line) for line, value in enumerate(values, start=1)]


def recognised(values: dict[str, Any] | list[dict[str, Any]], task: str = "causal_lm", **options: Any) -> Shape:
    found = values if isinstance(values, list) else [values]
    return recognise(records(found), SourceConfig(path="data.jsonl", **options), task)


def example(value: dict[str, Any], task: str = "causal_lm", **options: Any) -> Example:
    return to_example(recognised(value, task, **options), record(value))


def refusal(values: dict[str, Any] | list[dict[str, Any]], task: str = "causal_lm", **options: Any) -> str:
    """What is said about records that cannot be read; always one line that begins with a place."""
    with pytest.raises(BadDataError) as caught:
        recognised(values, task, **options)
    message = str(caught.value)
    assert "\n" not in message and re.match(r"data\.jsonl:\d+: ", message) and len(message) < 1000
    return message


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


HI = turns(("user", "hi"), ("assistant", "hello"))
SQUAD = {"question": "who?", "context": "it was me, me", "answers": [{"text": "me", "answer_start": 7}]}

EXAMPLES: list[tuple[str, dict[str, Any], str, Example]] = [
    ("causal_lm", {"text": "a", "id": 3}, "text", TextExample("a")),
    ("causal_lm", {"content": "a"}, "text", TextExample("a")),
    ("causal_lm", {"text": "a", "messages": None}, "text", TextExample("a")),
    ("causal_lm", {"prompt": "a", "response": "b"}, "prompt", PromptExample("a", "b")),
    ("causal_lm", {"prompt": "a", "completion": ""}, "prompt", PromptExample("a", "")),
    ("causal_lm", {"question": "a", "answer": "b"}, "prompt", PromptExample("a", "b")),
    ("causal_lm", {"input": "a", "output": "b"}, "prompt", PromptExample("a", "b")),
    ("causal_lm", {"instruction": "a", "output": "b"}, "alpaca", PromptExample("a", "b")),
    ("causal_lm", {"instruction": "a", "input": "c", "output": "b"}, "alpaca", PromptExample("a\n\nc", "b")),
    ("causal_lm", {"instruction": "a", "input": "", "output": "b"}, "alpaca", PromptExample("a", "b")),
    ("causal_lm", {"instruction": "a", "input": None, "output": "b"}, "alpaca", PromptExample("a", "b")),
    ("causal_lm", {"instruction": "a", "context": "c", "response": "b"}, "alpaca", PromptExample("a\n\nc", "b")),
    ("causal_lm", {"source": "a", "target": "b"}, "parallel", PromptExample("a", "b")),
    ("causal_lm", {"source": ["a", "b"], "target": ["c", "d"]}, "parallel", PromptExample("a b", "c")),
    ("causal_lm", {"messages": HI}, "messages", ChatExample(HI)),
    ("causal_lm", {"conversations": HI}, "messages", ChatExample(HI)),
    ("causal_lm", {"prompt": "hi", "messages": HI}, "messages", ChatExample(HI)),
    ("sequence_classification", {"text": "a", "label": 1}, "label", LabelledExample("a", ("1",))),
    ("sequence_classification", {"text": "a", "label": True}, "label", LabelledExample("a", ("true",))),
    ("sequence_classification", {"text": "a", "label": "neg"}, "label", LabelledExample("a", ("neg",))),
    ("sequence_classification", {"text_a": "a", "label": "0"}, "label", LabelledExample("a", ("0",))),
    (
        "sequence_classification",
        {"text": "a", "labels": ["x", 2]},
        "label",
        LabelledExample("a", ("x", "2"), many=True),
    ),
    ("sequence_classification", {"text": "a", "labels": []}, "label", LabelledExample("a", (), many=True)),
    *(
        ("sequence_classification", {one: "a", two: "b", "label": "x"}, "label", LabelledExample("a", ("x",), "b"))
        for one, two in (
            ("text", "text_pair"),
            ("sentence1", "sentence2"),
            ("premise", "hypothesis"),
            ("text_a", "text_b"),
            ("question1", "question2"),
        )
    ),
    ("sequence_classification", {"text": "a", "score": 3}, "score", ScoredExample("a", 3.0)),
    ("sequence_classification", {"text": "a", "score": "3.50"}, "score", ScoredExample("a", 3.5)),
    ("sequence_classification", {"text": "a", "label": 3.5}, "score", ScoredExample("a", 3.5)),
    (
        "sequence_classification",
        {"sentence1": "a", "sentence2": "b", "score": "5.0"},
        "score",
        ScoredExample("a", 5.0, "b"),
    ),
    (
        "token_classification",
        {"tokens": ["a", "b c"], "ner_tags": [0, "B"]},
        "tags",
        TaggedExample(("a", "b c"), ("0", "B")),
    ),
    ("token_classification", {"words": ["a"], "tags": ["X"]}, "tags", TaggedExample(("a",), ("X",))),
    (
        "token_classification",
        {"text_a": "海 \u3000 钓", "label": "O O B"},
        "tags",
        TaggedExample(("海", "\u3000", "钓"), ("O", "O", "B")),
    ),
    ("question_answering", SQUAD, "question", QuestionExample("who?", "it was me, me", ((7, "me"),))),
    (
        "question_answering",
        {**SQUAD, "answers": {"text": ["me", "it"], "answer_start": [11, 0]}},
        "question",
        QuestionExample("who?", "it was me, me", ((11, "me"), (0, "it"))),
    ),
    ("question_answering", {**SQUAD, "answers": []}, "question", QuestionExample("who?", "it was me, me", ())),
    ("seq2seq_lm", {"source": "a", "target": "b"}, "parallel", PromptExample("a", "b")),
    ("seq2seq_lm", {"instruction": "a", "input": "c", "output": "b"}, "alpaca", PromptExample("a\n\nc", "b")),
]


@pytest.mark.parametrize(("task", "value", "name", "meaning"), EXAMPLES)
def test_records_are_recognised_by_their_fields(task: str, value: dict[str, Any], name: str, meaning: Example) -> None:
    shape = recognised(value, task)
    assert shape.name == name
    assert to_example(shape, record(value)) == meaning
    assert to_example(recognised(value, task, shape=name), record(value)) == meaning
    json.dumps(shape.key())


def test_what_was_recognised_is_one_line() -> None:
    alpaca = {"instruction": "a", "input": "b", "output": "c"}
    shape = recognised([alpaca, {**alpaca, "source_id": 3}, {"instruction": "a", "output": "c"}])
    assert shape.describe() == (
        "alpaca: prompt = instruction + input, response = output (3 records seen agree; not used: source_id)"
    )
    assert recognised({"text": "a"}).describe() == "text: text = text (1 record seen)"
    assert recognised({"source": ["a", "b"], "target": ["c", "d"], "title": "t"}).describe() == (
        "parallel: prompt = source, response = target (1 record seen; the sentences of a source are joined with blanks;"
        " of several targets the first is taken; not used: title)"
    )
    turn = {"role": "user", "content": "hi", "loss_weight": 0, "time": 3}
    assert recognised({"messages": [turn, HI[1]], "tools": "[]"}).describe() == (
        "messages: messages = messages (role, content), tools = tools (1 record seen;"
        " left to the template: time; some turns say themselves whether they are trained)"
    )
    assert (
        "(1 record seen; several labels a record)"
        in recognised({"text": "a", "labels": []}, "sequence_classification").describe()
    )
    nested = recognised({"meta": {"a": 1, "body": "t"}}, fields={"text": "meta.body"})
    assert nested.describe() == "text: text = meta.body (1 record seen)"
    odd = recognised({"text": "a", "x\ny" * 90: 1, "\ud800": 2}).describe()
    assert "\n" not in odd and len(odd) < 200 and odd.encode()


def test_a_shape_travels_to_workers_and_its_key_leaves_out_what_changes_nothing() -> None:
    values = [{"instruction": "a", "output": "b"}] * 3
    shape = recognised(values)
    assert pickle.loads(pickle.dumps(shape)) == shape
    assert pickle.loads(pickle.dumps(shape)).describe() == shape.describe()
    assert recognised(values[:1]).key() == shape.key() == json.loads(json.dumps(shape.key()))
    assert recognised(values, fields={"output": "instruction"}).key() != shape.key()
    with pytest.raises(dataclasses.FrozenInstanceError):
        shape.name = "text"  # type: ignore[misc]
    assert len({shape, recognised(values)}) == 1


@pytest.mark.parametrize(
    ("task", "value", "options", "meaning"),
    [
        ("causal_lm", {"body": "a", "text": "b"}, {"fields": {"text": "body"}}, TextExample("a")),
        ("causal_lm", {"text": "a", "prompt": "b", "response": "c"}, {"shape": "text"}, TextExample("a")),
        ("causal_lm", {"instruction": "a", "input": "x", "output": "b"}, {"shape": "prompt", "fields": {"prompt": "x.y", "response": "z"}}, None),
        ("causal_lm", {"q": "a", "a": "b"}, {"fields": {"prompt": "q", "response": "a"}}, PromptExample("a", "b")),
        ("causal_lm", {"translation": {"en": "a", "de": "b"}}, {"fields": {"source": "translation.en", "target": "translation.de"}}, PromptExample("a", "b")),
        ("causal_lm", {"a.b": "dotted", "a": {"b": "nested"}}, {"fields": {"text": "a.b"}}, TextExample("dotted")),
        ("causal_lm", {"instruction": "a", "instances": [{"input": "c", "output": "b"}]}, {"fields": {"input": "instances.0.input", "output": "instances.0.output"}}, PromptExample("a\n\nc", "b")),
        ("causal_lm", {"instruction": "a", "input": "x", "output": "b"}, {"fields": {"input": ""}, "shape": "alpaca"}, PromptExample("a", "b")),
        ("causal_lm", {"instruction": "a", "output": "b"}, {"shape": "prompt"}, PromptExample("a", "b")),
        ("causal_lm", {"chat": HI}, {"fields": {"messages": "chat"}}, ChatExample(HI)),
        ("causal_lm", {"messages": HI, "tools": ["search"]}, {"fields": {"tools": ""}}, ChatExample(HI)),
        ("sequence_classification", {"body": "a", "stars": 4}, {"fields": {"text": "body", "label": "stars"}}, LabelledExample("a", ("4",))),
        ("sequence_classification", {"class": "3", "title": "a", "description": "b"}, {"fields": {"text": "title", "pair": "description", "label": "class"}}, LabelledExample("a", ("3",), "b")),
        ("sequence_classification", {"body": "a", "sentence2": "b", "label": 1}, {"fields": {"text": "body"}}, LabelledExample("a", ("1",))),
        ("sequence_classification", {"text": "a", "text_pair": "b", "label": 1}, {"fields": {"pair": ""}}, LabelledExample("a", ("1",))),
        ("sequence_classification", {"text": "a", "label": 3}, {"shape": "score"}, ScoredExample("a", 3.0)),
        ("sequence_classification", {"text": "a", "label": "1.5"}, {"shape": "label"}, LabelledExample("a", ("1.5",))),
        ("sequence_classification", {"text": "a", "label": 2.0}, {"shape": "label"}, LabelledExample("a", ("2",))),
        ("token_classification", {"tokens": ["a"], "pos_tags": [1], "ner_tags": [2]}, {"fields": {"tags": "ner_tags"}}, TaggedExample(("a",), ("2",))),
    ],
)  # fmt: skip
def test_shape_and_fields_decide(task: str, value: dict[str, Any], options: Any, meaning: Example | None) -> None:
    if meaning is None:
        assert "does not fit (fields: instruction, input, output)" in refusal(value, task, **options)
    else:
        assert example(value, task, **options) == meaning


@pytest.mark.parametrize(
    ("task", "values", "options", "words"),
    [
        ("causal_lm", {"text": "a", "messages": HI}, {}, "data.jsonl:1: 2 readings fit, text (text = text) and messages (messages = messages); say which with `shape: text` or `shape: messages`"),
        ("causal_lm", {"prompt": "a", "response": "b", "completion": "c"}, {}, "`fields: {prompt: prompt, response: response}` or `fields: {prompt: prompt, response: completion}`"),
        ("causal_lm", {"instruction": "a", "input": "b", "context": "c", "output": "d"}, {}, "input and context could both be the input; say which with `fields: {input: input}` or `fields: {input: context}`"),
        ("sequence_classification", {"text": "a", "label": 1, "score": 0.5}, {}, "`shape: label` or `shape: score`"),
        ("token_classification", {"tokens": ["a"], "pos_tags": [1], "ner_tags": [2]}, {}, "`fields: {words: tokens, tags: ner_tags}` or `fields: {words: tokens, tags: pos_tags}`"),
        ("sequence_classification", {"text": "a", "label": 2.0}, {}, "whole numbers written with a decimal point; say with `shape: label` or `shape: score`"),
        ("sequence_classification", {"text": "a", "label": "2.0"}, {}, "whole numbers written with a decimal point"),
        ("causal_lm", {"instruction": "a", "instances": [{"input": "", "output": "b"}]}, {}, "no shape of task causal_lm (text, prompt, alpaca, sharegpt, messages, parallel) fits (fields: instruction, instances.0.input, instances.0.output)"),
        ("causal_lm", {"prompt": "a", "chosen": "b", "rejected": "c"}, {}, "fits (fields: prompt, chosen, rejected)"),
        ("causal_lm", SQUAD, {}, "for task question_answering it would be question"),
        ("causal_lm", {}, {}, "(fields: none)"),
        ("causal_lm", {"text": None}, {}, "(fields: text)"),
        ("causal_lm", {"a": "b"}, {"shape": "prompt"}, "shape prompt does not fit (fields: a); name them with `fields: {prompt: ..., response: ...}`"),
        ("causal_lm", {"body": "a"}, {"fields": {"text": "bdoy"}}, "shape text with these names does not fit (fields: body)"),
        ("causal_lm", {"messages": HI}, {"fields": {"tools": "functions"}, "shape": "messages"}, "no record seen has field 'functions', which `fields:` gives for tools (fields: messages)"),
        ("causal_lm", [{"text": "a"}, {"text": "a"}, {"messages": HI}], {}, "data.jsonl:3: the records of a source must agree: this one fits messages (messages = messages), data.jsonl:1 is text (text = text); split"),
        ("causal_lm", [{"text": "a"}, {"body": "a"}], {}, "data.jsonl:2: field 'text', which the first records of this source have, is missing (fields: body)"),
        ("causal_lm", [{"text": "a"}, {"text": None}], {}, "data.jsonl:2: field 'text', which the first records of this source have, is null"),
        ("causal_lm", [{"text": "a"}, {"text": "b", "messages": HI}], {}, "data.jsonl:2: the records of a source must agree: this one fits text (text = text) and messages (messages = messages), data.jsonl:1 is text"),
        ("causal_lm", [{"conversations": HI}, {"conversations": [{"from": "human", "value": "hi"}]}], {}, "data.jsonl:2: the records of a source must agree: this one fits sharegpt"),
        ("sequence_classification", [{"text": "a", "label": ["x"]}, {"text": "a", "label": "x"}], {}, "data.jsonl:2: field 'label' must be a list of labels, as in the first records of this source, not a text"),
        ("sequence_classification", [{"text": "a", "label": "x"}, {"text": "a", "label": ["x"]}], {}, "data.jsonl:2: field 'label' must be one label"),
        ("sequence_classification", [{"text": "a", "label": 1}, {"text": "a", "label": 1.5}, {"text": "a", "label": "x"}], {}, "data.jsonl:2: field 'label' is 1.5, not a whole number; for regression write `shape: score`"),
        ("causal_lm", {"text": 3}, {}, "field 'text' must be text, not a number"),
        ("causal_lm", {"prompt": "a", "response": ["b"]}, {}, "field 'response' must be text, not a list"),
        ("causal_lm", {"text": "ab\ud83d"}, {}, "field 'text' holds half of a surrogate pair at character 2"),
        ("causal_lm", {"source": ["a", 3], "target": "b"}, {}, "field 'source'[1] must be text, not a number"),
        ("causal_lm", {"source": "a", "target": []}, {}, "field 'target' is an empty list"),
        ("causal_lm", {"instruction": "a", "output": "b", "history": [["q", "a"], ["q"]]}, {}, "field 'history'[1] must be a list of two texts"),
        ("causal_lm", {"instruction": "a", "output": "", "system": "s"}, {}, "an empty turn of the assistant"),
        ("sequence_classification", {"text": "a", "label": ""}, {}, "field 'label' is empty"),
        ("sequence_classification", {"text": "a", "label": 10**5000}, {}, "field 'label' is too long a number"),
        ("sequence_classification", {"text": "a", "labels": ["x", None]}, {}, "field 'labels'[1] must be text, not null"),
        ("sequence_classification", {"sentence1": "a", "sentence2": 3, "label": 1}, {}, "field 'sentence2' must be text"),
        ("sequence_classification", {"text": "a", "score": "3,5"}, {}, "field 'score' must be a finite number, not the text '3,5'"),
        ("sequence_classification", {"text": "a", "score": True}, {}, "field 'score' must be a finite number, not a boolean"),
        ("sequence_classification", {"text": "a", "score": 10**400}, {}, "field 'score' must be a finite number, not a number"),
        ("token_classification", {"tokens": ["a", "b"], "tags": ["X"]}, {}, "2 words in field 'tokens', but 1 tags in field 'tags'"),
        ("token_classification", {"tokens": ["a", ""], "tags": ["X", "Y"]}, {}, "field 'tokens'[1] is an empty word"),
        ("token_classification", {"text": "a  b", "label": "X Y Z"}, {}, "field 'text'[1] is an empty word"),
        ("token_classification", {"tokens": [], "tags": []}, {}, "field 'tokens' must be a list, or text with blanks between, not empty"),
        ("question_answering", {**SQUAD, "answers": [{"text": "you", "answer_start": 0}]}, {}, "field 'answers'[0].text 'you' does not stand in the context"),
        ("question_answering", {**SQUAD, "answers": [{"text": "me", "answer_start": "7"}]}, {}, "field 'answers'[0].answer_start must be a whole number, not a text"),
        ("question_answering", {**SQUAD, "answers": [{"text": "me"}]}, {}, "field 'answers'[0] lacks 'answer_start'"),
        ("question_answering", {**SQUAD, "answers": [{"text": "", "answer_start": -1}]}, {}, "field 'answers'[0].text is empty"),
        ("question_answering", {**SQUAD, "answers": {"text": ["me"], "answer_start": []}}, {}, "lists `text` and `answer_start` of equal length"),
        ("question_answering", {**SQUAD, "answers": "me"}, {}, "field 'answers' must be a list of answers, not a text"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_with_place_and_remedy(task: str, values: Any, options: Any, words: str) -> None:
    assert words in refusal(values, task, **options)


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("causal_lm", {"shape": "tags"}, "shape: tags does not go with task causal_lm, which takes text, prompt"),
        ("causal_lm", {"shape": "text", "fields": {"body": "x"}}, "fields: 'body' is not a field of shape text; its fields are text"),
        ("causal_lm", {"fields": {"prompt": "a", "text": "b"}}, "fields: no shape of task causal_lm has prompt, text (known are text: text; prompt: prompt, response;"),
        ("causal_lm", {"fields": {"text": ""}}, "fields: text must be the name of a field, not empty"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant(task: str, options: Any, words: str) -> None:
    with pytest.raises(DataConfigError) as caught:
        recognised({"text": "a"}, task, **options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("task", "value"),
    [
        ("causal_lm", {"text": "a", "prompt": "b", "response": "c"}),
        ("causal_lm", {"prompt": "b", "response": "c", "completion": "d"}),
        ("causal_lm", {"question": "b", "answer": "c", "prompt": "d", "response": "e"}),
        ("causal_lm", {"text": "a", "prompt": "d", "response": "e", "completion": "c"}),
        ("causal_lm", {"instruction": "a", "output": "b", "response": "c"}),
        ("sequence_classification", {"text": "a", "label": 1, "labels": [1]}),
        ("sequence_classification", {"sentence": "a", "sentence1": "b", "sentence2": "c", "label": 1}),
        ("token_classification", {"tokens": ["a"], "text": "b", "tags": ["x"]}),
    ],
)
def test_every_remedy_for_several_readings_decides(task: str, value: dict[str, Any]) -> None:
    remedies = refusal(value, task).split("; say which with ")[1].split(" or ")
    read = []
    for remedy in remedies:
        options: dict[str, Any] = {}
        for key, text in re.findall(r"`(\w+): ([^`]+)`", remedy):
            options[key] = dict(re.findall(r'(\w+): (?:""|(\w+))', text)) if key == "fields" else text
        read.append(example(value, task, **options))
    assert len(read) > 1 and all(one not in read[:index] for index, one in enumerate(read))


def test_an_empty_source_is_an_error() -> None:
    with pytest.raises(BadDataError, match=r"data\.jsonl: holds no records"):
        recognised([])


def test_alpaca_with_history_or_system_prompt_is_a_conversation() -> None:
    value = {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["q", "r"]]}
    whole = turns(("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "a\n\nb"), ("assistant", "c"))
    assert example(value) == ChatExample(whole)
    assert (
        recognised(value)
        .describe()
        .startswith("alpaca: system = system, history = history, prompt = instruction + input")
    )
    # A source is of one kind: a record without them is a conversation too.
    shape = recognised([value, {"instruction": "a", "output": "c"}])
    assert to_example(shape, record({"instruction": "a", "system": "", "output": "c"})) == ChatExample(
        whole[3:4] and turns(("user", "a"), ("assistant", "c"))
    )
    # ... and where no first record has them, a later one that does is not silently read without.
    plain = recognised({"instruction": "a", "output": "c"})
    assert to_example(
        plain, record({"instruction": "a", "output": "c", "history": [], "system": None})
    ) == PromptExample("a", "c")
    for late in ({"system": "s"}, {"history": [["q", "r"]]}, {"context": "b"}):
        with pytest.raises(BadDataError, match=r"data\.jsonl:9: field '\w+' is filled here, but in none of the first"):
            to_example(plain, record({"instruction": "a", "output": "c", **late}, 9))
    assert example(value, fields={"system": "", "history": ""}) == PromptExample("a\n\nb", "c")
    with pytest.raises(DataConfigError, match=r'task seq2seq_lm takes prompts.*`fields: \{system: ""\}`'):
        recognised(value, "seq2seq_lm")
    assert example(value, "seq2seq_lm", fields={"system": "", "history": ""}) == PromptExample("a\n\nb", "c")


def test_answers_are_taken_where_they_stand_nearest() -> None:
    def answer(context: str, text: str, start: int) -> tuple[int, int]:
        value = {"question": "?", "context": context, "answers": [{"text": text, "answer_start": start}]}
        found = example(value, "question_answering")
        assert isinstance(found, QuestionExample)
        return found.answers[0][0], found.num_moved

    context = "ab..ab....ab"
    nearest = {0: 0, 1: 0, 2: 0, 3: 4, 4: 4, 6: 4, 7: 4, 8: 10, 10: 10, 11: 10, 99: 10, -5: 0}
    assert {start: answer(context, "ab", start) for start in nearest} == {
        start: (place, int(place != start)) for start, place in nearest.items()
    }
    for text in ("aa", "aaa"):
        for start in range(-2, 9):
            places = [at for at in range(6) if "aaabaa".startswith(text, at)]
            assert answer("aaabaa", text, start)[0] == min(places, key=lambda at: (abs(at - start), at))
    value = {"question": "?", "context": "x y", "answers": [{"text": "y", "answer_start": 1}]}
    assert "1 answers stand elsewhere than they say" in recognised(value, "question_answering").describe()


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"name": "f", "parameters": {}}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "human", "content": "a"}, {"role": "user", "content": "a"}),
        ({"role": "system", "content": ""}, {"role": "system", "content": ""}),
        ({"role": "tool", "content": ""}, {"role": "tool", "content": ""}),
        ({"role": "user", "content": "a", "name": None, "tool_calls": None}, {"role": "user", "content": "a"}),
        ({"role": "user", "content": "a", "name": "bob"}, {"role": "user", "content": "a", "name": "bob"}),
        ({"role": "function", "content": "a", "name": "f"}, {"role": "tool", "content": "a", "name": "f"}),
        ({"role": "tool", "content": "a", "tool_call_id": "7"}, {"role": "tool", "content": "a", "tool_call_id": "7"}),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]}, {"role": "user", "content": "ab"}),
        ({"role": "assistant", "content": "a", "reasoning_content": "r"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}),
        ({"role": "assistant", "content": [{"type": "reasoning", "value": "r"}, {"type": "text", "value": "a"}]}, {"role": "assistant", "content": "a", "reasoning_content": "r"}),
        ({"role": "assistant", "content": [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}]}, {"role": "assistant", "content": "a", "reasoning_content": "r"}),
        ({"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]}, {"role": "assistant", "content": "", "tool_calls": [CALL]}),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "assistant", "content": "", "tool_calls": [CALL]}),
        ({"role": "assistant", "tool_calls": [{**CALL, "id": "9", "function": {"name": "f", "arguments": '{"x": 1}'}}]}, {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "9"}]}),
        ({"role": "assistant", "content": "a", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}, {"role": "assistant", "content": "a", "tool_calls": [CALL]}),
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}),
        ({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}, {"role": "assistant", "content": "", "tool_calls": [CALL]}),
        ({"role": "assistant", "content": "a", "timestamp": 5}, {"role": "assistant", "content": "a", "timestamp": 5}),
    ],
)  # fmt: skip
def test_turns_of_messages(turn: dict[str, Any], message: dict[str, Any]) -> None:
    assert example({"messages": [turn]}) == ChatExample([message])


def test_sharegpt_with_tools() -> None:
    value = {
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "{}"},
            {"from": "function_call", "value": '[{"name": "f", "arguments": "{\\"x\\": 1}"}, {"name": "g"}]'},
            {"from": "tool", "value": "3"},
            {"from": "gpt", "value": "hello"},
        ],
        "system": "s",
        "tools": json.dumps([TOOL, {"type": "function", "function": TOOL}]),
    }
    second = {"type": "function", "function": {"name": "g", "arguments": {}}}
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "{}"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, second]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "hello"},
    ]
    assert recognised(value).name == "sharegpt"
    assert example(value) == ChatExample(messages, [{"type": "function", "function": TOOL}] * 2)
    for none in (None, "", "[]", [], "null"):
        assert example({**value, "tools": none, "system": ""}) == ChatExample(messages[1:])


def test_turns_may_say_themselves_whether_they_are_trained() -> None:
    def trained(*marks: dict[str, Any], **more: Any) -> tuple[bool | None, ...] | None:
        value = {"messages": [{"role": "assistant", "content": "a", **mark} for mark in marks], **more}
        found = example(value)
        assert isinstance(found, ChatExample)
        assert all(not {"loss_weight", "weight", "train"} & set(message) for message in found.messages)
        return found.trained

    assert trained({}, {}) is None
    assert trained({"loss_weight": 0.0}, {"loss_weight": 1.0}, {}) == (False, True, None)
    assert trained({"train": True}, {"weight": 0}, {"weight": None}) == (True, False, None)
    assert trained({"train": False}, system="s") == (None, False)
    for mark, words in (
        ({"loss_weight": 0.5}, r"messages\[0\]\.loss_weight must be 0 or 1: fractions"),
        ({"train": 1}, r"messages\[0\]\.train must be true or false"),
        ({"weight": "1"}, r"messages\[0\]\.weight must be 0 or 1"),
        ({"train": True, "weight": 0}, r"messages\[0\]: weight and train contradict each other"),
    ):
        with pytest.raises(BadDataError, match=words):
            trained(mark)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"messages": "hello"}, "field 'messages' must be a list of turns, not a text"),
        ({"messages": []}, "field 'messages' must be a list of turns, not an empty list"),
        ({"messages": ["hello"]}, "messages[0] must be an object, not a text"),
        ({"messages": [*HI, {"content": "a"}]}, "messages[2] lacks 'role'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content must be text, not null"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be text, not a number"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "messages[0].content is empty: a turn of 'user' must say"),
        ({"messages": [{"role": "assistant", "content": []}]}, "messages[0].content is empty"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "messages[0].content is empty"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0].role is 'bot'; known are system, developer, user"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role must be text, not a list"),
        ({"messages": [{"role": "user", "content": "a\ud83d"}]}, "messages[0].content holds half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "a", "x": "\ud83d"}]}, "messages[0] holds half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type is 'image_url'; known are"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0] lacks 'text' or 'value'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0] must be an object"),
        ({"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "reasoning", "value": "r"}]}]}, "messages[0].content[1]: reasoning after text"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "messages[0]: tool calls in a turn of 'user'"),
        ({"messages": [{"role": "user", "content": "a", "reasoning_content": "r"}]}, "messages[0]: reasoning in a turn of 'user'"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]}, "messages[0].tool_calls[0].function.arguments is not valid JSON (character 1)"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]}, "messages[0].tool_calls[0].function.arguments must be an object, not a list"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].name must be text, not null"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{**CALL, "type": "custom"}]}]}, "messages[0].tool_calls[0].type must be 'function'"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": NaN}'}}]}]}, "arguments is not valid JSON: NaN is not a JSON number"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": ' + "[" * 10**6}}]}]}, "arguments is JSON nested too deeply"),
        ({"messages": HI, "tools": {"a": 1}}, "tools must be a list of tools, not an object"),
        ({"messages": HI, "tools": "[1]"}, "tools[0] must be an object, not a number"),
        ({"messages": HI, "tools": "search"}, "tools is not valid JSON"),
        ({"messages": HI, "tools": '[{"name": "\\ud83d"}]'}, "tools holds half of a surrogate pair"),
        ({"messages": HI, "system": 3}, "field 'system' must be text, not a number"),
        ({"messages": [{"role": "system", "content": "a"}, *HI], "system": "s"}, "field 'system' and the first turn are both a system prompt"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}, "conversations[1].value is empty: a turn of 'gpt'"),
        ({"conversations": [{"from": "alice", "value": "a"}]}, "conversations[0].from is 'alice'; known are"),
        ({"conversations": [{"from": "human", "value": "a", "content": "b"}]}, "conversations[0].from"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "conversations[0].value is not valid JSON (character 0)"),
        ({"conversations": [{"from": "function_call", "value": '["f"]'}]}, "conversations[0].value[0] must be an object with a function's name, not a text"),
    ],
)  # fmt: skip
def test_faulty_conversations(value: dict[str, Any], words: str) -> None:
    if words == "conversations[0].from":  # content beside from and value: neither kind of turn
        assert "conversations[0] lacks 'role'" in refusal(value)
        assert "conversations[0] has 'content' beside the field that stands for it" in refusal(value, shape="sharegpt")
    else:
        assert words in refusal(value)


# Values that get past the first checks often: known names, few texts, turns that are nearly right.
NAMES = sorted({name for shapes in TASK_SHAPES.values() for shape in shapes for name in known_fields(shape)})
TURN_NAMES = [*sorted(chat_shapes.TURN_FIELDS), "type", "text", "arguments", "function", "answer_start", "x"]
texts = st.sampled_from(["", " ", "a", "a b", "é", "\ud83d", "1", "2.5", "{}", '{"name": "f"}', '[{"name": "\\ud800"}]', "null", "[" * 3000, *ROLES, "text", "reasoning", "tool_call", "function"])  # fmt: skip
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**4000) | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TURN_NAMES), inner, max_size=4)
)
objects = st.dictionaries(st.sampled_from(NAMES), values, max_size=5)
SHAPES = [
    Shape(name, {ours: ours for ours in known_fields(name) if ours != "pair" or many}, many, ("context",))
    for shapes in TASK_SHAPES.values()
    for name in shapes
    for many in (False, True)
]


@settings(max_examples=400, deadline=None)
@given(objects, st.lists(objects, max_size=2), st.sampled_from(sorted(TASK_SHAPES)))
def test_any_objects_are_read_or_refused_in_one_line(
    value: dict[str, Any], others: list[dict[str, Any]], task: str
) -> None:
    for shape in SHAPES:
        try:
            found = to_example(shape, record(value))
        except BadDataError as error:
            assert str(error).startswith("data.jsonl:1: ") and str(error).isprintable()
        else:
            json.dumps(dataclasses.asdict(found), ensure_ascii=False, allow_nan=False).encode()
    found = records([value, *others])
    try:
        recognise(found, SourceConfig(path="data.jsonl"), task)
    except PreparationError as error:
        assert str(error).isprintable()


near_turns = st.lists(st.fixed_dictionaries({"role": st.sampled_from(sorted(ROLES)), "content": st.sampled_from(["a", "é", "", " ", "\ud83d"])}), min_size=1, max_size=3)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(near_turns, st.booleans())
def test_the_short_way_says_what_the_careful_one_would(found: list[dict[str, Any]], sharegpt: bool) -> None:
    keys = {"role": "from", "content": "value"} if sharegpt else {"role": "role", "content": "content"}
    given_turns = [{keys[name]: text for name, text in turn.items()} for turn in found]
    fields = tuple(keys.values())
    short = chat_shapes._plain_messages(given_turns, *fields)
    try:
        careful = chat_shapes._careful_messages(record({"turns": given_turns}), "turns", *fields)
    except BadDataError:
        assert short is None
    else:
        assert careful[1] is None and short in (None, careful[0])
        assert short is not None or any(turn["role"] == "function_call" for turn in found)


def test_ordinary_conversations_go_the_short_way() -> None:
    plain = turns(("system", "s"), ("user", "漢字"), ("assistant", "b"), ("tool", ""))
    assert chat_shapes._plain_messages(plain, "role", "content") == plain


# Real files, read plainly here; the readers have their own tests.

needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")


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


@needs_samples
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


@needs_samples
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


@needs_samples
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


@needs_samples
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


@needs_samples
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
