"""Conversations made up to test a chat template: every kind of thing that a record may hold, in few words."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.chat.marks import Block, Turn, find_blocks, find_turns, without_marks
from data_prep.chat.messages import ControlText, Forms, prepare_messages
from data_prep.chat.render import ChatTemplate
from data_prep.errors import BadDataError
from data_prep.shapes.examples import Message

PROBE = "a conversation made up to test the chat template"
_OPEN = Forms(("text", "parts"), ("object", "text"), ("empty", "none"), True)
#: How a template shows that it printed a list of parts instead of reading it.
_PRINTED_PARTS = re.compile("[\"']type[\"']: ?[\"']text")


@dataclass(frozen=True)
class Probe:
    """A made-up conversation. kind: the feature it needs. words: what the template must write of it."""

    kind: str
    messages: list[Message]
    words: tuple[str, ...]
    tools: list[Any] | None = None


_TOOL = {
    "type": "function",
    "function": {
        "name": "find_place",
        "description": "Finds a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "its name"}},
                       "required": ["place"]},
    },
}  # fmt: skip


def make_probes(letter: str) -> Iterator[Probe]:
    """The same conversations for every letter, with other words."""
    w = [f"{letter}w{number}z" for number in range(12)]

    def talk(kind: str, roles: str, texts: Sequence[str]) -> Probe:
        names = {"s": "system", "u": "user", "a": "assistant"}
        messages = [{"role": names[role], "content": text} for role, text in zip(roles, texts, strict=True)]
        return Probe(kind, messages, tuple(text.strip() for text in texts))

    yield talk("turns", "ua", w[:2])
    yield talk("turns", "uaua", w[:4])
    yield talk("turns", "uauauau", w[:7])
    yield talk("turns", "uauaua", [letter] * 6)
    yield talk("turns", "uaua", [f" {w[0]}", f"  {w[1]}\n", f"{w[2]}\n\n{w[3]} ", f"\n{w[4]}  "])
    yield talk("system", "suaua", w[:5])
    yield talk("answer first", "aua", w[:3])
    yield talk("two answers", "uaaua", w[:5])
    thought = f"<think>\n{w[1]}\n</think>\n\n{w[2]}"
    yield Probe("thoughts", talk("", "uauaua", [w[0], thought, w[3], thought, w[3], thought]).messages, (w[0], w[2]))
    reasoned = talk("reasoning", "uauaua", w[:6]).messages
    for message, text in zip(reasoned[1::2], w[6:9], strict=True):
        message.update(reasoning_content=text, thinking=text)
    yield Probe("reasoning", reasoned, tuple(w[:6]))
    parts = [[{"type": "text", "text": text}] for text in w[:4]]
    yield Probe("parts", [dict(m, content=p) for m, p in zip(talk("", "uaua", w[:4]).messages, parts, strict=True)],
                tuple(w[:4]))  # fmt: skip
    for form in ("object", "text"):
        arguments: Any = {"place": w[1]} if form == "object" else json.dumps({"place": w[1]})
        written = w[1] if form == "object" else arguments
        for name, content in (("empty", ""), ("none", None)):
            function = {"name": "find_place", "arguments": arguments}
            calls = [{"id": "call00001", "type": "function", "function": function}]
            call = {"role": "assistant", "content": content, "tool_calls": calls}
            result = {"role": "tool", "name": "find_place", "tool_call_id": "call00001", "content": w[2]}
            once = [*talk("", "u", w[:1]).messages, call, result, *talk("", "a", w[3:4]).messages]
            twice = [*once, *talk("", "u", w[4:5]).messages, call, result, *talk("", "a", w[5:6]).messages]
            yield Probe(f"call, {form}, {name}", once, (w[0], written, w[2], w[3]))
            yield Probe(f"calls, {form}, {name}", twice, (w[0], written, *w[2:5], written, w[2], w[5]))
    yield Probe("tools", talk("", "ua", w[:2]).messages, (w[0], w[1]), [_TOOL])


@dataclass(frozen=True)
class RenderedProbe:
    """A probe that the template takes. key: the same for every letter. text: as the unmarked template writes it."""

    key: int
    probe: Probe
    messages: Sequence[Message]
    tools: Sequence[Any] | None
    text: str
    turns: Mapping[int, Turn] | None
    blocks: Sequence[Block] | None
    clean: bool


def render_probes(marked: ChatTemplate, unmarked: ChatTemplate, letter: str) -> Iterator[RenderedProbe]:
    """Those of the probes that the template takes and writes the words of."""
    for key, probe in enumerate(make_probes(letter)):
        messages, tools, _, _ = prepare_messages(probe.messages, probe.tools, _OPEN, ControlText((), (), ()), PROBE)
        try:
            text = "".join(unmarked.render(messages, tools, False, PROBE))
        except BadDataError:
            continue
        if tools is not None and "find_place" not in text:
            continue
        if probe.kind.endswith("none") and "None" in text:
            continue
        if not _in_order(probe.words, text) or (probe.kind == "parts" and _PRINTED_PARTS.search(text)):
            continue
        parts = marked.render(messages, tools, False, PROBE)
        turns = None if marked.blocks else find_turns(parts, marked.noted, messages, range(len(messages)))
        blocks = find_blocks(parts, marked.noted, messages) if marked.blocks else None
        yield RenderedProbe(key, probe, messages, tools, text, turns, blocks, without_marks(parts) == text)


def _in_order(words: Sequence[str], text: str) -> bool:
    place = 0
    for word in words:
        place = text.find(word, place)
        if place < 0:
            return False
        place += len(word)
    return True
