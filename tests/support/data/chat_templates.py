"""Chat templates that tests share: the usual families in few lines, and those that TRL ships, if it is there."""

import importlib.util
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from data_prep.chat.format import ChatFormat, Rendered
from data_prep.config import ChatConfig
from data_prep.prepare import PLAIN_TEMPLATE
from data_prep.shapes.examples import ChatExample

NOW = datetime.now()  # transformers' clock cannot be set
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

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
LLAMA2 = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{%- else %}
    {%- set loop_messages = messages %}{% set system_message = false %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user and assistant') }}
    {%- endif %}
    {%- if loop.index0 == 0 and system_message %}
        {%- set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {%- else %}
        {%- set content = message['content'] %}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
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
#: The whole text of a turn is put together in a variable before any of it is written.
COLLECTED = """\
{%- for message in messages %}
    {%- set content = '<|im_start|>' + message.role + '\\n' + message.content|trim + '<|im_end|>' %}
    {%- if loop.first %}{% set content = bos_token + content %}{% endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

_TOKEN = re.compile(r"<\|[^|>\n]{1,40}\|>|<[a-z_|]+\|?>|<｜[^｜]+｜>|<\|[a-z_]+>")


def trl_templates() -> list[Path]:
    """The chat templates that TRL ships; none if it is not installed."""
    found = importlib.util.find_spec("trl")
    places = found.submodule_search_locations if found else None
    return sorted(Path(places[0], "chat_templates").glob("*.jinja")) if places else []


#: TRL keeps several versions of these families; the others of a family differ from the one that always runs in words.
_OTHER_VERSIONS = re.compile(
    r"(diffusion_gemma|gemma4|gemma4_v[234]|lfm2_2_5(_v2)?|lfm2|nemotron_3_(5_lightning|super|ultra)"
    r"|qwen3_(5_think|5_nothink|6|instruct_2507))(_training)?"
)


def trl_cases() -> list[Any]:
    """All of them for `parametrize`; those that are much like another one are `long`."""
    return [
        pytest.param(path, id=path.stem, marks=[pytest.mark.long] if _OTHER_VERSIONS.fullmatch(path.stem) else [])
        for path in trl_templates()
    ]


def control_strings(template: str) -> list[str]:
    """What a tokenizer for `template` would have as special tokens, as far as its text shows it."""
    return sorted({*_TOKEN.findall(template), *CONTROL})


def chat_format(template: str, control: Any = None, added: Any = (), **settings: Any) -> ChatFormat:
    """A ChatFormat of `template` for a tokenizer with the special tokens above."""
    control = CONTROL if control is None else control
    return ChatFormat(template, SPECIAL, control, NOW, ChatConfig(**settings), added_strings=added)


def talk(roles: str, *contents: str) -> ChatExample:
    """A conversation: one letter of `roles` (s, u, a, t) and one content for each turn."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return ChatExample([{"role": names[r], "content": text} for r, text in zip(roles, contents, strict=True)])


PLAIN = PLAIN_TEMPLATE.replace("{%- if bos_first %}{{ bos_token }}{% endif %}\n", "")
OWN = {"chatml": CHATML, "llama3": LLAMA3, "llama2": LLAMA2, "mistral": MISTRAL, "collected": COLLECTED, "plain": PLAIN}
TRIMS = {"llama3", "llama2", "collected"}
FORMATS = {name: chat_format(template) for name, template in OWN.items()}
STOP = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "llama2": " </s>", "mistral": "</s>", "collected": "<|im_end|>",
        "plain": "</s>"}  # fmt: skip
GAP = {"llama2": " ", "mistral": " ", "plain": " "}


def trained(rendered: Rendered) -> list[str]:
    return [rendered.text[start:stop] for start, stop in rendered.spans]


def theirs(template: str, example: ChatExample, masks: bool = False) -> tuple[str, list[tuple[int, int]]]:
    texts, spans = render_jinja_template(
        [example.messages], tools=example.tools, chat_template=template, return_assistant_tokens_mask=masks,
        bos_token="<s>", eos_token="</s>",
    )  # fmt: skip
    return texts[0], spans[0] if masks else []


def literals(rendered: Rendered) -> list[str]:
    return [rendered.text[start:stop] for start, stop in rendered.literal_spans]
