"""Conversations: turns of OpenAI's and of ShareGPT's form become messages for a chat template.

What comes out is always the same, whatever came in: `role` is one of system, developer, user, assistant and
tool; `content` is text (empty where a turn only calls tools, since templates write None as a word);
`reasoning_content` is what was thought before it; `tool_calls` is a list of
``{"type": "function", "function": {"name", "arguments": {...}}}``. Any other field of an OpenAI turn is left to
the template, nulls left out.
"""

from collections.abc import Mapping
from typing import Any

from data_prep.errors import BadDataError
from data_prep.shapes.examples import ChatExample, Message
from data_prep.shapes.fields import checked_json, is_sound, lookup, required_field, shown
from data_prep.sources.records import Record, checked_text, kind
from data_prep.sources.strict_json import parse_value

#: What may stand as the role of a turn (`role` or `from`), and what it means.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",  # its text is the call, as JSON
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
_PLAIN_ROLES = {given: role for given, role in ROLES.items() if given != "function_call"}
_WITH_WORDS = frozenset({"user", "assistant"})  # a turn of theirs says something
_TRAIN_FIELDS = ("loss_weight", "weight", "train")
#: Fields of a turn that are understood; describe() names the others that were seen.
TURN_FIELDS = frozenset(
    {"role", "content", "from", "value", "name", "tool_call_id", "tool_calls", "function_call", "reasoning_content"}
).union(_TRAIN_FIELDS)
_PART_ORDER = {"reasoning": 0, "thinking": 0, "text": 1, "tool_call": 2}


def chat_from_messages(record: Record, fields: Mapping[str, str]) -> ChatExample:
    """A conversation of ``role``/``content`` turns. Raises BadDataError naming the place in the record."""
    return _chat(record, fields, fields["messages"], "role", "content")


def chat_from_sharegpt(record: Record, fields: Mapping[str, str]) -> ChatExample:
    """A conversation of ``from``/``value`` turns. Raises BadDataError naming the place in the record."""
    return _chat(record, fields, fields["conversations"], "from", "value")


def _chat(record: Record, fields: Mapping[str, str], name: str, role_field: str, content_field: str) -> ChatExample:
    value = record.value
    messages = _plain_messages(value.get(name), role_field, content_field, record.sound)
    trained = None
    if messages is None:
        messages, trained = _careful_messages(record, name, role_field, content_field)
    if _get(value, fields, "system") is None and _get(value, fields, "tools") is None:
        return ChatExample(messages, None, trained)
    return _with_surroundings(record, fields, messages, trained)


def _get(value: Mapping[str, Any], fields: Mapping[str, str], ours: str) -> Any:
    name = fields.get(ours)
    return None if name is None else lookup(value, name)


def _plain_messages(turns: Any, role_field: str, content_field: str, sound: bool = False) -> list[Message] | None:
    """The messages of turns about which nothing needs a second look, as in most conversations; else None."""
    if type(turns) is not list:
        return None
    messages: list[Message] = []
    for turn in turns:
        if type(turn) is not dict or len(turn) != 2:
            return None
        try:
            role, content = _PLAIN_ROLES[turn[role_field]], turn[content_field]
        except (KeyError, TypeError):
            return None
        if type(content) is not str or not (sound or content.isascii() or is_sound(content)):
            return None
        if (not content or content.isspace()) and role in _WITH_WORDS:
            return None
        messages.append({"role": role, "content": content})
    return messages or None


def _careful_messages(
    record: Record, name: str, role_field: str, content_field: str
) -> tuple[list[Message], tuple[bool | None, ...] | None]:
    """The messages of any turns, and what the turns themselves say about training."""
    turns = required_field(record.value, name, record.where)
    name = shown(name)
    if not isinstance(turns, list) or not turns:
        state = "an empty list" if isinstance(turns, list) else kind(turns)
        raise BadDataError(f"{record.where}: field {name!r} must be a list of turns, not {state}")
    found = [
        _message(turn, f"{name}[{index}]", record.where, role_field, content_field) for index, turn in enumerate(turns)
    ]
    marks = tuple(mark for _, mark in found)
    return [message for message, _ in found], marks if any(mark is not None for mark in marks) else None


def _with_surroundings(
    record: Record, fields: Mapping[str, str], messages: list[Message], trained: tuple[bool | None, ...] | None
) -> ChatExample:
    """The conversation with the record's own system prompt before it and its tools."""
    system = _get(record.value, fields, "system")
    if system is not None and system != "":
        text = checked_text(system, f"field {shown(fields['system'])!r}", record.where)
        if messages[0]["role"] == "system":
            raise BadDataError(
                f"{record.where}: field {shown(fields['system'])!r} and the first turn are both a system prompt"
            )
        messages = [{"role": "system", "content": text}, *messages]
        trained = None if trained is None else (None, *trained)
    tools = _get(record.value, fields, "tools")
    found = None if tools is None else _tools(tools, shown(fields["tools"]), record.where)
    return ChatExample(messages, found, trained)


def _message(turn: Any, what: str, where: str, role_field: str, content_field: str) -> tuple[Message, bool | None]:
    """One turn as a message, and whether the record itself says that it is (not) trained."""
    if not isinstance(turn, dict):
        raise BadDataError(f"{where}: {what} must be an object, not {kind(turn)}")
    if role_field not in turn:
        raise BadDataError(f"{where}: {what} lacks {role_field!r}")
    given = checked_text(turn[role_field], f"{what}.{role_field}", where)
    role = ROLES.get(given)
    if role is None:
        raise BadDataError(f"{where}: {what}.{role_field} is {shown(given)!r}; known are {', '.join(ROLES)}")
    own_fields = (role_field, content_field)
    rest = {name: value for name, value in turn.items() if value is not None and name not in own_fields}
    mark = _train_mark(rest, what, where) if rest else None
    if rest:
        checked_json(rest, what, where)
    reasoning, text, calls = _content(turn, rest, f"{what}.{content_field}", where, content_field)
    if given == "function_call":
        calls, text = _calls(text, f"{what}.{content_field}", where), ""
    if rest:
        for name in ("tool_calls", "function_call"):
            calls = [*calls, *_calls(rest.pop(name, []), f"{what}.{name}", where)]
        reasoning = _rest_texts(rest, what, where) or reasoning
    if (calls or reasoning) and role != "assistant":
        raise BadDataError(f"{where}: {what}: {'tool calls' if calls else 'reasoning'} in a turn of {given!r}")
    if not calls and role in _WITH_WORDS and (not text or text.isspace()):
        raise BadDataError(
            f"{where}: {what}.{content_field} is empty: a turn of {given!r} must say something", "empty_turn"
        )
    message: Message = {"role": role, "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return {**message, **rest}, mark


def _content(
    turn: dict[str, Any], rest: dict[str, Any], what: str, where: str, content_field: str
) -> tuple[str, str, list[Any]]:
    """Reasoning, text and tool calls that stand in a turn's content. OpenAI leaves it null beside tool calls."""
    content = turn.get(content_field)
    if isinstance(content, list):
        return _parts(content, what, where)
    if content is None and ("tool_calls" in rest or "function_call" in rest):
        return "", "", []
    if content_field not in turn:
        raise BadDataError(f"{where}: {what} is missing")
    return "", checked_text(content, what, where), []


def _train_mark(rest: dict[str, Any], what: str, where: str) -> bool | None:
    """Takes the turn's own training mark out of `rest`: loss_weight or weight (0 or 1), or train."""
    marks = {}
    for name in _TRAIN_FIELDS:
        if name in rest:
            value = rest.pop(name)
            if name == "train" and not isinstance(value, bool):
                raise BadDataError(f"{where}: {what}.train must be true or false")
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise BadDataError(f"{where}: {what}.{name} must be 0 or 1: fractions are not supported")
            marks[name] = bool(value)
    if len(set(marks.values())) > 1:
        raise BadDataError(f"{where}: {what}: {' and '.join(marks)} contradict each other")
    return next(iter(marks.values()), None)


def _rest_texts(rest: dict[str, Any], what: str, where: str) -> str:
    """Checks the remaining fields of a turn; takes `reasoning_content` out of them."""
    for name in ("role", "content"):
        if name in rest:
            raise BadDataError(f"{where}: {what} has {name!r} beside the field that stands for it")
    for name in ("name", "tool_call_id", "reasoning_content"):
        if name in rest:
            checked_text(rest[name], f"{what}.{name}", where)
    return rest.pop("reasoning_content", "")  # type: ignore[no-any-return]


def _parts(content: list[Any], what: str, where: str) -> tuple[str, str, list[Any]]:
    """Reasoning, text and tool calls of a content that is a list of typed parts.

    They must come in this order, since that is how templates write them.
    """
    texts: tuple[list[str], list[str]] = ([], [])
    calls: list[Any] = []
    last = 0
    for index, part in enumerate(content):
        place = f"{what}[{index}]"
        if not isinstance(part, dict):
            raise BadDataError(f"{where}: {place} must be an object, not {kind(part)}")
        type_name = checked_text(part.get("type"), f"{place}.type", where)
        order = _PART_ORDER.get(type_name)
        if order is None:
            raise BadDataError(f"{where}: {place}.type is {shown(type_name)!r}; known are {', '.join(_PART_ORDER)}")
        if order < last:
            raise BadDataError(
                f"{where}: {place}: {type_name} after text or tool calls; templates write it before them"
            )
        last = order
        names = [name for name in ("text", "value", type_name) if part.get(name) is not None]
        if not names:
            raise BadDataError(f"{where}: {place} lacks 'text' or 'value'")
        inner, place = part[names[0]], f"{place}.{names[0]}"
        if order == _PART_ORDER["tool_call"]:
            calls += _calls(checked_json(inner, place, where), place, where)
        else:
            texts[order].append(checked_text(inner, place, where))
    return "".join(texts[0]), "".join(texts[1]), calls


def _calls(value: Any, what: str, where: str) -> list[Any]:
    """One tool call or a list of them, or JSON text of either, in OpenAI's form.

    A call is ``{"name", "arguments"}`` or ``{"type": "function", "function": {"name", "arguments"}}``.
    """
    if isinstance(value, str):
        value = parse_value(checked_text(value, what, where), f"{where}: {what}")
    if not isinstance(value, list):
        return [_call(value, what, where)]
    return [_call(call, f"{what}[{index}]", where) for index, call in enumerate(value)]


def _call(call: Any, what: str, where: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise BadDataError(f"{where}: {what} must be an object with a function's name, not {kind(call)}")
    if call.get("type") not in (None, "function"):
        raise BadDataError(f"{where}: {what}.type must be 'function'")
    wrapped = call.get("function") is not None
    function = call["function"] if wrapped else call
    inside = f"{what}.function" if wrapped else what
    if not isinstance(function, dict):
        raise BadDataError(f"{where}: {inside} must be an object, not {kind(function)}")
    name = checked_text(function.get("name"), f"{inside}.name", where)
    if not name:
        raise BadDataError(f"{where}: {inside}.name is empty")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_value(arguments, f"{where}: {inside}.arguments") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise BadDataError(f"{where}: {inside}.arguments must be an object, not {kind(arguments)}")
    # The rest of a call (OpenAI's id, a position) is kept: some templates read it.
    understood = ("type", "function") if wrapped else ("type", "name", "arguments")
    rest = {key: value for key, value in call.items() if value is not None and key not in understood}
    return {**rest, "type": "function", "function": {"name": name, "arguments": arguments}}


def _tools(value: Any, what: str, where: str) -> list[Any] | None:
    """The tools of a conversation, a list or JSON text of one; each in OpenAI's wrapping. None if there are none."""
    if isinstance(value, str):
        checked_text(value, what, where)
        value = parse_value(value, f"{where}: {what}") if value.strip() else []
    else:
        checked_json(value, what, where)
    if value is None:
        return None
    if not isinstance(value, list):
        raise BadDataError(f"{where}: {what} must be a list of tools, not {kind(value)}")
    tools = []
    for index, tool in enumerate(value):
        if not isinstance(tool, dict):
            raise BadDataError(f"{where}: {what}[{index}] must be an object, not {kind(tool)}")
        bare = "name" in tool and "function" not in tool and "type" not in tool
        tools.append({"type": "function", "function": tool} if bare else tool)
    return tools or None
