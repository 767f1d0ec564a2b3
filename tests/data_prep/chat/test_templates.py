"""Chat templates: one render gives the text of transformers and exactly what the assistant says."""

import json
import random
from dataclasses import asdict
from typing import Any

import jinja2
import pytest
from chat_templates import (
    CHATML,
    CONTROL,
    FORMATS,
    GAP,
    LLAMA3,
    MISTRAL,
    NOW,
    OWN,
    PLAIN,
    SPECIAL,
    STOP,
    TRIMS,
    chat_format,
    control_strings,
    literals,
    talk,
    theirs,
    trained,
    trl_cases,
    trl_templates,
)
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from data_prep.chat import marks as marks
from data_prep.chat.format import ChatFormat
from data_prep.chat.proof import plan_from_json
from data_prep.chat.sandbox import limits
from data_prep.config import ChatConfig
from data_prep.errors import BadDataError, DataConfigError
from data_prep.shapes.examples import ChatExample


def conversations(number: int = 24, systems: bool = True) -> list[ChatExample]:
    chooser = random.Random(5)
    awkward = [
        "a",
        "C",
        "C",
        "0",
        "  blanks around \n",
        "two\n\nlines\n",
        "é漢\U0001f600",
        "{{ 7 * 7 }}",
        "User: 'x'",
        "<p>",
    ]
    chats = []
    for index in range(number):
        roles = ("s" if systems and index % 3 == 0 else "") + "ua" * (1 + index % 4)
        chats.append(talk(roles, *(chooser.choice(awkward) + chooser.choice(["", " river", "\nstone"]) for _ in roles)))
    return chats


@pytest.mark.parametrize("name", OWN)
def test_text_is_transformers_own_and_targets_are_the_answers(name: str) -> None:
    chat = FORMATS[name]
    for example in conversations(systems=name != "mistral"):
        rendered = chat.render(example, "a.jsonl:1")
        assert rendered.text == theirs(OWN[name], example)[0]
        answers = [turn["content"] for turn in example.messages if turn["role"] == "assistant"]
        answers = [answer.strip() if name in TRIMS else answer for answer in answers]
        assert trained(rendered) == [GAP.get(name, "") + answer + STOP[name] for answer in answers]
        assert rendered[2:] == (len(answers), len(answers), [], {})


@pytest.mark.parametrize("name", OWN)
def test_the_text_before_an_answer_is_what_inference_sends(name: str) -> None:
    chat = FORMATS[name]
    for example in conversations(systems=False):
        rendered = chat.render(example, "a.jsonl:1")
        for number, (start, _) in enumerate(rendered.spans):
            prompt = chat.prompt_text(example.messages[: 2 * number + 1], True, "a.jsonl:1")
            assert rendered.text[:start] == prompt


def two_renders(template: str, example: ChatExample) -> list[tuple[int, int]]:
    """The spans that prefixes of the conversation show, each rendered for itself by transformers."""
    spans = []
    for index, turn in enumerate(example.messages):
        if turn["role"] == "assistant":
            before = render_jinja_template([example.messages[:index]], chat_template=template, add_generation_prompt=True,
                                           bos_token="<s>", eos_token="</s>")[0][0]  # fmt: skip
            after = theirs(template, ChatExample(example.messages[: index + 1]))[0]
            spans.append((len(before), len(after.rstrip())))
    return spans


WORDS = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "assistant", "user\n", "</s>", "<s>", "[INST] ", " [/INST]", "User: ", "\n", " ", "a", "é", "Assistant:"]
)  # fmt: skip


@examples(60)
@given(st.sampled_from(sorted(OWN)), st.lists(st.lists(WORDS, max_size=5).map("".join), min_size=1, max_size=8))
def test_spans_are_those_of_prefix_renders_whatever_the_contents(name: str, contents: list[str]) -> None:
    contents = contents if len(contents) % 2 == 0 else [*contents[:-1], "x", "y"]
    example = talk("ua" * (len(contents) // 2), *contents)
    rendered = FORMATS[name].render(example, "a:1")
    assert rendered.text == theirs(OWN[name], example)[0]
    assert rendered.spans == two_renders(OWN[name], example)
    assert rendered.num_stops == len(contents) // 2
    shown = "".join(dict.fromkeys(literals(rendered)))
    assert all(found in CONTROL for found in literals(rendered))
    assert shown or not any(text in content.strip() for content in contents for text in CONTROL)


@pytest.mark.skipif(not trl_templates(), reason="needs TRL's chat templates")
@pytest.mark.parametrize("path", trl_cases())
def test_the_templates_of_real_models(path: Any) -> None:
    """Text, and the masks of templates with generation blocks, as transformers has them; answers trained in others."""
    template = path.read_text(encoding="utf-8")
    chat = chat_format(template, control_strings(template))
    marked = "{% generation" in template or "{%- generation" in template
    num_rendered = 0
    with limits():
        for example in conversations(12):
            if "text" not in chat.plan.contents:
                parts = ChatExample(
                    [dict(m, content=[{"type": "text", "text": m["content"]}]) for m in example.messages]
                )
                text, spans = theirs(template, parts, masks=marked)
            else:
                try:
                    text, spans = theirs(template, example, masks=marked)
                except jinja2.TemplateError:
                    continue  # a template without system turns
            rendered = chat.render(example, "a.jsonl:1")
            num_rendered += 1
            assert rendered.text == text
            answers = [turn["content"] for turn in example.messages if turn["role"] == "assistant"]
            assert rendered.num_answers == len(answers)
            if marked:
                covered = {place for start, stop in spans for place in range(start, stop)}
                assert {place for start, stop in rendered.spans for place in range(start, stop)} == covered
                continue
            assert rendered.num_stops == (0 if path.stem == "glm4moe" else len(answers))
            for answer, said in zip(answers, trained(rendered), strict=True):
                assert answer.strip() in said
    assert num_rendered >= 8


def test_a_history_that_loses_its_reasoning_is_trained_as_it_is_shown() -> None:
    path = {path.stem: path for path in trl_templates()}.get("qwen3")
    if path is None:
        pytest.skip("needs TRL's chat templates")
    template = path.read_text(encoding="utf-8")
    chat = chat_format(template, control_strings(template))
    example = talk("uaua", "q", "<think>\nearly\n</think>\n\none", "q", "<think>\nlate\n</think>\n\ntwo")
    rendered = chat.render(example, "a:1")
    assert trained(rendered) == ["one<|im_end|>", "<think>\nlate\n</think>\n\ntwo<|im_end|>"]
    keyed = ChatExample([dict(m) for m in talk("ua", "q", "two").messages])
    keyed.messages[1]["reasoning"] = "late"  # any of the names for it, as transformers takes them
    assert chat.render(keyed, "a:1").text == theirs(template, keyed)[0]
    assert trained(chat.render(keyed, "a:1")) == ["<think>\nlate\n</think>\n\ntwo<|im_end|>"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, ["b<|im_end|>", "d<|im_end|>"]),
        ({"train_turns": "last"}, ["d<|im_end|>"]),
        ({"train_roles": ("user", "assistant")}, [f"{letter}<|im_end|>" for letter in "abcde"]),
        ({"train_roles": ("user",), "train_turns": "last"}, ["e<|im_end|>"]),
        ({"train_roles": ("system",)}, []),
    ],
)
def test_settings_choose_the_turns(settings: dict[str, Any], said: list[str]) -> None:
    rendered = chat_format(CHATML, **settings).render(talk("uauau", *"abcde"), "a:1")
    assert trained(rendered) == said
    assert (rendered.num_answers, rendered.num_stops) == (len(said), len(said))


def test_a_record_chooses_turns_over_the_settings() -> None:
    chat = chat_format(CHATML)
    example = ChatExample(talk("uauau", *"abcde").messages, trained=(True, False, None, None))
    assert trained(chat.render(example, "a:1")) == ["a<|im_end|>", "d<|im_end|>"]
    nothing = chat.render(ChatExample(example.messages, trained=(False,) * 5), "a:1")
    assert nothing.spans == [] and nothing.num_answers == 0


def test_blocks_of_the_template_are_chosen_by_turn_too() -> None:
    example = talk("uaua", *"abcd")
    assert trained(chat_format(MISTRAL, train_turns="last").render(example, "a:1")) == [" d</s>"]
    with_user = chat_format(MISTRAL, train_roles=("user", "assistant"))
    with pytest.raises(
        BadDataError, match=r"a:1: no generation block of the chat template writes messages\[0\] \(user\)"
    ):
        with_user.render(example, "a:1")


def test_training_on_the_prompt_trains_everything() -> None:
    rendered = chat_format(CHATML, train_on_prompt=True).render(talk("ua", "a", "b"), "a:1")
    assert rendered.spans == [(0, len(rendered.text))]
    assert (rendered.num_answers, rendered.num_stops) == (1, 1)


def test_one_turn_may_stand_in_a_conversation_many_times() -> None:
    """As the same object, and behind a system turn that the template's loop leaves out."""
    system, user, answer = talk("sua", "be", "more", "no").messages
    rendered = FORMATS["llama2"].render(ChatExample([system, user, answer, user, answer, user, answer]), "a:1")
    assert trained(rendered) == [" no </s>"] * 3
    assert [rendered.text[:start].count("[INST]") for start, _ in rendered.spans] == [1, 2, 3]


def test_answers_without_a_stop_token_are_counted() -> None:
    template = CHATML.replace("'<|im_end|>' + '\\n'", "('<|im_end|>' if message.role == 'user' else '.') + '\\n'")
    rendered = chat_format(template).render(talk("uaua", *"abcd"), "a:1")
    assert (rendered.num_answers, rendered.num_stops) == (2, 0)
    assert trained(rendered) == ["b.\n", "d.\n"]
    added = chat_format(CHATML, control=("</s>",), added=("<|im_end|>", "<|unused|>")).render(
        talk("ua", "a", "b"), "a:1"
    )
    assert added.num_stops == 1


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content if loop.last else 'forgotten ' }}{{ eos_token }}{% endfor %}", "no conversation"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}bot: {% endif %}",
         "generation prompt is not"),
        ("{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.role + m.content %}{% endfor %}{{ ns.t }}",
         "no turn of the assistant"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "more than the answers"),
        ("{{ messages | length }}", "no conversation"),
    ],
)  # fmt: skip
def test_a_template_without_proof_is_refused_in_one_line(template: str, reason: str) -> None:
    with pytest.raises(DataConfigError, match=reason) as caught:
        chat_format(template)
    assert str(caught.value).startswith("chat template: what it trains cannot be known: ")
    assert "data.chat.template" in str(caught.value) and "\n" not in str(caught.value)
    whole = chat_format(template, train_on_prompt=True).render(talk("ua", "a", "b"), "a:1")
    assert whole.spans == [(0, len(whole.text))] and whole.num_stops == 0


def test_a_turn_unlike_the_proven_ones_is_refused() -> None:
    special = CHATML.replace("{{- '<|im_start|>'", "{{- ('<|im_start|>' if message.content != 'odd' else '!')")
    chat = chat_format(special)
    with pytest.raises(
        BadDataError, match=r"a:3: the chat template does not write messages\[1\] \(assistant\) as it writes"
    ):
        chat.render(talk("ua", "a", "odd"), "a:3")


def test_every_256th_record_is_rendered_with_and_without_its_answers() -> None:
    """The prompt of this template shows more of the header than the conversation does, but only after "odd"."""
    odd = CHATML + "{% if add_generation_prompt and messages[-1].content == 'odd' %}{{ 'even' }}{% endif %}"
    chat = chat_format(odd)
    with limits():
        for number in range(1, 256):
            chat.render(talk("ua", "odd", "even so"), f"a:{number}")
        with pytest.raises(BadDataError, match=r"a:256: .* cannot be known: messages\[1\]: the prompt has"):
            chat.render(talk("ua", "odd", "even so"), "a:256")


def test_the_plain_template_is_the_documented_one() -> None:
    chat = chat_format(PLAIN)
    turns = talk("suau", "Be kind.", "Hi", "Hello", "?").messages
    assert chat.prompt_text(turns, True, "a:1") == "Be kind.\n\nUser: Hi\nAssistant: Hello</s>\nUser: ?\nAssistant:"
    with pytest.raises(BadDataError, match="roles are system, user and assistant, not tool"):
        chat.render(talk("ut", "x", "y"), "a:1")


def test_a_plan_saves_the_proof() -> None:
    first = chat_format(LLAMA3)
    again = ChatFormat(
        LLAMA3, SPECIAL, CONTROL, NOW, ChatConfig(), plan_from_json(json.loads(json.dumps(asdict(first.plan))))
    )
    example = conversations(1)[0]
    assert again.render(example, "a:1") == first.render(example, "a:1")


def test_long_conversations_stay_linear() -> None:
    """Also where a record is rendered again for the check: only some of its turns are."""
    chat = chat_format(CHATML)
    example = talk("ua" * 2000, *(["a", "b"] * 2000))
    with limits():
        for number in range(256):
            chat.render(example if number == 255 else talk("ua", "a", "b"), "a:1")
        assert chat.render(example, "a:1").num_answers == 2000


_MARKS = (marks.TURN, marks.START, marks.STOP)


@examples(300)
@given(
    st.lists(st.sampled_from([*_MARKS, "a", "é", "", f"b{_MARKS[1]}c", f"{_MARKS[2]}d", f"x{_MARKS[1]}y{_MARKS[2]}z"])),
    st.integers(0, 3),
)
def test_blocks_read_from_pieces_are_those_of_the_text(pieces: list[str], num_messages: int) -> None:
    messages = [{"role": "user", "content": str(number)} for number in range(num_messages)]
    noted = [*messages, None, *messages, *messages][: pieces.count(marks.TURN)]
    parts = marks.split_at_turns(pieces)
    blocks = marks.find_blocks(parts, noted, messages)
    expected = None if blocks is None else (marks.without_marks(parts), blocks)
    assert marks.read_blocks(pieces, noted, messages) == expected
