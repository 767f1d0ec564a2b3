"""Shapes: what records are recognised as, what they mean, and that whatever is wrong is said with its place."""

import dataclasses
import json
import re
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from shape_fixtures import HI, SHAPES_OF, example, recognised, record, records, refusal, turns

from data_prep.config import SourceConfig
from data_prep.errors import BadDataError, DataConfigError, PreparationError
from data_prep.shapes.chat import ROLES, TURN_FIELDS
from data_prep.shapes.examples import (
    ChatExample,
    Example,
    LabelledExample,
    PromptExample,
    QuestionExample,
    RolesExample,
    ScoredExample,
    TaggedExample,
    TextExample,
)
from data_prep.shapes.fields import known_fields
from data_prep.shapes.recognise import recognise
from data_prep.shapes.shape import Shape, to_example

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
    ("causal_lm", {"instruction": "a", "input": " ", "output": "b"}, "alpaca", PromptExample("a", "b")),
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
        "semantic_roles",
        {"tokens": ["a", "b"], "roles": ["V", "A1"], "predicate": 0, "tags": ["X", "Y"]},
        "roles",
        RolesExample(("a", "b"), ("V", "A1"), (0,)),
    ),
    (
        "semantic_roles",
        {"words": "a b", "srl": ["O", "V"], "verb_index": [1, 1]},
        "roles",
        RolesExample(("a", "b"), ("O", "V"), (1,)),
    ),
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
        " left to the template: time; some turns say themselves whether they are trained: loss_weight)"
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
    arrived = ForkingPickler.loads(ForkingPickler.dumps(shape))
    assert arrived == shape and arrived.describe() == shape.describe()
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
        ("sequence_classification", {"text": "a", "x.y": 4}, {"fields": {"label": "x.y"}}, LabelledExample("a", ("4",))),
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
        ("sequence_classification", {"a": "b"}, {"shape": "label"}, "name them with `fields: {text: ..., label: ...}`"),
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
        ("sequence_classification", {"text": "a", "score": "1e999"}, {}, "field 'score' must be a finite number"),
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
    assert "answers that stand elsewhere than they say: 1" in recognised(value, "question_answering").describe()


# Values that get past the first checks often: known names, few texts, turns that are nearly right.
NAMES = sorted({name for shapes in SHAPES_OF.values() for shape in shapes for name in known_fields(shape)})
TURN_NAMES = [*sorted(TURN_FIELDS), "type", "text", "arguments", "function", "answer_start", "x"]
texts = st.sampled_from(["", " ", "a", "a b", "é", "\ud83d", "1", "2.5", "{}", '{"name": "f"}', '[{"name": "\\ud800"}]', "null", "[" * 3000, *ROLES, "text", "reasoning", "tool_call", "function"])  # fmt: skip
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**4000) | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TURN_NAMES), inner, max_size=4)
)
objects = st.dictionaries(st.sampled_from(NAMES), values, max_size=5)
SHAPES = [
    Shape(name, {ours: ours for ours in known_fields(name) if ours != "pair" or many}, many, ("context",))
    for shapes in SHAPES_OF.values()
    for name in shapes
    for many in (False, True)
]


@examples(400)
@given(objects, st.lists(objects, max_size=2), st.sampled_from(sorted(SHAPES_OF)))
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
        recognise(found, SourceConfig(path="data.jsonl"), task, SHAPES_OF)
    except PreparationError as error:
        assert str(error).isprintable()
