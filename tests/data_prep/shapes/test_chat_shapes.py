"""Conversations of OpenAI's and ShareGPT's form: what they become, and what is wrong with faulty ones."""

import json
from typing import Any

import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from shape_fixtures import HI, example, recognised, record, refusal, turns

from data_prep.errors import BadDataError
from data_prep.shapes.chat import plain_messages, read_turns
from data_prep.shapes.examples import ChatExample
from data_prep.shapes.roles import ROLES, TurnForm

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
        ({"role": "assistant", "content": "a", "tool_calls": [{"name": "f", "arguments": {"x": 1}, "id": "9"}]}, {"role": "assistant", "content": "a", "tool_calls": [{**CALL, "id": "9"}]}),
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
        ({"loss_weight": 0.5}, r"messages\[0\]\.loss_weight must be 0 or 1 \(or true, false\), not 0\.5"),
        ({"train": 2}, r"messages\[0\]\.train must be 0 or 1"),
        ({"weight": "some"}, r"messages\[0\]\.weight must be 0 or 1 \(or true, false\), not 'some'"),
        ({"train": True, "weight": 0}, r"messages\[0\]\.train and messages\[0\]\.weight contradict each other"),
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
        ({"messages": [{"role": "alice", "content": "a"}]}, "the role 'alice' (1 turn) is not known; write what each means, system, developer, user"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role must be text, not a list"),
        ({"messages": [{"role": "user", "content": "a\ud83d"}]}, "messages[0].content holds half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "a", "x": "\ud83d"}]}, "messages[0] holds half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type is 'image_url'; known are"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0] lacks 'text' or 'value'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0] must be an object"),
        ({"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "reasoning", "value": "r"}]}]}, "messages[0].content[1]: reasoning after text"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "messages[0]: tool calls in a turn of 'user'"),
        ({"messages": [{"role": "user", "content": "a", "reasoning_content": "r"}]}, "messages[0]: reasoning in a turn of 'user'"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]}, "messages[0].tool_calls[0].function.arguments: not valid JSON (column 2)"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]}, "messages[0].tool_calls[0].function.arguments must be an object, not a list"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].name must be text, not null"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{**CALL, "type": "custom"}]}]}, "messages[0].tool_calls[0].type must be 'function'"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": NaN}'}}]}]}, "arguments: not valid JSON: NaN is not a JSON number"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": ' + "[" * 10**6}}]}]}, "arguments: JSON nested too deeply"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1e999}'}}]}]}, "arguments: not valid JSON: 1e999 is beyond every number"),
        ({"messages": HI, "tools": {"a": 1}}, "tools must be a list of tools, not an object"),
        ({"messages": HI, "tools": "[1]"}, "tools[0] must be an object, not a number"),
        ({"messages": HI, "tools": "search"}, "tools: not valid JSON"),
        ({"messages": HI, "tools": '[{"name": "\\ud83d"}]'}, "tools: field '[0].name' holds half of a surrogate pair"),
        ({"messages": HI, "system": 3}, "field 'system' must be text, not a number"),
        ({"messages": [{"role": "system", "content": "a"}, *HI], "system": "s"}, "field 'system' and the first turn are both a system prompt"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}, "conversations[1].value is empty: a turn of 'gpt'"),
        ({"conversations": [{"from": "alice", "value": "a"}]}, "the role 'alice' (1 turn) is not known; write what each means, "),
        ({"conversations": [{"from": "human", "value": "a", "content": "b"}]}, "conversations[0].from"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "conversations[0].value: not valid JSON (column 1)"),
        ({"conversations": [{"from": "function_call", "value": '["f"]'}]}, "conversations[0].value[0] must be an object with a function's name, not a text"),
    ],
)  # fmt: skip
def test_faulty_conversations(value: dict[str, Any], words: str) -> None:
    if words == "conversations[0].from":  # content beside from and value: neither kind of turn
        assert "conversations[0] lacks 'role'" in refusal(value)
        assert "conversations[0] has 'content' beside the field that stands for it" in refusal(value, shape="sharegpt")
    else:
        assert words in refusal(value)


near_turns = st.lists(st.fixed_dictionaries({"role": st.sampled_from(sorted(ROLES)), "content": st.sampled_from(["a", "é", "", " ", "\ud83d"])}), min_size=1, max_size=3)  # fmt: skip


@examples(300)
@given(near_turns, st.booleans())
def test_the_short_way_says_what_the_careful_one_would(found: list[dict[str, Any]], sharegpt: bool) -> None:
    form = TurnForm("from", "value") if sharegpt else TurnForm()
    given_turns = [{form.role: turn["role"], form.content: turn["content"]} for turn in found]
    short = plain_messages(given_turns, form)
    try:
        careful = read_turns(record({"turns": given_turns}), "turns", form)
    except BadDataError:
        assert short is None
    else:
        assert all(turn.trained is None for turn in careful)
        assert short in (None, [turn.message for turn in careful])
        assert short is not None or any(ROLES[turn["role"]] == "tool_call" for turn in found)


def test_ordinary_conversations_go_the_short_way() -> None:
    plain = turns(("system", "s"), ("user", "漢字"), ("assistant", "b"), ("tool", ""))
    assert plain_messages(plain, TurnForm()) == plain
