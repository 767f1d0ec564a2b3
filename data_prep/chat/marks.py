"""Marks in a rendered conversation: where each turn, and each ``{% generation %}`` block, begins and ends.

The marks are Unicode noncharacters, which no text may hold. They are put into the template's syntax tree:
one at the start of every round of a loop at the template's top level, one after such a loop, and one at
either end of a generation block. There, output goes straight to the result and nothing in the template can
see it, so that the text without the marks is the text of the template as it stands. What each mark of a loop
stands for is noted as it is written: the item of that round, or None behind the loop.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.parser
from jinja2 import nodes

TURN = "\ufdd0"
START = "\ufdd1"
STOP = "\ufdd2"
BREAK = "\ufdd3"  # put into contents, to break up the string of a control token

BLOCK_MARKS = (START, STOP)

#: Filter names that no template can write.
_TURN_FILTER, _AFTER_FILTER = "mark a turn", "mark the end"


class Generation(jinja2.ext.Extension):
    """Puts marks around ``{% generation %}`` blocks. Names set inside stay inside, as in transformers."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [_constant(START, line), nodes.Scope(body, lineno=line), _constant(STOP, line)]


class PlainGeneration(jinja2.ext.Extension):
    """Accepts generation blocks and writes what is in them."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        return [nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)]


def _constant(text: str, line: int) -> nodes.Output:
    return nodes.Output([nodes.TemplateData(text, lineno=line)], lineno=line)


def has_blocks(tree: nodes.Template) -> bool:
    """True if the template, parsed with `Generation`, has generation blocks."""
    return any(node.data == START for node in tree.find_all(nodes.TemplateData))


def mark_turns(tree: nodes.Template, environment: jinja2.Environment) -> list[Any]:
    """Put turn marks into `tree`, parsed in `environment`. Returns the list that rendering notes the items in.

    Clear the list before each render.
    """
    noted: list[Any] = []

    def turn(item: Any) -> str:
        noted.append(item)
        return TURN

    @jinja2.pass_context
    def after(_context: Any, _value: Any) -> str:
        noted.append(None)
        return TURN

    environment.filters.update({_TURN_FILTER: turn, _AFTER_FILTER: after})
    _mark_loops(tree.body)
    tree.set_environment(environment)
    return noted


def _mark_loops(body: list[nodes.Node]) -> None:
    """Mark the outermost loops of a list of statements whose output goes straight to the result."""
    for place in range(len(body) - 1, -1, -1):
        node = body[place]
        if isinstance(node, nodes.If):
            for branch in (node.body, *(part.body for part in node.elif_), node.else_):
                _mark_loops(branch)
        elif isinstance(node, nodes.With | nodes.Scope):
            _mark_loops(node.body)
        elif isinstance(node, nodes.For) and isinstance(node.target, nodes.Name) and _writes(node):
            line = node.lineno
            item = nodes.Name(node.target.name, "load", lineno=line)
            node.body.insert(0, _filtered(item, _TURN_FILTER, line))
            body.insert(place + 1, _filtered(nodes.Const(None, lineno=line), _AFTER_FILTER, line))


def _writes(loop: nodes.For) -> bool:
    return not loop.recursive and loop.find(nodes.Output) is not None


def _filtered(value: nodes.Expr, name: str, line: int) -> nodes.Output:
    return nodes.Output([nodes.Filter(value, name, [], [], None, None, lineno=line)], lineno=line)


class Turn(NamedTuple):
    """What one round of a loop wrote of one message: characters [start, start + len(text)) of the result."""

    message_index: int
    start: int
    text: str


class Block(NamedTuple):
    """One generation block: characters [start, stop) of the result; the message is that whose round wrote it."""

    message_index: int | None
    start: int
    stop: int


def split_at_turns(pieces: list[str]) -> list[str]:
    """The texts between turn marks, from the pieces that a template writes one after the other."""
    parts = []
    start = 0
    for _ in range(pieces.count(TURN)):
        stop = pieces.index(TURN, start)
        parts.append("".join(pieces[start:stop]))
        start = stop + 1
    parts.append("".join(pieces[start:]))
    return parts


def find_turns(
    parts: Sequence[str], noted: Sequence[Any], messages: Sequence[Any], wanted: Iterable[int]
) -> dict[int, Turn] | None:
    """Those of the wanted messages' turns that are written, in any order.

    None if the marks are not those that were written, or a wanted message is written twice.
    """
    if len(parts) != len(noted) + 1:
        return None
    starts = [0, *accumulate(map(len, parts))]
    if len(noted) == len(messages) + 1 and noted[-1] is None and noted[:-1] == messages:  # one loop over all of them
        return {index: Turn(index, starts[index + 1], parts[index + 1]) for index in wanted if parts[index + 1]}
    turns: dict[int, Turn] = {}
    wanted = set(wanted)
    for place, index in enumerate(_indices(noted, messages), 1):
        text = parts[place]
        if index is not None and text and index in wanted:
            if index not in turns or turns[index].text.isspace():
                turns[index] = Turn(index, starts[place], text)
            elif not text.isspace():
                return None
    return turns


def _indices(noted: Sequence[Any], messages: Sequence[Any]) -> Iterator[int | None]:
    """Which message each noted item is, by identity; every loop runs through them in their order."""
    next_index = 0
    for item in noted:
        if item is None:
            next_index = 0
            yield None
            continue
        found = next((index for index in range(next_index, len(messages)) if messages[index] is item), None)
        if found is not None:
            next_index = found + 1
        yield found


def read_blocks(pieces: Sequence[str], noted: Sequence[Any], messages: Sequence[Any]) -> tuple[str, list[Block]] | None:
    """The text without its marks, and its generation blocks in their order.

    `pieces` are what the template writes one after the other. None if the marks are not those that were written.
    """
    belongs: Sequence[int | None]
    if len(noted) == len(messages) + 1 and noted[-1] is None and noted[:-1] == messages:  # one loop over all of them
        belongs = [None, *range(len(messages)), None]
    else:
        belongs = [None, *_indices(noted, messages)]
    texts: list[str] = []
    blocks: list[Block] = []
    size = turn = 0
    start = -1
    for piece in pieces:
        if piece == TURN:
            turn += 1
        elif piece == START and start < 0:
            start = size
        elif piece == STOP and start >= 0:
            blocks.append(Block(belongs[turn] if turn < len(belongs) else None, start, size))
            start = -1
        else:
            texts.append(piece)
            size += len(piece)
    text = "".join(texts)
    if START in text or STOP in text:  # some are inside of what the template put together first
        parts = split_at_turns(list(pieces))
        found = find_blocks(parts, noted, messages)
        return None if found is None else (without_marks(parts), found)
    return (text, blocks) if start < 0 and turn == len(noted) else None


def find_blocks(parts: Sequence[str], noted: Sequence[Any], messages: Sequence[Any]) -> list[Block] | None:
    """The generation blocks in their order; None if the marks are not those that were written."""
    if len(parts) != len(noted) + 1:
        return None
    indices: Iterable[int | None] = _indices(noted, messages)
    if len(noted) == len(messages) + 1 and noted[-1] is None and noted[:-1] == messages:  # one loop over all of them
        indices = [*range(len(messages)), None]
    belongs = [None, *indices]
    text = "".join(parts)
    ends = list(accumulate(map(len, parts)))
    blocks: list[Block] = []
    start = text.find(START)
    while start >= 0:
        stop = text.find(STOP, start)
        if stop < 0:
            return None
        marks = 2 * len(blocks) + 1  # before and at the start of this block
        blocks.append(Block(belongs[bisect_right(ends, stop)], start + 1 - marks, stop - marks))
        start = text.find(START, stop)
    # A mark within a block, or one that closes none, is left over.
    return blocks if text.count(START) == text.count(STOP) == len(blocks) else None


def without_marks(parts: Sequence[str]) -> str:
    """The text of a template with generation blocks, without their marks."""
    return "".join(parts).replace(START, "").replace(STOP, "")
