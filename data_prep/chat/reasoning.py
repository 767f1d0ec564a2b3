"""Reasoning of the assistant's turns, and whether a template writes it: many leave out that of earlier turns."""

import re

from data_prep.shapes.examples import Message

#: Blocks of reasoning that stand in the words of a turn.
_BLOCK = re.compile(r"<(think|thinking|thought|reasoning)>(.*?)</\1>|\[THINK\](.*?)\[/THINK\]", re.DOTALL)
_ENDS = ("</think", "</thought", "</reasoning>", "[/THINK]")
_CLOSED = "</think>"  # an answer may begin inside of the block, which its prompt has opened


def lost_reasoning(message: Message, written: str) -> bool:
    """True if `written`, which a template writes of a turn, lacks the reasoning before the turn's last words."""
    reasoning, words = _reasoning_and_words(message)
    lines = [line.strip() for line in reasoning.split("\n") if line.strip()]
    if not lines:
        return False
    start = written.find(lines[0])
    stop = written.find(lines[-1], start) + len(lines[-1])
    # A short thought may also stand in the answer: the answer comes behind it.
    return start < 0 or stop < len(lines[-1]) or words not in written[stop:]


def _reasoning_and_words(message: Message) -> tuple[str, str]:
    """The reasoning of a turn, and the last line of its other words."""
    content = message.get("content")
    content = content if isinstance(content, str) else ""
    reasoning = message.get("reasoning_content")
    found = [reasoning] if isinstance(reasoning, str) else []
    if any(end in content for end in _ENDS):
        found += [one or other for _, one, other in _BLOCK.findall(content)]
        rest = _BLOCK.sub("", content)
        before, end, after = rest.rpartition(_CLOSED)
        if end:
            found, rest = [*found, before], after
        content = rest
    if not found:
        return "", ""
    return "\n".join(found), content.strip().rpartition("\n")[2].strip()
