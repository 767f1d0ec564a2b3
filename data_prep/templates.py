"""Chat to tokens and targets: render with a Jinja template, tokenise once, mark what the assistant says.

The assistant's part of a rendered conversation is what its turn adds to the text that inference would
send: the conversation so far with the generation prompt. Both are rendered and must be prefixes of the
whole; a template for which they are not is refused, because its targets cannot be known.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from data_prep.errors import BadDataError, DataConfigError, RefusedError
from data_prep.records import Message
from data_prep.tokenizer import Tokenizer

#: Used, and saved with the tokenizer, when neither the tokenizer nor the run file brings a template.
#: Plain text that needs no new tokens; the end of an assistant's turn is the tokenizer's eos token.
PLAIN_TEMPLATE = """\
{%- if bos_first %}{{ bos_token }}{% endif %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}
{%- elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}
{%- else %}{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


class _Generation(jinja2.ext.Extension):
    """Accepts the ``{% generation %}`` block that some templates put around the assistant's words."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def plain_template(tokenizer: Tokenizer) -> str:
    """The built-in template as text that stands alone, for a tokenizer without one. It needs an eos token."""
    if tokenizer.eos_id is None:
        raise DataConfigError("the tokenizer has no end-of-sequence token to end a turn; give data.chat_template")
    bos_first = tokenizer.bos_id is not None and tokenizer.bos_id in tokenizer.prefix_ids
    return PLAIN_TEMPLATE.replace(
        "{%- if bos_first %}{{ bos_token }}{% endif %}\n", "{{- bos_token }}\n" if bos_first else ""
    )


class ChatFormat:
    """A compiled chat template together with the tokenizer that reads what it writes."""

    def __init__(self, source: str, tokenizer: Tokenizer, now: datetime):
        """Compile `source` in a sandbox. `now` is what the template's clock shows, so that all workers agree.

        Raises DataConfigError if it is not a valid template.
        """
        self.tokenizer = tokenizer
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        clock: Callable[[str], str] = now.strftime
        environment.globals.update(raise_exception=_raise_exception, strftime_now=clock)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataConfigError(f"chat template: line {getattr(error, 'lineno', '?')}: {error}") from error
        # What a template writes as a control token, a user must not: special tokens, and others it names.
        control = set(tokenizer.control_strings) | {text for text in tokenizer.added_strings if text in source}
        longest_first = sorted(control, key=lambda text: (-len(text), text))
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, where: str) -> str:
        """The text of a conversation.

        Raises, naming `where`: BadDataError if the template refuses it, RefusedError if it leaves the sandbox.
        """
        plain = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens,
            )
        except jinja2.exceptions.SecurityError as error:
            raise RefusedError(f"{where}: the chat template tries what its sandbox forbids: {error}") from error
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise BadDataError(f"{where}: the chat template refuses this conversation: {error}") from error

    def render_with_spans(self, messages: Sequence[Message], where: str) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and the character spans [start, stop) in it that the assistant says.

        A span ends after the end-of-turn token; line breaks that a template writes behind it are context.
        """
        for index, message in enumerate(messages):
            if found := self._control.search(message.content):
                raise BadDataError(f"{where}: messages[{index}] holds the control token {found.group()!r} as text")
        whole = self.render(messages, False, where)
        spans = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self.render(messages[:index], True, where)
            after = self.render(messages[: index + 1], False, where)
            if not (whole.startswith(after) and after.startswith(before)):
                raise BadDataError(
                    f"{where}: the chat template writes earlier turns differently once messages[{index}] is there,"
                    " so what the assistant says cannot be told apart; use another data.chat_template"
                )
            stop = len(after)
            trimmed = after.rstrip()
            if trimmed.endswith(self.tokenizer.control_strings or ("\0",)):
                stop = len(trimmed)
            spans.append((len(before), stop))
        return whole, spans


def mark_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens hold a character of one of the ascending `spans`; `offsets` ascend too.

    A token that begins before a span and reaches into it counts: where a template ends its header with a
    blank, the answer's first word is one token with that blank, and it must not go untrained.
    """
    marks = [False] * len(offsets)
    for start, stop in spans:
        first = bisect_right(offsets, start, key=lambda offset: offset[1])
        last = bisect_left(offsets, stop, key=lambda offset: offset[0])
        marks[first:last] = [True] * (last - first)
    return marks
