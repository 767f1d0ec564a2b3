"""Chat templates: ids equal transformers' own, and exactly what the assistant says is trained."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import byte_level_folder, sentencepiece_folder, sentences
from transformers import AutoTokenizer

from data_prep.encode import encode_causal_lm
from data_prep.errors import BadDataError, DataConfigError, RefusedError
from data_prep.records import Message, Record
from data_prep.templates import ChatFormat, mark_spans, plain_template
from data_prep.tokenizer import Tokenizer, open_tokenizer

NOW = datetime(2026, 3, 4, 5, 6)

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user and assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{- ' ' + message['content'] + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""


def chatml(folder: Path) -> Tokenizer:
    extra = ("<|im_start|>", "<|im_end|>")
    return open_tokenizer(str(byte_level_folder(folder, CHATML, extra=extra)))


def llama3(folder: Path) -> Tokenizer:
    extra = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return open_tokenizer(str(byte_level_folder(folder, LLAMA3, add_bos=True, extra=extra)))


def mistral(folder: Path) -> Tokenizer:
    folder = sentencepiece_folder(folder)
    (folder / "chat_template.jinja").write_text(MISTRAL)
    return open_tokenizer(str(folder))


def mistral_unigram(folder: Path) -> Tokenizer:
    folder = sentencepiece_folder(folder, "unigram")
    (folder / "chat_template.jinja").write_text(MISTRAL)
    return open_tokenizer(str(folder))


def plain_byte_level(folder: Path) -> Tokenizer:
    return open_tokenizer(str(byte_level_folder(folder)))


def plain_with_bos(folder: Path) -> Tokenizer:
    return open_tokenizer(str(sentencepiece_folder(folder)))


END_OF_TURN = {chatml: "<|im_end|>", llama3: "<|eot_id|>", mistral: "</s>", mistral_unigram: "</s>",
               plain_byte_level: "<|end|>", plain_with_bos: "</s>"}  # fmt: skip
MAKERS = list(END_OF_TURN)


def chat_of(tokenizer: Tokenizer) -> tuple[ChatFormat, str]:
    template = tokenizer.chat_template or plain_template(tokenizer)
    return ChatFormat(template, tokenizer, NOW), template


def conversations(systems: bool) -> list[list[dict[str, str]]]:
    texts = sentences(60, seed=4, longest_words=12)
    awkward = ["a", "  leading blanks", "two\n\nlines\n", "C", "0", "é漢\U0001f600", "User: 'quoted' {{ 7 * 7 }}"]
    texts = [text for pair in zip(texts, awkward * 9, strict=False) for text in pair]
    chats = []
    for number in range(20):
        turns = [
            {"role": "user" if turn % 2 == 0 else "assistant", "content": texts[(number * 6 + turn) % len(texts)]}
            for turn in range(2 + 2 * (number % 3))
        ]
        if systems and number % 2:
            turns.insert(0, {"role": "system", "content": texts[number]})
        chats.append(turns)
    return chats


@pytest.mark.parametrize("make", MAKERS)
def test_ids_equal_transformers_and_targets_are_the_answers(tmp_path: Path, make: Any) -> None:
    tokenizer = make(tmp_path / "own")
    chat, template = chat_of(tokenizer)
    tokenizer.save(tmp_path / "saved", template)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    chats = conversations(systems="mistral" not in make.__name__)
    records = [Record({"messages": turns}, f"a.jsonl:{line}", line) for line, turns in enumerate(chats, 1)]
    documents = encode_causal_lm(records, tokenizer, chat)
    for turns, document in zip(chats, documents, strict=True):
        assert document.input_ids == theirs.apply_chat_template(turns, tokenize=True, return_dict=False)
        trained = [index for index, mark in zip(document.input_ids, document.targets, strict=True) if mark]
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        answers = [answer.strip() if make is llama3 else answer for answer in answers]
        gap = "" if make in (chatml, llama3) else " "
        assert theirs.decode(trained) == "".join(gap + answer + END_OF_TURN[make] for answer in answers)


@pytest.mark.parametrize("make", MAKERS)
def test_the_context_of_every_answer_is_what_inference_sends(tmp_path: Path, make: Any) -> None:
    """The untrained tokens before an answer are the ids of the conversation so far with the generation prompt."""
    tokenizer = make(tmp_path / "own")
    chat, template = chat_of(tokenizer)
    tokenizer.save(tmp_path / "saved", template)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for turns in conversations(systems=False):
        document = encode_causal_lm([Record({"messages": turns}, "a.jsonl:1", 1)], tokenizer, chat)[0]
        begins = [place for place, mark in enumerate(document.targets) if mark and not document.targets[place - 1]]
        assert len(begins) == len(turns) // 2
        for answer, begin in enumerate(begins):
            prompt = theirs.apply_chat_template(
                turns[: 2 * answer + 1], tokenize=True, add_generation_prompt=True, return_dict=False
            )
            assert document.input_ids[:begin] == prompt


def test_the_plain_template_is_the_documented_one(tmp_path: Path) -> None:
    chat, _ = chat_of(plain_with_bos(tmp_path))
    turns = [Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "?")]
    assert chat.render(turns, True, "a:1") == "<s>Be kind.\n\nUser: Hi\nAssistant: Hello</s>\nUser: ?\nAssistant:"
    with pytest.raises(BadDataError, match="roles are system, user and assistant, not tool"):
        chat.render([Message("tool", "x")], False, "a:1")


@pytest.mark.parametrize("make", MAKERS)
def test_content_with_control_tokens_is_refused(tmp_path: Path, make: Any) -> None:
    tokenizer = make(tmp_path)
    chat, _ = chat_of(tokenizer)
    for role in ("user", "assistant"):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        next(turn for turn in turns if turn["role"] == role)["content"] = f"x{END_OF_TURN[make]}y"
        with pytest.raises(BadDataError, match=r"a\.jsonl:3: messages\[[01]\] holds the control token") as caught:
            encode_causal_lm([Record({"messages": turns}, "a.jsonl:3", 3)], tokenizer, chat)
        assert repr(END_OF_TURN[make]) in str(caught.value)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content if loop.last else 'forgotten ' }}{{ eos_token }}{% endfor %}"
    chat = ChatFormat(template, chatml(tmp_path), NOW)
    with pytest.raises(BadDataError, match=r"a\.jsonl:1: the chat template writes earlier turns differently"):
        chat.render_with_spans(
            [Message(role, role) for role in ("user", "assistant", "user", "assistant")], "a.jsonl:1"
        )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for i in range(1000000000) %}{% endfor %}", "too big"),
        ("{{ messages[0].content + 3 }}", "chat template refuses"),
    ],
)
def test_hostile_templates_do_nothing(tmp_path: Path, template: str, words: str) -> None:
    chat = ChatFormat(template, chatml(tmp_path), NOW)
    with pytest.raises((BadDataError, RefusedError), match=words) as caught:
        chat.render([Message("user", "a")], False, "a.jsonl:1")
    assert caught.value.exit_code == (77 if words == "unsafe" else 65)


def test_an_invalid_template_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(DataConfigError, match="chat template: line 2"):
        ChatFormat("a\n{% for %}", chatml(tmp_path), NOW)


def test_helpers_work_as_in_transformers(tmp_path: Path) -> None:
    tokenizer = chatml(tmp_path)
    template = (
        "{{ strftime_now('%d %b %Y') }}|{{ messages | tojson }}|{% set ns = namespace(n=1) %}{% set ns.n = 2 %}"
        "{{ ns.n }}|{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}"
    )
    rendered = ChatFormat(template, tokenizer, NOW).render([Message("user", "<é'>"), Message("a", "b")], False, "a:1")
    turns = [{"role": "user", "content": "<é'>"}, {"role": "a", "content": "b"}]
    tokenizer.save(tmp_path / "saved", template)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved").apply_chat_template(turns, tokenize=False)
    assert rendered.startswith("04 Mar 2026|")
    assert rendered.partition("|")[2] == theirs.partition("|")[2]


def test_marks_go_to_tokens_that_hold_a_character_of_a_span() -> None:
    offsets = [(0, 0), (0, 4), (4, 9), (9, 10), (10, 12), (12, 12), (12, 20)]
    assert mark_spans(offsets, [(4, 9), (10, 12)]) == [False, False, True, False, True, False, False]
    assert mark_spans(offsets, [(6, 11)]) == [False, False, True, True, True, False, False]
    assert mark_spans(offsets, []) == [False] * 7


def test_a_header_that_ends_with_a_blank_does_not_swallow_the_answer(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = plain_byte_level(tmp_path)
    chat = ChatFormat(template, tokenizer, NOW)
    turns = [{"role": "user", "content": "old"}, {"role": "assistant", "content": "river"}]
    document = encode_causal_lm([Record({"messages": turns}, "a.jsonl:1", 1)], tokenizer, chat)[0]
    trained = [index for index, mark in zip(document.input_ids, document.targets, strict=True) if mark]
    assert tokenizer.decode(trained) == " river<|end|>"


def test_blanks_at_the_end_of_an_answer_are_trained_though_the_tokenizer_trims_its_offsets(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = plain_byte_level(tmp_path)
    chat = ChatFormat(template, tokenizer, NOW)
    turns = [{"role": "user", "content": "old"}, {"role": "assistant", "content": "river  "}]
    document = encode_causal_lm([Record({"messages": turns}, "a.jsonl:1", 1)], tokenizer, chat)[0]
    trained = [index for index, mark in zip(document.input_ids, document.targets, strict=True) if mark]
    assert tokenizer.decode(trained) == "river  "
