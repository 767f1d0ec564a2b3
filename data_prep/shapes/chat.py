"""Conversations: turns of every usual form become messages for a chat template.

What comes out is always the same, whatever came in: `role` is one of system, developer, user, assistant and
tool; `content` is text (empty where a turn only calls tools, since templates write None as a word);
`reasoning_content` is what was thought before it; `tool_calls` is a list of
``{"type": "function", "function": {"name", "arguments": {...}}}``. Any other field of an OpenAI turn is left to
the template, nulls left out. ms-swift's `tool_call` turns become calls of the assistant's turn before them, or of one
turn; a `function_call` turn is a turn of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_prep.errors import BadDataError
from data_prep.shapes.calls import read_calls, read_tools
from data_prep.shapes.examples import ChatExample, Message
from data_prep.shapes.fields import checked_json, is_sound, lookup, required_field, shown, shown_list
from data_prep.shapes.roles import ROLES, TurnForm, roles_to_map, unknown_roles
from data_prep.sources.records import Record, checked_text, kind

_PLAIN_ROLES: dict[str, str] = {given: role for given, role in ROLES.items() if role != "tool_call"}
_WITH_WORDS = frozenset({"user", "assistant"})  # a turn of theirs says something
#: Fields of a turn that are understood; describe() names the others that were seen.
TURN_FIELDS = frozenset(
    {"role", "content", "from", "value", "name", "tool_call_id", "tool_calls", "function_call", "reasoning_content"}
)
_PART_ORDER = {"reasoning": 0, "thinking": 0, "text": 1, "tool_call": 2}


class Marked(NamedTuple):
    """A message, what its turn or its record says about its training, and whether it continues the turn before it."""

    message: Message
    trained: bool | None
    joins: bool = False


def chat_from_turns(record: Record, fields: Mapping[str, str], name: str, form: TurnForm) -> ChatExample:
    """The conversation in field `name` of a record. Raises BadDataError naming the place in the record."""
    value = record.value
    messages, trained, whole = None, None, None
    if value.keys().isdisjoint(form.flags.heads):
        messages = plain_messages(value.get(name), form, record.sound)
    if messages is None:
        turns = read_turns(record, name, form)
        whole = form.flags.of_a_record(value, len(turns), record.where)
        messages, trained = _messages_and_marks(_with_flags(turns, whole), record.where)
    if _get(value, fields, "system") is None and _get(value, fields, "tools") is None:
        return ChatExample(messages, None, trained)
    return _with_surroundings(record, fields, messages, trained, whole is False)


def chat_from_two_lists(record: Record, fields: Mapping[str, str], form: TurnForm) -> ChatExample:
    """TRL's prompt and completion, both lists of turns: only turns of the completion are trained."""
    prompt = read_turns(record, fields["prompt"], form)
    answer = read_turns(record, fields["response"], form)
    whole = form.flags.of_a_record(record.value, len(prompt) + len(answer), record.where)
    turns = _with_flags([*(turn._replace(trained=bool(turn.trained)) for turn in prompt), *answer], whole)
    return _with_surroundings(record, {"tools": "tools"}, *_messages_and_marks(turns, record.where), whole is False)


def _with_flags(turns: list[Marked], whole: bool | list[bool | None] | None) -> list[Marked]:
    """The turns with the flags of their record where they have none. A record's true changes nothing."""
    if whole is None or whole is True:
        return turns
    flags = whole if isinstance(whole, list) else [whole] * len(turns)
    return [
        turn._replace(trained=flag) if turn.trained is None else turn for turn, flag in zip(turns, flags, strict=True)
    ]


def _messages_and_marks(turns: Sequence[Marked], where: str) -> tuple[list[Message], tuple[bool | None, ...] | None]:
    """The messages, calls joined to the assistant's turn before them, and the flags if there are any."""
    messages: list[Message] = []
    marks: list[bool | None] = []
    for message, mark, joins in turns:
        if not (joins and messages and messages[-1]["role"] == "assistant"):
            messages.append(message)
            marks.append(mark)
            continue
        if mark != marks[-1] and False in (mark, marks[-1]):
            raise BadDataError(f"{where}: a tool call and the assistant's turn before it are one turn: flag both alike")
        messages[-1]["tool_calls"] = [*messages[-1].get("tool_calls", ()), *message["tool_calls"]]
        marks[-1] = marks[-1] if mark is None else mark
    return messages, tuple(marks) if any(mark is not None for mark in marks) else None


def _get(value: Mapping[str, Any], fields: Mapping[str, str], ours: str) -> Any:
    name = fields.get(ours)
    return None if name is None else lookup(value, name)


def plain_messages(turns: Any, form: TurnForm, sound: bool = False) -> list[Message] | None:
    """The messages of turns about which nothing needs a second look, as in most conversations; else None."""
    if type(turns) is not list:
        return None
    roles = _PLAIN_ROLES
    if form.roles:
        roles = {given: role for given, role in {**roles, **form.roles}.items() if role != "tool_call"}
    role_field, content_field = form.role, form.content
    messages: list[Message] = []
    for turn in turns:
        if type(turn) is not dict or len(turn) != 2:
            return None
        try:
            role, content = roles[turn[role_field]], turn[content_field]
        except (KeyError, TypeError):
            return None
        if type(content) is not str or not (sound or content.isascii() or is_sound(content)):
            return None
        if (not content or content.isspace()) and role in _WITH_WORDS:
            return None
        messages.append({"role": role, "content": content})
    return messages or None


def read_turns(record: Record, name: str, form: TurnForm) -> list[Marked]:
    """The messages of any turns, and what the turns themselves say about training. Raises BadDataError."""
    turns = required_field(record.value, name, record.where)
    name = shown(name)
    if not isinstance(turns, list) or not turns:
        state = "an empty list" if isinstance(turns, list) else kind(turns)
        raise BadDataError(f"{record.where}: field {name!r} must be a list of turns, not {state}")
    if unknown := unknown_roles(turns, form):
        index = next(i for i, turn in enumerate(turns) if isinstance(turn, dict) and turn.get(form.role) in unknown)
        raise BadDataError(f"{record.where}: {name}[{index}].{form.role}: {roles_to_map(unknown)}", "unknown_role")
    return [_message(turn, f"{name}[{index}]", record.where, form) for index, turn in enumerate(turns)]


def _with_surroundings(
    record: Record,
    fields: Mapping[str, str],
    messages: list[Message],
    trained: tuple[bool | None, ...] | None,
    untrained: bool,
) -> ChatExample:
    """The conversation with the record's own system prompt before it and its tools.

    `untrained`: the record's flag is false, which holds for that prompt as well.
    """
    system = _get(record.value, fields, "system")
    if system is not None and system != "":
        text = checked_text(system, f"field {shown(fields['system'])!r}", record.where)
        if messages[0]["role"] == "system":
            raise BadDataError(
                f"{record.where}: field {shown(fields['system'])!r} and the first turn are both a system prompt"
            )
        messages = [{"role": "system", "content": text}, *messages]
        trained = None if trained is None else (False if untrained else None, *trained)
    tools = _get(record.value, fields, "tools")
    found = None if tools is None else read_tools(tools, shown(fields["tools"]), record.where)
    return ChatExample(messages, found, trained)


def _message(turn: Any, what: str, where: str, form: TurnForm) -> Marked:
    """One turn as a message, and whether the record itself says that it is (not) trained."""
    given, role = _role(turn, what, where, form)
    rest = {name: value for name, value in turn.items() if value is not None and name not in (form.role, form.content)}
    mark = form.flags.of_a_turn(rest, what, where) if rest else None
    if rest:
        checked_json(rest, what, where)
    reasoning, text, calls = _content(turn, rest, f"{what}.{form.content}", where, form)
    joins = role == "tool_call" and given != "function_call"
    if role == "tool_call":
        calls, text, role = read_calls(text, f"{what}.{form.content}", where), "", "assistant"
    if rest:
        for name in ("tool_calls", "function_call"):
            calls = [*calls, *read_calls(rest.pop(name, []), f"{what}.{name}", where)]
        reasoning = _rest_texts(rest, what, where) or reasoning
    if (calls or reasoning) and role != "assistant":
        raise BadDataError(f"{where}: {what}: {'tool calls' if calls else 'reasoning'} in a turn of {given!r}")
    if not calls and role in _WITH_WORDS and (not text or text.isspace()):
        raise BadDataError(
            f"{where}: {what}.{form.content} is empty: a turn of {given!r} must say something", "empty_turn"
        )
    message: Message = {"role": role, "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return Marked({**message, **rest}, mark, joins)


def _role(turn: Any, what: str, where: str, form: TurnForm) -> tuple[str, str]:
    """The role of a turn as it is given, and what it means."""
    if not isinstance(turn, dict):
        raise BadDataError(f"{where}: {what} must be an object, not {kind(turn)}")
    if form.role not in turn:
        raise BadDataError(
            f"{where}: {what} lacks {form.role!r} (its fields: {shown_list(turn)});"
            " name the two that it should have with `fields: {role: ..., content: ...}`"
        )
    given = checked_text(turn[form.role], f"{what}.{form.role}", where)
    role = form.role_of(given)
    assert role is not None  # read_turns has looked at all roles
    return given, role


def _content(
    turn: dict[str, Any], rest: dict[str, Any], what: str, where: str, form: TurnForm
) -> tuple[str, str, list[Any]]:
    """Reasoning, text and tool calls that stand in a turn's content. OpenAI leaves it null beside tool calls."""
    content = turn.get(form.content)
    if isinstance(content, list):
        return _parts(content, what, where)
    if content is None and ("tool_calls" in rest or "function_call" in rest):
        return "", "", []
    if form.content not in turn:
        raise BadDataError(
            f"{where}: {what} is missing (fields of the turn: {shown_list(turn)});"
            " another name for it is written `fields: {content: ...}`"
        )
    return "", checked_text(content, what, where), []


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
            calls += read_calls(checked_json(inner, place, where), place, where)
        else:
            texts[order].append(checked_text(inner, place, where))
    return "".join(texts[0]), "".join(texts[1]), calls
