"""What a chat template is given: the messages of a record in the form it takes, and no control tokens in them."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.chat.marks import BREAK
from data_prep.errors import BadDataError
from data_prep.shapes.examples import Message

#: Names that records have for the reasoning before an answer; transformers fills the first two from any of them.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_CHEAP_ROLES = frozenset({"system", "user", "assistant", "tool", "developer"})


@dataclass(frozen=True)
class Forms:
    """In which of the forms that records come in the template takes things.

    contents: "text", "parts" (a list of {"type": "text", "text": ...}); arguments of tool calls: "object",
    "text" (JSON as text); call_contents: what stands for no content beside tool calls, "empty" or "none".
    Without any form of arguments the template writes no tool calls. tools: it writes those that are declared.
    """

    contents: tuple[str, ...]
    arguments: tuple[str, ...]
    call_contents: tuple[str, ...]
    tools: bool


class ControlText:
    """Finds the strings of control tokens in texts, and breaks them up so that they stay text.

    `understood` are control strings that the template itself looks for in an answer, such as the ends of a
    reasoning block: in the assistant's words they keep their meaning. `forbidden` characters are found too,
    and refused when they come to be broken up.
    """

    def __init__(self, control: Iterable[str], understood: Iterable[str], forbidden: Iterable[str]):
        known = set(control) - {""}
        self._forbidden = re.compile("[" + "".join({BREAK, *forbidden}) + "]")
        self._anywhere = _Strings(known, forbidden)
        self._in_answer = _Strings(known - set(understood), forbidden)

    def found_in(self, text: str, role: str) -> bool:
        """True if a text of a turn of this role holds a control string."""
        strings = self._in_answer if role == "assistant" else self._anywhere
        for first in strings.first_characters:  # most texts hold none, and this is far faster than the pattern
            if first in text:
                return strings.pattern.search(text) is not None
        return False

    def broken(self, text: str, role: str) -> str:
        """The text with a mark behind the first character of every control string in it.

        Raises ValueError for a forbidden character.
        """
        if found := self._forbidden.search(text):
            raise ValueError(f"holds the noncharacter U+{ord(found.group()):04X}, which no text may hold")
        strings = self._in_answer if role == "assistant" else self._anywhere
        cuts = [match.start() + 1 for match in strings.overlapping.finditer(text)]
        pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return BREAK.join(pieces)

    def at(self, text: str, start: int) -> int | None:
        """The end of the longest control string that begins at `start`."""
        match = self._anywhere.pattern.match(text, start)
        return match.end() if match else None


class _Strings:
    """Patterns for a set of strings: one of them, and all of them also where they overlap."""

    def __init__(self, strings: set[str], forbidden: Iterable[str]):
        every = sorted({*strings, *forbidden}, key=lambda text: (-len(text), text))
        either = "|".join(map(re.escape, every)) or "(?!)"
        self.first_characters = tuple(sorted({text[0] for text in every}))
        self.pattern = re.compile(either)
        self.overlapping = re.compile(f"(?={either})")


def prepare_messages(
    messages: Sequence[Message], tools: Sequence[Any] | None, forms: Forms, control: ControlText, where: str
) -> tuple[Sequence[Message], Sequence[Any] | None, bool, bool]:
    """The messages and tools for the template; whether a control string was broken up; whether all are plain.

    A plain message has a role and a content, both text. Raises BadDataError for what cannot be rendered.
    """
    plain = tools is None and "text" in forms.contents
    broken = False
    for message in messages:
        content = message.get("content")
        role = message.get("role")
        if type(role) is not str:
            raise BadDataError(f"{where}: the role of a message must be text, not {type(role).__name__}")
        if type(content) is not str or len(message) != 2:
            plain = False
            break
        if control.found_in(content, role) or (role not in _CHEAP_ROLES and control.found_in(role, "user")):
            broken = True
    if plain and not broken:
        return messages, tools, False, True
    if not plain:
        messages = [_formed(m, forms, control, f"{where}: messages[{n}]") for n, m in enumerate(messages)]
        if tools is not None:
            if not forms.tools:
                raise BadDataError(f"{where}: the chat template does not write the tools that are declared")
            tools = [_checked(tool, f"{where}: tools") for tool in tools]
    declared = {"role": "system", "tools": tools}
    if not any(map(_holds(control), messages)) and not _holds(control)(declared):
        return messages, tools, False, plain
    try:
        messages = [_broken(message, control, str(message["role"])) for message in messages]
        tools = _broken(tools, control, "system")
    except ValueError as error:
        raise BadDataError(f"{where}: the conversation {error}") from None
    return messages, tools, True, plain


def _holds(control: ControlText) -> Callable[[Message], bool]:
    return lambda message: any(control.found_in(text, str(message["role"])) for text in _texts(message))


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _broken(value: Any, control: ControlText, role: str) -> Any:
    if isinstance(value, str):
        return control.broken(value, role)
    if isinstance(value, dict):
        return {_broken(key, control, role): _broken(item, control, role) for key, item in value.items()}
    if isinstance(value, list):
        return [_broken(item, control, role) for item in value]
    return value


def _formed(message: Message, forms: Forms, control: ControlText, what: str) -> Message:
    """A message with more than role and content, or with content that is not text, as the template takes it."""
    message = {key: _checked(value, f"{what}.{key}") for key, value in message.items()}
    reasoning = next((message[key] for key in _REASONING_KEYS if message.get(key) is not None), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = _formed_parts(content, forms, control, f"{what}.content")
    elif isinstance(content, str) and "text" not in forms.contents:
        message["content"] = [{"type": "text", "text": content}]
    if message.get("tool_calls"):
        if not forms.arguments:
            raise BadDataError(f"{what}: the chat template does not write tool calls")
        message["tool_calls"] = [_formed_call(call, forms) for call in message["tool_calls"]]
        if not content and len(forms.call_contents) == 1:
            message["content"] = "" if forms.call_contents == ("empty",) else None
    return message


def _formed_parts(parts: list[Any], forms: Forms, control: ControlText, what: str) -> Any:
    texts = [part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in parts]
    kinds = {part.get("type", "text") for part in parts if isinstance(part, dict)} - {"text"}
    if kinds or not all(isinstance(text, str) for text in texts):
        raise BadDataError(f"{what}: only parts of type text can be trained, not {', '.join(map(str, kinds)) or '?'}")
    joined = "".join(map(str, texts))
    if control.found_in(joined, "user") and not any(control.found_in(str(text), "user") for text in texts):
        raise BadDataError(f"{what}: the string of a control token is spread over several parts")
    return parts if "parts" in forms.contents else joined


def _formed_call(call: Any, forms: Forms) -> Any:
    """A tool call whose arguments are an object or JSON as text, whichever the template takes."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _formed_call(call["function"], forms)}
    arguments = call.get("arguments")
    if isinstance(arguments, str) and "text" not in forms.arguments and "object" in forms.arguments:
        try:
            value = json.loads(arguments)
        except ValueError:
            return call
        return {**call, "arguments": value} if isinstance(value, dict) else call
    if isinstance(arguments, dict) and "object" not in forms.arguments and "text" in forms.arguments:
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return call


def _checked(value: Any, what: str) -> Any:
    """A copy made of JSON's types only: a template must not reach the methods of anything else."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if type(value) is dict:
        return {str(key): _checked(item, what) for key, item in value.items()}
    if type(value) is list or type(value) is tuple:
        return [_checked(item, what) for item in value]
    raise BadDataError(f"{what}: a {type(value).__name__} cannot be written by a chat template")
