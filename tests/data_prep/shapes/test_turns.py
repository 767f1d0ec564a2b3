"""How turns are written: roles by other names, other field names, tool calls of several formats, prompts as turns."""

import json
from typing import Any

import pytest
from shape_fixtures import HI, SHAPES_OF, example, recognised, record, records, refusal, turns

from data_prep.config import SourceConfig
from data_prep.errors import BadDataError
from data_prep.shapes.examples import ChatExample, PromptExample
from data_prep.shapes.recognise import recognise
from data_prep.shapes.shape import to_example

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
AS_TEXT = '{"name": "f", "arguments": {"x": 1}}'


def chat(value: dict[str, Any], roles: Any = None, apply_to: tuple[str, ...] = (), **options: Any) -> Any:
    config = SourceConfig(path="data.jsonl", **options)
    shape = recognise(records([value]), config, "causal_lm", SHAPES_OF, roles=roles, apply_to=apply_to)
    return to_example(shape, record(value))


@pytest.mark.parametrize(
    ("role", "meaning"),
    [
        *((name, "assistant") for name in ("model", "bot", "GPT", "ASSISTANT", "Chatbot", "CHATBOT", "ai", "chatgpt")),
        *((name, "user") for name in ("human", "USER", "Human", "prompter")),
        *((name, "tool") for name in ("ipython", "tool_response", "observation", "function", "FUNCTION RESPONSE", "tool-result")),
        ("SYSTEM", "system"), ("Developer", "developer"),
    ],
)  # fmt: skip
def test_roles_of_well_known_formats(role: str, meaning: str) -> None:
    for names in (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content")):
        found = example({"conversations": [dict(zip(names, (role, "a"), strict=True))]})
        assert found == ChatExample([{"role": meaning, "content": "a"}])


def test_roles_are_mapped_whatever_their_capitals() -> None:
    value = {"messages": [{"role": "Customer", "content": "q"}, {"role": "Help-Desk", "content": "a"}]}
    found = chat(value, roles={"customer": "user", "help_desk": "assistant"})
    assert [message["role"] for message in found.messages] == ["user", "assistant"]
    found = chat({"messages": [{"role": "Human", "content": "q"}]}, roles={"human": "assistant"})
    assert found.messages[0]["role"] == "assistant"  # what the run file says goes before what is known


def test_other_roles_are_mapped_and_all_unknown_ones_are_named() -> None:
    talk = turns(("asker", "a"), ("Expert", "b"), ("asker", "c"), ("user", "d"))
    assert chat({"messages": talk}, {"asker": "user", "Expert": "assistant"}) == ChatExample(
        turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("user", "d"))
    )
    assert chat({"messages": turns(("user", "a"))}, {"user": "assistant"}).messages[0]["role"] == "assistant"
    call = {"messages": [*turns(("user", "a"), ("asker", AS_TEXT))]}
    assert chat(call, {"asker": "tool_call"}).messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    said = refusal([{"messages": talk}] * 3)
    assert "the roles 'asker' (6 turns), 'Expert' (3 turns) are not known" in said
    assert "`data.chat.roles: {'asker': assistant, 'Expert': assistant}`" in said


def test_the_fields_of_turns_are_mapped() -> None:
    value = {"dialog": [{"speaker": "USER", "utterance": "a"}, {"speaker": "bot", "utterance": "b"}]}
    fields = {"messages": "dialog", "role": "speaker", "content": "utterance"}
    assert chat(value, fields=fields) == ChatExample(turns(("user", "a"), ("assistant", "b")))
    assert "messages = dialog (speaker, utterance)" in recognised(value, fields=fields).describe()
    with pytest.raises(
        BadDataError, match=r"lacks 'role' \(its fields: speaker, utterance\); name the two .*`fields: {role: "
    ):
        chat(value, fields={"messages": "dialog"})
    value = {"messages": [{"speaker": "user", "content": "a"}]}
    assert chat(value, fields={"role": "speaker"}) == ChatExample(turns(("user", "a")))


def test_tool_calls_of_ms_swift_belong_to_the_turn_of_the_assistant() -> None:
    ask, answer = turns(("user", "a"), ("assistant", "b"))
    call, result = turns(("tool_call", AS_TEXT), ("tool_response", "3"))
    tool = {"role": "tool", "content": "3"}
    both = {"role": "assistant", "content": "b", "tool_calls": [CALL, CALL]}
    alone = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert example({"messages": [ask, call, result, answer]}) == ChatExample([ask, alone, tool, answer])
    assert example({"messages": [ask, answer, call, call, result, result]}) == ChatExample([ask, both, tool, tool])
    assert example({"messages": [ask, {**call, "content": f"[{AS_TEXT}]"}]}) == ChatExample([ask, alone])
    found = example({"messages": [ask, {**call, "loss": False}, {**call, "loss": False}, result]})
    assert isinstance(found, ChatExample) and found.trained == (None, False, None)
    assert "flag both alike" in refusal({"messages": [ask, answer, {**call, "loss": False}]})
    sharegpt = [{"from": "human", "value": "a"}, {"from": "function_call", "value": AS_TEXT}] * 2
    assert len(chat({"conversations": sharegpt}).messages) == 4  # a function_call turn is a turn of its own


def test_prompt_and_completion_as_lists_of_turns() -> None:
    history = turns(("system", "s"), ("user", "a"), ("assistant", "no"), ("user", "b"))
    answer = turns(("assistant", "yes"))
    value = {"prompt": history, "completion": answer, "tools": json.dumps([{"name": "f"}])}
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(value) == ChatExample([*history, *answer], tools, (False, False, False, False, None))
    shape = recognised(value)
    assert (
        shape.gives_chats
        and "prompt = prompt (role, content), response = completion (role, content)" in shape.describe()
    )
    flagged = {**value, "completion": [{**answer[0], "loss": 0}, *answer]}
    assert chat(flagged).trained == (False, False, False, False, False, None)
    with pytest.raises(BadDataError, match="field 'completion' must be a list of turns, not a text"):
        chat({**value, "completion": "yes"})
    with pytest.raises(BadDataError, match="field 'prompt' must be text, not a list"):
        recognised({"prompt": history, "completion": answer}, "seq2seq_lm")


PAIRS = [
    ("prompt", {"prompt": "a", "response": "b"}, "a"),
    ("prompt", {"question": "a", "answer": "b"}, "a"),
    ("alpaca", {"instruction": "a", "input": "c", "output": "b"}, "a\n\nc"),
    ("alpaca", {"instruction": "a", "input": "", "output": "b"}, "a"),
    ("parallel", {"source": ["a", "c"], "target": ["b", "d"]}, "a c"),
]


@pytest.mark.parametrize(("shape", "value", "prompt"), PAIRS)
def test_prompts_become_turns_where_the_run_file_says_so(shape: str, value: dict[str, Any], prompt: str) -> None:
    assert chat(value) == PromptExample(prompt, "b")
    assert chat(value, apply_to=(shape,)) == ChatExample(turns(("user", prompt), ("assistant", "b")))
    assert chat(value, apply_to=tuple({"prompt", "alpaca", "parallel"} - {shape})) == PromptExample(prompt, "b")
    empty = {name: "" if text == "b" else ["", "d"] if text == ["b", "d"] else text for name, text in value.items()}
    with pytest.raises(BadDataError, match="the response is empty: as a turn of a conversation"):
        chat(empty, apply_to=(shape,))


def test_nothing_changes_for_plain_records() -> None:
    assert recognised({"messages": HI}).key() == {"name": "messages", "fields": {"messages": "messages", "system": "system", "tools": "tools"}, "many": False, "flags": True}  # fmt: skip
