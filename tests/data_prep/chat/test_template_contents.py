"""What conversations hold: tool calls, parts, control strings, noncharacters: written, kept as text, or refused."""

import pytest
from chat_templates import (
    CHATML,
    FORMATS,
    MISTRAL,
    OWN,
    chat_format,
    control_strings,
    literals,
    talk,
    theirs,
    trained,
    trl_templates,
)

from data_prep.errors import BadDataError
from data_prep.shapes.examples import ChatExample

CALL = {"name": "find", "arguments": {"place": "Rome"}}


@pytest.mark.parametrize(
    ("stem", "said"),
    [
        ("qwen2_5", '<tool_call>\n{"name": "find", "arguments": {"place": "Rome"}}\n</tool_call><|im_end|>'),
        ("llama3_1", '{"name": "find", "parameters": {"place": "Rome"}}<|eot_id|>'),
        ("gptoss", ' to=functions.find<|channel|>commentary json<|message|>{"place": "Rome"}<|call|>'),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_tool_calls_are_trained_in_the_form_the_template_takes(stem: str, said: str, as_text: bool) -> None:
    path = {path.stem: path for path in trl_templates()}.get(stem)
    if path is None:
        pytest.skip("needs TRL's chat templates")
    template = path.read_text(encoding="utf-8")
    chat = chat_format(template, control_strings(template))
    call = {"type": "function", "function": {**CALL, "arguments": '{"place": "Rome"}'} if as_text else CALL}
    tools = [{"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": {
        "type": "object", "properties": {"place": {"type": "string", "description": "it"}}}}}]  # fmt: skip
    messages = [
        *talk("u", "Where?").messages,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "find", "content": "here"},
        *talk("a", "There.").messages,
    ]
    rendered = chat.render(ChatExample(messages, tools), "a:1")
    assert trained(rendered)[0].strip() == said.strip()
    assert "There." in trained(rendered)[1]
    if not as_text:
        assert rendered.text == theirs(template, ChatExample(messages, tools))[0]


def test_what_the_template_would_drop_is_refused() -> None:
    chat = chat_format(CHATML)
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
    with pytest.raises(BadDataError, match=r"a:7: messages\[1\]: the chat template does not write tool calls"):
        chat.render(ChatExample([*talk("u", "x").messages, call]), "a:7")
    with pytest.raises(BadDataError, match="a:7: the chat template does not write the tools"):
        chat.render(ChatExample(talk("ua", "x", "y").messages, [{"name": "f"}]), "a:7")
    image = ChatExample([{"role": "user", "content": [{"type": "image"}]}, *talk("a", "y").messages])
    with pytest.raises(BadDataError, match=r"messages\[0\].content: only parts of type text can be trained, not image"):
        chat.render(image, "a:7")
    parts = ChatExample([{"role": "user", "content": [{"type": "text", "text": "x"}]}, *talk("a", "y").messages])
    assert chat.render(parts, "a:7") == chat.render(talk("ua", "x", "y"), "a:7")
    shows_half = CHATML.replace("message.content", "message.content[:20]")
    with pytest.raises(BadDataError, match=r"a:7: the chat template does not write what messages\[1\] says"):
        chat_format(shows_half).render(talk("ua", "x", "y" * 30), "a:7")
    with pytest.raises(BadDataError, match=r"a:7: .*messages\[1\].tool_calls: a object cannot be written"):
        chat.render(ChatExample([*talk("u", "x").messages, {**call, "tool_calls": [object()]}]), "a:7")


@pytest.mark.parametrize("name", OWN)
def test_control_strings_in_content_stay_text_and_change_nothing_else(name: str) -> None:
    chat = FORMATS[name]
    plain = chat.render(talk("uaua", "say STOP now", "STOP", "éSTOPSTOP", " xSTOP"), "a:1")
    rendered = chat.render(talk("uaua", "say </s> now", "</s>", "é</s></s>", " x</s>"), "a:1")
    assert rendered.text == plain.text.replace("STOP", "</s>")
    assert literals(rendered) == ["</s>"] * 5
    assert [said.replace("STOP", "</s>") for said in trained(plain)] == trained(rendered)
    assert rendered[2:4] == plain[2:4]


def test_control_strings_are_found_wherever_they_hide() -> None:
    chat = chat_format(CHATML, control=("<|im_start|>", "<|im_end|>", "aba"))
    assert literals(chat.render(talk("ua", "ababa", "x"), "a:1")) == ["aba", "aba"]
    spread = ChatExample(
        [{"role": "user", "content": [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]}]
    )
    with pytest.raises(BadDataError, match=r"messages\[0\].content: the string of a control token is spread"):
        chat.render(spread, "a:1")
    with pytest.raises(BadDataError, match="holds the string of a control token"):
        chat.prompt_text(talk("u", "<|im_end|>").messages, True, "a:1")


def test_control_strings_of_answers_that_the_template_reads_keep_their_meaning() -> None:
    reads = CHATML.replace("message.content", "message.content.split('</think>')[-1]")
    chat = chat_format(reads, control=("<|im_start|>", "<|im_end|>", "</think>"))
    assert trained(chat.render(talk("ua", "a", "why</think>so"), "a:1")) == ["so<|im_end|>"]
    assert literals(chat.render(talk("ua", "why</think>so", "b"), "a:1")) == ["</think>"]


PARTED = CHATML.replace("+ message.content +", "}}{{- message.content }}{{-").replace("'\\n' }}{{", "'\\n' -}}{{")


@pytest.mark.parametrize("template", [CHATML, PARTED, MISTRAL])
@pytest.mark.parametrize("mark", ["\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd1x\ufdd2"])
def test_the_characters_of_marks_do_no_harm_in_content(mark: str, template: str) -> None:
    """They are kept as they are, or refused where they would be taken for marks."""
    chat = chat_format(template)
    kept = 0
    for example in (
        talk("ua", mark, "b"),
        talk("ua", f"x{mark}y", "b"),
        talk("ua", "a", f"{mark}z"),
        talk("ua", "</s>", mark),
    ):
        try:
            rendered = chat.render(example, "a:9")
        except BadDataError as error:
            assert "a:9: " in str(error) and ("noncharacter U+FDD" in str(error) or "told apart" in str(error))
        else:
            kept += 1
            assert rendered.text == theirs(template, example)[0]
            assert trained(rendered)[0].strip().startswith(example.messages[1]["content"])
    assert kept >= 2 or template == MISTRAL
