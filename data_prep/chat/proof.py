"""What is proven of a chat template before it may say what is trained, and what is learned on the way.

Small conversations with made-up words are rendered with and without their answers. From them come the
headers that turns begin with, the stop tokens, and the forms of content the template takes; then every
conversation must pass `find_fault`. The result is a `Plan`, plain JSON values: it is made once, in a process
of its own (child.py), and handed to all others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from jinja2 import nodes

from data_prep.chat.marks import Generation, Turn
from data_prep.chat.messages import Forms
from data_prep.chat.probes import PROBE, RenderedProbe, render_probes
from data_prep.chat.render import ChatTemplate
from data_prep.chat.sandbox import chat_environment, limits, parse_template
from data_prep.chat.spans import Headers, block_spans, common_prefix, find_fault, last_words, make_headers, turn_span
from data_prep.errors import BadDataError
from data_prep.shapes.examples import Message

_CUTTING_METHODS = frozenset({"split", "rsplit", "partition", "rpartition", "replace"})
_ADVICE = (
    "put {% generation %} and {% endgeneration %} around what the assistant says, in a file for data.chat.template"
)


@dataclass(frozen=True)
class Plan:
    """What `prove` found. `unproven`: why no targets can be known, empty if they can.

    headers: [role, text before the trained characters] pairs. stops: strings that answers end with.
    control: strings that no content may turn into tokens; understood: those of them that the template itself
    looks for in answers. kinds: the kinds of conversation that passed, failed: those that the template writes
    but that did not pass. blocks: it has generation blocks. The rest is as in `Forms`.
    """

    unproven: str = ""
    blocks: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    stops: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    understood: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    contents: tuple[str, ...] = ("text",)
    arguments: tuple[str, ...] = ("object", "text")
    call_contents: tuple[str, ...] = ("empty", "none")
    tools: bool = False

    @property
    def forms(self) -> Forms:
        """The forms of content it takes."""
        return Forms(self.contents, self.arguments, self.call_contents, self.tools)

    def make_headers(self) -> Headers:
        """The headers, ready for the search."""
        before: dict[str, list[str]] = {}
        for role, text in self.headers:
            before.setdefault(role, []).append(text)
        return make_headers(before, self.stops, self.control)


def plan_from_json(values: Mapping[str, Any]) -> Plan:
    """The plan whose `dataclasses.asdict` went through JSON."""
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Plan(**{**values, **lists, "headers": tuple((role, before) for role, before in values["headers"])})


def prove(
    source: str,
    special_tokens: Mapping[str, str],
    control_strings: Sequence[str],
    added_strings: Sequence[str],
    now: datetime,
) -> Plan:
    """Learn and prove what the marks of a template mean, in this process.

    `control_strings` never come from content; `added_strings` are other single tokens of the tokenizer, and
    join them if the template writes them around ordinary turns. Raises DataConfigError for an invalid
    template and RefusedError for a hostile one; one without proof gives a plan that says so.
    """
    marked = ChatTemplate(source, special_tokens, now, marked=True)
    unmarked = ChatTemplate(source, special_tokens, now, marked=False)
    with limits():
        rendered = [each for letter in ("q", "J") for each in render_probes(marked, unmarked, letter)]
        kinds = {each.probe.kind for each in rendered}
        base = ("turns", "system") if "turns" in kinds else ("parts",)
        if base[0] not in kinds:
            return Plan(unproven=f"it writes no conversation of a user and an assistant; {_ADVICE}")
        told = "".join(each.text for each in rendered if each.probe.kind in base)
        control = (*control_strings, *(text for text in added_strings if text and text in told))
        plan = Plan(
            blocks=marked.blocks,
            control=control,
            understood=tuple(text for text in control if any(text in known for known in _sought(source, now))),
            contents=tuple(form for form, kind in (("text", "turns"), ("parts", "parts")) if kind in kinds),
            arguments=tuple(form for form in ("object", "text") if any(f"call, {form}" in kind for kind in kinds)),
            call_contents=tuple(form for form in ("empty", "none") if any(f", {form}" in kind for kind in kinds)),
            tools="tools" in kinds,
        )
        if marked.blocks:
            return _prove_blocks(plan, rendered, base)
        return _prove_turns(plan, rendered, unmarked, base)


def _sought(source: str, now: datetime) -> set[str]:
    """The constants that a template looks for in other texts, or splits them at."""
    tree = parse_template(chat_environment(now, [Generation]), source)
    found: set[str] = set()
    for compare in tree.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in compare.ops) and isinstance(compare.expr, nodes.Const):
            found.add(str(compare.expr.value))
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _CUTTING_METHODS:
            found.update(arg.value for arg in call.args if isinstance(arg, nodes.Const) and isinstance(arg.value, str))
    return found


def _prove_blocks(plan: Plan, rendered: Sequence[RenderedProbe], base: Sequence[str]) -> Plan:
    """Check that generation blocks hold the answers."""
    failed: dict[str, None] = {}
    for each in rendered:
        answers = {index for index, message in enumerate(each.messages) if message["role"] == "assistant"}
        spans = block_spans(each.blocks or (), each.messages)
        fault = None
        if not each.clean:
            fault = "its generation blocks stand where their output is changed"
        elif set(spans) != answers:
            fault = "its generation blocks do not hold every answer, or more than the answers"
        elif not all(_words_of(each.messages[index]) in each.text[slice(*spans[index])] for index in answers):
            fault = "its generation blocks do not hold what the assistant says"
        if fault and each.probe.kind in base:
            return replace(plan, unproven=f"{fault}; correct them in a file for data.chat.template")
        if fault:
            failed[each.probe.kind] = None
    stops = {
        ending
        for each in rendered
        if each.probe.kind in base
        for ending in _endings(plan, each, block_spans(each.blocks or (), each.messages))
    }
    kinds = [each.probe.kind for each in rendered if each.probe.kind not in failed]
    return replace(_with_stops(plan, stops), kinds=tuple(dict.fromkeys(kinds)), failed=tuple(failed))


def _with_stops(plan: Plan, stops: set[str]) -> Plan:
    """The plan with what ends answers, which nothing in an answer may pass for."""
    return replace(
        plan, stops=tuple(sorted(stops)), understood=tuple(text for text in plan.understood if text not in stops)
    )


def _endings(plan: Plan, each: RenderedProbe, spans: Mapping[int, tuple[int, int]]) -> Iterator[str]:
    """The control strings that spans end with."""
    for start, stop in spans.values():
        body = each.text[start:stop].rstrip()
        if ends := [text for text in plan.control if text and body.endswith(text)]:
            yield max(ends, key=len)


def _words_of(message: Message) -> str:
    """What a span must hold of a made-up message: the last line of its text."""
    return last_words(message, ("\n",))


def _prove_turns(plan: Plan, rendered: Sequence[RenderedProbe], unmarked: ChatTemplate, base: Sequence[str]) -> Plan:
    """Learn headers and stops from the probes; then every kind of probe must pass.

    What one kind teaches counts only if its probes pass with it.
    """
    kinds = {
        kind: [each for each in rendered if each.probe.kind == kind] for each in rendered for kind in [each.probe.kind]
    }
    ends = (
        ending
        for kind in base
        for each in kinds.get(kind, ())
        for ending in _endings(plan, each, {i: (t.start, t.start + len(t.text)) for i, t in _answers(each).items()})
    )
    plan = _with_stops(plan, set(ends))
    proven: list[str] = []
    for kind, probes in kinds.items():
        fault = next(("its turns cannot be marked" for each in probes if not each.clean or each.turns is None), None)
        learned = fault or _learn_headers(plan, probes, unmarked)
        if not isinstance(learned, str):
            trial = replace(plan, headers=tuple(sorted({*plan.headers, *learned})))
            headers = trial.make_headers()
            fault = next((found for each in probes if (found := _fault_of(each, headers, unmarked))), None)
            if fault is None:
                plan = trial
                proven.append(kind)
        else:
            fault = learned
        if fault and kind in base:
            return replace(plan, unproven=f"{fault}; {_ADVICE}")
    return replace(plan, kinds=tuple(proven), failed=tuple(kind for kind in kinds if kind not in proven))


def _answers(each: RenderedProbe) -> dict[int, Turn]:
    turns = each.turns or {}
    return {index: turn for index, turn in turns.items() if each.messages[index]["role"] == "assistant"}


def _render(
    unmarked: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool
) -> str | None:
    try:
        return "".join(unmarked.render(messages, tools, prompt, PROBE))
    except BadDataError:
        return None


def _learn_headers(plan: Plan, rendered: Sequence[RenderedProbe], unmarked: ChatTemplate) -> set[tuple[str, str]] | str:
    """The headers of every role, as far as all letters agree on them; or why there are none."""
    sure: dict[tuple[int, int, str], list[str]] = {}
    unsure: dict[tuple[int, int, str], list[str]] = {}
    for each in rendered:
        for index, turn in (each.turns or {}).items():
            message = each.messages[index]
            key = (each.key, index, str(message["role"]))
            words = _words_of(message)
            before = turn.text.partition(words)[0] if words and words in turn.text else None
            if message["role"] != "assistant":
                if before is not None and len(words) > 1 and words == message["content"]:
                    sure.setdefault(key, []).append(before)
                continue
            prompt = _render(unmarked, each.messages[:index], each.tools, True) if index else None
            agreed = -1 if prompt is None else _whole_tokens(common_prefix(prompt, each.text), prompt, each.text, plan)
            if prompt is not None and agreed == turn.start < len(prompt):
                return "its generation prompt is not what it writes before an answer"
            if agreed >= turn.start:
                sure.setdefault(key, []).append(turn.text[: agreed - turn.start])
            elif before is not None:
                unsure.setdefault(key, []).append(before)
    learned = {(key[2], header) for key, texts in sure.items() if (header := _agreed_header(key[2], texts)) is not None}
    known = tuple(text for role, text in (*learned, *plan.headers) if role == "assistant")
    if not known:
        return "no turn of the assistant can be told apart"
    for texts in unsure.values():
        # No prompt leads to this turn, or not the one that the whole conversation shows: it must look like others.
        header = _agreed_header("", texts)
        if header is not None and not header.startswith(known) and header.endswith(known):
            learned.add(("assistant", header))
    return learned


def _agreed_header(role: str, texts: Sequence[str]) -> str | None:
    """What the same turn with other words begins with. Words of an answer may agree with the prompt by chance."""
    if len(texts) > 1 and (len(set(texts)) == 1 or role == "assistant"):
        return min(texts, key=len)
    return None


def _whole_tokens(place: int, prompt: str, text: str, plan: Plan) -> int:
    """`place`, or the start of the control string of either text that it would cut."""
    for whole in (prompt, text):
        for control in plan.control:
            start = whole.rfind(control, max(0, place - len(control) + 1), place + len(control) - 1) if control else -1
            if 0 <= start < place < start + len(control):
                place = start
    return place


def _fault_of(each: RenderedProbe, headers: Headers, unmarked: ChatTemplate) -> str | None:
    """What is wrong with the spans of a probe."""
    if not each.clean or each.turns is None:
        return "its turns cannot be marked"
    spans = []
    for index, message in enumerate(each.messages):
        if message["role"] != "assistant":
            continue
        turn = each.turns.get(index)
        span = turn and turn_span(turn, "assistant", headers)
        if turn is None or span is None:
            return (
                f"it does not begin the answer in messages[{index}] of {[m['role'] for m in each.messages]} as others"
            )
        if _words_of(message) not in each.text[span[0] : span[1]]:
            return f"the answer in messages[{index}] is not where its turn is"
        spans.append((turn, span[0], span[1]))
    return find_fault(
        lambda m, prompt: _render(unmarked, m, each.tools, prompt), each.messages, each.text, spans, headers
    )
