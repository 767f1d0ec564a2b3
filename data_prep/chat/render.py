"""A compiled chat template: messages in, text out, every fault told in one line."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context

from data_prep.chat.marks import Generation, PlainGeneration, has_blocks, mark_turns, split_at_turns
from data_prep.chat.sandbox import (
    OUTPUT_LIMIT_CHARACTERS,
    OutOfTime,
    chat_environment,
    compile_tree,
    limits,
    parse_template,
)
from data_prep.errors import BadDataError, RefusedError


class ChatTemplate:
    """A template, compiled with marks (see marks.py) or as it stands.

    `blocks` says whether it has generation blocks. `noted` are the items behind the marks of the last render.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], now: datetime, marked: bool):
        """Compile `source`. Raises DataConfigError if it is not valid, RefusedError if it leaves the sandbox."""
        try:
            with limits():
                environment = chat_environment(now, [Generation if marked else PlainGeneration])
                tree = parse_template(environment, source)
                self.blocks = has_blocks(tree)
                self.noted: list[Any] = mark_turns(tree, environment) if marked else []
                self._template = compile_tree(environment, tree)
        except OutOfTime:
            raise RefusedError("chat template: compiling it takes too long") from None
        self._environment = environment
        self._variables = {**environment.globals, "documents": None, **special_tokens}
        self._context: Context | None = None

    def render(
        self, messages: Sequence[Any], tools: Sequence[Any] | None, add_generation_prompt: bool, where: str
    ) -> list[str]:
        """The text of a conversation, cut where a marked template has turn marks. Needs `limits` around it.

        Raises, naming `where`: BadDataError if the template refuses it, RefusedError if it leaves the sandbox.
        """
        return split_at_turns(self.pieces(messages, tools, add_generation_prompt, where))

    def pieces(
        self, messages: Sequence[Any], tools: Sequence[Any] | None, add_generation_prompt: bool, where: str
    ) -> list[str]:
        """As `render`, the text and its marks as the template writes them one after the other."""
        self.noted.clear()
        # Making a context takes as long as a short render; one that a render has left in order serves again.
        context, self._context = self._context, None
        if context is None:
            context = Context(self._environment, dict(self._variables), None, {})
        variables = context.parent
        variables["messages"] = messages
        variables["tools"] = tools
        variables["add_generation_prompt"] = add_generation_prompt
        context.vars.clear()
        context.exported_vars.clear()
        try:
            pieces = list(self._template.root_render_func(context))
        except SecurityError as error:
            raise RefusedError(f"{where}: the chat template tries what its sandbox forbids: {error}") from error
        except (OutOfTime, MemoryError, RecursionError) as error:
            raise RefusedError(f"{where}: the chat template takes {_TOO_MUCH[type(error)]}") from None
        except jinja2.TemplateError as error:
            raise BadDataError(f"{where}: the chat template refuses this conversation: {error}") from error
        except Exception as error:  # whatever an expression of the template can raise, it is this record's fault
            line = self._line_of(error.__traceback__)
            raise BadDataError(
                f"{where}: line {line} of the chat template fails on this conversation: {type(error).__name__}: {error}"
            ) from error
        self._context = context
        size = sum(map(len, pieces))
        if size > OUTPUT_LIMIT_CHARACTERS and size > 64 * sum(map(_num_characters, (*messages, tools))):
            raise RefusedError(f"{where}: the chat template writes {size} characters for this conversation")
        return pieces

    def _line_of(self, traceback: TracebackType | None) -> int | str:
        line: int | str = "?"
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename == "<template>":
                line = self._template.get_corresponding_lineno(traceback.tb_lineno)
            traceback = traceback.tb_next
        return line


_TOO_MUCH: dict[type[BaseException], str] = {
    OutOfTime: "too much time",
    MemoryError: "too much memory",
    RecursionError: "too many levels of recursion",
}


def _num_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_num_characters(key) + _num_characters(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(map(_num_characters, value))
    return 8
