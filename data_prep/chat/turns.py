"""Conversations as the chat settings have them before a template writes them: folded, merged, cut into documents."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from data_prep.errors import BadDataError
from data_prep.shapes.examples import ChatExample, Message

if TYPE_CHECKING:  # it brings pydantic, which the process that proves templates does without
    from data_prep.config import ChatConfig

_GAP = "\n\n"
_MERGED = frozenset({"system", "developer", "user", "assistant"})  # a tool's answers stay apart
_SYSTEM = frozenset({"system", "developer"})


def trained_turns(example: ChatExample, chat: "ChatConfig") -> list[int]:
    """The trained turns: what the record says of each, else the settings."""
    messages = example.messages
    chosen = [index for index, message in enumerate(messages) if message["role"] in chat.train_roles]
    if chat.train_turns == "last":
        chosen = chosen[-1:]
    if example.trained is None:
        return chosen
    default = set(chosen)
    said = [*example.trained, *[None] * len(messages)][: len(messages)]
    return [index for index, trained in enumerate(said) if (index in default if trained is None else trained)]


def arrange(example: ChatExample, chat: "ChatConfig", where: str) -> tuple[list[ChatExample], Mapping[str, int]]:
    """The documents that a conversation becomes, and counts of what was folded and merged. Raises BadDataError."""
    if chat.system == "keep" and not chat.merge_turns and chat.train_turns != "each":
        return [example], {}
    turns = list(zip(example.messages, _marks(example, chat), strict=True))
    notes = {}
    if chat.system == "fold":
        turns, notes["systems_folded"] = _fold(turns, where)
    if chat.merge_turns:
        num_turns = len(turns)
        turns = list(_merge(turns, where))
        notes["turns_merged"] = num_turns - len(turns)
    messages, marks = [message for message, _ in turns], [mark for _, mark in turns]
    if chat.train_turns != "each":
        return [ChatExample(messages, example.tools, tuple(marks))], notes
    ends = [index for index, mark in enumerate(marks) if mark]
    documents = [
        ChatExample(messages[: end + 1], example.tools, (*[False] * end, True)) for end in ends
    ]  # each as inference would see it: no turn behind the answer
    return documents, notes


def _marks(example: ChatExample, chat: "ChatConfig") -> list[bool]:
    chosen = set(trained_turns(example, chat))
    return [index in chosen for index in range(len(example.messages))]


def _fold(turns: Sequence[tuple[Message, bool]], where: str) -> tuple[list[tuple[Message, bool]], int]:
    """System prompts before the words of the user's turns that follow them."""
    folded: list[tuple[Message, bool]] = []
    waiting: list[str] = []
    number = 0
    for message, trained in turns:
        if message["role"] in _SYSTEM:
            if trained:
                raise BadDataError(f"{where}: a system prompt that is trained cannot be folded (data.chat.system)")
            number += 1
            waiting += [message["content"]] if message["content"].strip() else []
        elif waiting and message["role"] == "user":
            folded.append(({**message, "content": _GAP.join([*waiting, message["content"]])}, trained))
            waiting = []
        else:
            folded.append((message, trained))
    if waiting:
        raise BadDataError(f"{where}: no user turn follows the system prompt to fold it into (data.chat.system)")
    return folded, number


def _merge(turns: Sequence[tuple[Message, bool]], where: str) -> Iterator[tuple[Message, bool]]:
    """The turns, neighbours of one role as one turn."""
    before: tuple[Message, bool] | None = None
    for message, trained in turns:
        if before is None or not _go_together(before[0], message):
            if before is not None:
                yield before
            before = message, trained
            continue
        if before[1] != trained:
            raise BadDataError(
                f"{where}: two turns of the {message['role']} in a row, of which one is trained and one is not,"
                " cannot be merged (data.chat.merge_turns)"
            )
        before = _joined(before[0], message), trained
    if before is not None:
        yield before


def _go_together(one: Message, other: Message) -> bool:
    """True if two neighbours can be one turn: what follows a call or its words would else change places."""
    own = {"role", "content", "tool_calls", "reasoning_content"}
    same_rest = {k: v for k, v in one.items() if k not in own} == {k: v for k, v in other.items() if k not in own}
    thinks_later = bool(one["content"]) and "reasoning_content" in other
    return (
        one["role"] == other["role"] in _MERGED and not one.get("tool_calls") and same_rest and not thinks_later
    )  # templates write reasoning, words, calls


def _joined(one: Message, other: Message) -> Message:
    texts: Message = {
        name: _GAP.join(text for text in (one.get(name), other.get(name)) if text)
        for name in ("content", "reasoning_content")
        if name == "content" or name in one or name in other
    }
    return {**one, **other, **texts}
