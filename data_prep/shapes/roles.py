"""The roles of turns by all the names they go by, and the names of the two fields that every turn has."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.config import TurnRole
from data_prep.shapes.fields import shown
from data_prep.shapes.flags import Flags

#: What may stand as the role of a turn, and what it means; letters of any case, `-` and blanks as `_`.
ROLES: Mapping[str, TurnRole] = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "ai", "chatgpt", "bing", "bard"), "assistant"),
    "function_call": "tool_call",
    "tool_call": "tool_call",
    "tool_calls": "tool_call",
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "tool_responses", "tool_result"), "tool"),
    **dict.fromkeys(("tool_results", "tool_output", "function_response", "function_result", "ipython"), "tool"),
}
_ROLE_FIELDS, _CONTENT_FIELDS = ("role", "from"), ("content", "value")


@dataclass(frozen=True, slots=True)
class TurnForm:
    """How the turns of a source are written: the names of their two fields, of their roles and of their flags."""

    role: str = "role"
    content: str = "content"
    roles: Mapping[str, TurnRole] = field(default_factory=dict, hash=False)  # of the run file: theirs -> ours
    flags: Flags = field(default_factory=lambda: Flags({}), compare=False)

    def role_of(self, given: str) -> TurnRole | None:
        """The meaning of a role; None for an unknown one."""
        if role := self.roles.get(given) or ROLES.get(given):
            return role
        mapped = {folded(theirs): ours for theirs, ours in self.roles.items()}
        return mapped.get(folded(given)) or ROLES.get(folded(given))


def folded(role: str) -> str:
    """A role in the form of ROLES."""
    return role.lower().replace("-", "_").replace(" ", "_")


def field_pair(turns: Any, given: Mapping[str, str], role: str, content: str) -> tuple[str, str]:
    """The names of the role and the content in these turns: those given, else the usual ones that they have.

    `role` and `content` where they do not have one of each.
    """
    have = {name for turn in turns if isinstance(turn, dict) for name in turn} if isinstance(turns, list) else set()
    roles, contents = ([name for name in names if name in have] for names in (_ROLE_FIELDS, _CONTENT_FIELDS))
    if len(roles) == len(contents) == 1:
        role, content = roles[0], contents[0]
    return given.get("role") or role, given.get("content") or content


def unknown_roles(turns: Iterable[Any], form: TurnForm) -> Counter[str]:
    """How often each role that is not known stands in some turns."""
    given = (turn.get(form.role) for turn in turns if isinstance(turn, dict))
    return Counter(role for role in given if isinstance(role, str) and form.role_of(role) is None)


def roles_to_map(unknown: Mapping[str, int]) -> str:
    """The sentence about roles that are not known, and the mapping to write."""
    said = ", ".join(
        f"{shown(role)!r} ({count} {'turn' if count == 1 else 'turns'})" for role, count in unknown.items()
    )
    example = ", ".join(f"{shown(role)!r}: assistant" for role in unknown)
    meanings = ", ".join(dict.fromkeys(ROLES.values()))
    return (
        f"the role{'' if len(unknown) == 1 else 's'} {said} {'is' if len(unknown) == 1 else 'are'} not known;"
        f" write what each means, {meanings}, as in `data.chat.roles: {{{example}}}`"
    )
