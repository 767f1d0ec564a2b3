"""Tool calls and tools of conversations in OpenAI's form, whatever form the records have them in."""

from typing import Any

from data_prep.errors import BadDataError
from data_prep.shapes.fields import checked_json
from data_prep.sources.records import checked_text, kind
from data_prep.sources.strict_json import parse_value


def read_calls(value: Any, what: str, where: str) -> list[Any]:
    """A tool call or a list of them, or JSON text of either, in OpenAI's form.

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


def read_tools(value: Any, what: str, where: str) -> list[Any] | None:
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
