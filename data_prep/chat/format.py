"""Chat to text and targets: one render of a Jinja template, and the characters in it that are trained.

What is trained, and how that is known, says spans.py; how a template is tested before,
proof.py; what a template may do, sandbox.py.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.chat.marks import BLOCK_MARKS, BREAK, Turn, find_turns, read_blocks, split_at_turns, without_marks
from data_prep.chat.messages import ControlText, prepare_messages
from data_prep.chat.proof import Plan, prove
from data_prep.chat.reasoning import lost_reasoning
from data_prep.chat.render import ChatTemplate
from data_prep.chat.sandbox import limits, limits_active
from data_prep.chat.spans import block_spans, find_fault, last_words, turn_span
from data_prep.chat.turns import arrange, trained_turns
from data_prep.errors import BadDataError, DataConfigError
from data_prep.shapes.examples import ChatExample, Message
from data_prep.tokenizer.chat_templates import missing_tokens

if TYPE_CHECKING:  # it brings pydantic, which the process that proves templates does without
    from data_prep.config import ChatConfig

_CHECKED_EVERY = 256
_LOST = "the chat template writes a turn twice, or cuts its output up, so what the assistant says cannot be told apart"


class Rendered(NamedTuple):
    """One conversation as text.

    spans: characters [start, stop) that are trained, ascending. num_answers: trained turns; num_stops: those
    whose span ends with a control string. literal_spans: characters that spell a control string but came from
    the conversation's content; they must be encoded as text, apart from what is around them. notes: what happened to
    the conversation that people should know, counted.
    """

    text: str
    spans: list[tuple[int, int]]
    num_answers: int
    num_stops: int
    literal_spans: list[tuple[int, int]]
    notes: Mapping[str, int]


class ChatFormat:
    """A chat template ready to render conversations. Holds compiled code: every process makes its own."""

    def __init__(
        self,
        template: str,
        special_tokens: Mapping[str, str],
        control_strings: Sequence[str],
        now: datetime,
        chat: "ChatConfig",
        plan: Plan | None = None,
        added_strings: Sequence[str] = (),
    ):
        """Compile `template`. `now` is what its clock shows, so that all workers agree.

        control_strings: the tokenizer's special tokens, which no content may become. added_strings: its other
        single tokens; those that the template writes around ordinary turns count as control strings too.
        plan: what `prove_apart` found for the same arguments; without it the template is proven here.
        Raises DataConfigError for a template that is not valid or whose targets cannot be known, and
        RefusedError for a hostile one.
        """
        self.plan = plan or prove(template, special_tokens, control_strings, added_strings, now)
        if self.plan.unproven and not chat.train_on_prompt:
            raise DataConfigError(f"chat template: what it trains cannot be known: {self.plan.unproven}")
        if not self.plan.unproven and not self.plan.stops and not chat.allow_untrained_stop:
            _refuse_missing_tokens(template, {*control_strings, *added_strings, *self.plan.control})
        self._marked = ChatTemplate(template, special_tokens, now, marked=True)
        self._unmarked: ChatTemplate | None = None
        self._arguments = (template, special_tokens, now)
        self._chat = chat
        self._headers = self.plan.make_headers()
        self._forms = self.plan.forms
        self._control = ControlText(self.plan.control, self.plan.understood, BLOCK_MARKS if self.plan.blocks else ())
        self._num_rendered = 0

    def render(self, example: ChatExample, where: str) -> Rendered:
        """The text of a conversation and what is trained in it.

        Put `template_sandbox.limits()` around many calls; alone, a call brings its own. Raises, naming
        `where`: BadDataError if the template refuses the conversation or does not show what is in it,
        RefusedError if it leaves the sandbox or its limits.
        """
        if not limits_active():
            with limits():
                return self.render(example, where)
        messages, tools, broken, plain = prepare_messages(
            example.messages, example.tools, self._forms, self._control, where
        )
        try:
            pieces = self._marked.pieces(messages, tools, False, where)
        except BadDataError as error:
            raise BadDataError(f"{error}{_way_out(example.messages, self._chat)}", "template_refuses") from error
        trained = trained_turns(example, self._chat)
        self._num_rendered += 1
        check = self._num_rendered % _CHECKED_EVERY == 0 or (not plain and bool(self.plan.failed))
        spans: list[tuple[int, int]]  # one for each trained turn, in their order
        num_stops = 0
        if self.plan.unproven:
            text = without_marks(split_at_turns(pieces))
            spans = [(0, len(text))] * len(trained)
        elif self.plan.blocks:
            text, spans, num_stops = self._block_spans(pieces, messages, trained, where)
            if check:
                self._check_text(text, messages, tools, where)
        else:
            text, spans, num_stops = self._turn_spans(split_at_turns(pieces), messages, tools, trained, check, where)
        notes = _notes(text, messages, dict(zip(trained, spans, strict=True)))
        spans = [span for span in spans if span[0] < span[1]]
        if self._chat.train_on_prompt:
            _refuse_untrained(example, where)
            spans = [(0, len(text))] if text else []
        if broken:
            return self._with_literals(Rendered(text, spans, len(trained), num_stops, [], notes))
        return Rendered(text, spans, len(trained), num_stops, [], notes)

    def documents(self, example: ChatExample, where: str) -> tuple[list[ChatExample], Mapping[str, int]]:
        """The conversations to render for a record, as the settings have it, and counts of what was changed."""
        return arrange(example, self._chat, where)

    def prompt_text(
        self, messages: Sequence[Message], add_generation_prompt: bool, where: str, tools: Sequence[Any] | None = None
    ) -> str:
        """The text of a conversation as inference sends it. Raises as `render`, also for control strings in it."""
        messages, tools, broken, _ = prepare_messages(messages, tools, self._forms, self._control, where)
        if broken:
            raise BadDataError(f"{where}: the conversation holds the string of a control token")
        with limits():
            return without_marks(self._marked.render(messages, tools, add_generation_prompt, where))

    def _turn_spans(
        self,
        parts: Sequence[str],
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        trained: Sequence[int],
        check: bool,
        where: str,
    ) -> tuple[str, list[tuple[int, int]], int]:
        turns = find_turns(parts, self._marked.noted, messages, trained)
        if turns is None:
            raise BadDataError(f"{where}: {_LOST}")
        text = "".join(parts)
        spans: list[tuple[int, int]] = []
        answers: list[tuple[Turn, int, int]] = []
        num_stops = 0
        for index in trained:
            message = messages[index]
            role = message["role"]
            turn, (start, stop, stopped) = self._find_span(turns, index, role, where)
            content = message.get("content")
            if len(message) > 2 or not (type(content) is str and content and text.find(content, start, stop) >= 0):
                check |= self._check_words(message, text[start:stop], index, where)
            num_stops += stopped
            if spans and start < spans[-1][1]:
                raise BadDataError(f"{where}: the chat template writes messages[{index}] before an earlier turn")
            spans.append((start, stop))
            if role == "assistant":
                answers.append((turn, start, stop))
        if check:
            self._check_text(text, messages, tools, where)
            fault = find_fault(self._prefix_render(tools, where), messages, text, answers, self._headers)
            if fault:
                raise BadDataError(f"{where}: what the chat template trains here cannot be known: {fault}")
        return text, spans, num_stops

    def _find_span(
        self, turns: Mapping[int, Turn], index: int, role: str, where: str
    ) -> tuple[Turn, tuple[int, int, bool]]:
        """The turn of messages[index], and where its trained characters begin, stop, and whether with a stop token."""
        turn = turns.get(index)
        found = None if turn is None else turn_span(turn, role, self._headers)
        if turn is None or found is None:
            raise BadDataError(
                f"{where}: the chat template does not write messages[{index}] ({role}) as it writes other turns;"
                " put {% generation %} around the assistant's words in it"
            )
        return turn, found

    def _block_spans(
        self, pieces: Sequence[str], messages: Sequence[Message], trained: Sequence[int], where: str
    ) -> tuple[str, list[tuple[int, int]], int]:
        read = read_blocks(pieces, self._marked.noted, messages)
        if read is None:
            raise BadDataError(f"{where}: {_LOST}")
        text, blocks = read
        found = block_spans(blocks, messages)
        spans: list[tuple[int, int]] = []
        num_stops = 0
        for index in trained:
            if index not in found:
                role = messages[index]["role"]
                raise BadDataError(
                    f"{where}: no generation block of the chat template writes messages[{index}] ({role})"
                )
            start, stop = found[index]
            message = messages[index]
            content = message.get("content")
            # Most turns are plain text that stands there as it is, and end with their stop token.
            if len(message) > 2 or type(content) is not str or text.find(content, start, stop) < 0:
                self._check_words(message, text[start:stop], index, where)
            stops = self._headers.stops
            num_stops += text.endswith(stops, start, stop) or self._headers.stop_of(text[start:stop].rstrip())
            spans.append((start, stop))
        return text, spans, num_stops

    def _check_words(self, message: Message, span: str, index: int, where: str) -> bool:
        """True if a span shows the message only in part; BadDataError if it lacks the last words or a tool call."""
        for call in message.get("tool_calls") or ():
            named = call.get("function", call) if isinstance(call, dict) else {}
            if str(named.get("name", "")) not in span:
                raise BadDataError(f"{where}: the chat template does not write the tool calls of messages[{index}]")
        content = message.get("content")
        if isinstance(content, str) and content.strip() in span:
            return False
        if last_words(message, self.plan.understood) not in span:
            raise BadDataError(f"{where}: the chat template does not write what messages[{index}] says")
        return content is not None

    def _check_text(self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, where: str) -> None:
        if self._plain_render(messages, tools, False, where) != text:
            raise BadDataError(f"{where}: marks change what the chat template writes; write {{% generation %}} into it")

    def _plain_render(self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool, where: str) -> str:
        if self._unmarked is None:
            self._unmarked = ChatTemplate(*self._arguments, marked=False)
        return "".join(self._unmarked.render(messages, tools, prompt, where))

    def _prefix_render(
        self, tools: Sequence[Any] | None, where: str
    ) -> Callable[[Sequence[Message], bool], str | None]:
        def render(messages: Sequence[Message], prompt: bool) -> str | None:
            try:
                return self._plain_render(messages, tools, prompt, where)
            except BadDataError:
                return None

        return render

    def _with_literals(self, rendered: Rendered) -> Rendered:
        """Take the marks inside of control strings out again, and say where these strings stand."""
        text, spans = rendered.text, rendered.spans
        places = [place for place, character in enumerate(text) if character == BREAK]
        clean = text.replace(BREAK, "")
        moved = [(start - bisect_left(places, start), stop - bisect_left(places, stop)) for start, stop in spans]
        literal = []
        for number, place in enumerate(places):
            start = place - number - 1
            stop = self._control.at(clean, start) if start >= 0 else None
            if stop is not None:
                literal.append((start, stop))
        return rendered._replace(text=clean, spans=moved, literal_spans=literal)


def _refuse_missing_tokens(template: str, known: Collection[str]) -> None:
    """DataConfigError if what a template ends its answers with may be a token that the tokenizer lacks."""
    if missing := missing_tokens(template, known):
        named = " and ".join(filter(None, (", ".join(map(repr, missing[:-1])), repr(missing[-1]))))
        special = " ".join(f"--special '{text}'" for text in missing)
        raise DataConfigError(
            "chat template: it ends answers with text and not with a token, so the model would not learn to stop:"
            f" {named} {'is no token' if len(missing) == 1 else 'are no tokens'} of the tokenizer; add them to a model"
            f" with `fulltune tokenizer add MODEL OUT {special}` and use OUT, or set data.chat.allow_untrained_stop"
        )


def _refuse_untrained(example: ChatExample, where: str) -> None:
    """BadDataError for a turn that must not be trained, where the settings train all of them."""
    if example.trained is not None and False in example.trained:
        index = example.trained.index(False)
        fault = (
            f"{where}: messages[{index}] must not be trained, by its flag or as a turn of a prompt, but"
            " data.chat.train_on_prompt trains everything; leave out one of the two"
        )
        raise BadDataError(fault, "training_flag")


def _notes(text: str, messages: Sequence[Message], trained: Mapping[int, tuple[int, int]]) -> Mapping[str, int]:
    """Counts of trained turns (with their spans) whose reasoning the template does not write."""
    lost = [index for index, (start, stop) in trained.items() if lost_reasoning(messages[index], text[start:stop])]
    if not lost:
        return {}
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return {"reasoning_lost": len(lost), "last_reasoning_lost": int(last in lost)}


def _way_out(messages: Sequence[Message], chat: "ChatConfig") -> str:
    """The settings that may make a conversation fit for a template that refuses it."""
    roles = [message["role"] for message in messages]
    ways = []
    if chat.system == "keep" and not {"system", "developer"}.isdisjoint(roles):
        ways.append("`data.chat.system: fold` puts a system prompt into the user's next turn")
    if not chat.merge_turns and any(one == other != "tool" for one, other in pairwise(roles)):
        ways.append("`data.chat.merge_turns: true` joins neighbouring turns of one role")
    return "".join(f"; {way}" for way in ways)
