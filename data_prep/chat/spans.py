"""Which characters of a rendered conversation are trained, and the proof that these are the right ones.

The span of an answer is what inference would have to produce after the history as the rendered conversation
shows it: from the end of the generation prompt to the end of the answer's stop token; white space behind the
stop token is context, and without a stop token the span goes to the end of what the turn wrote. Every turn's
text is known from the marks of its round of the template's loop (marks.py); the generation prompt
is the longest known header that it begins with. Headers are learned per template by rendering conversations
with and without the answer (proof.py). Three cases differ from the plain one:

- The generation prompt goes further than what precedes the answer in the whole conversation (DeepSeek-R1
  opens a reasoning block that earlier turns lose): the span begins where the two part.
- The template writes an earlier turn otherwise than when it was the last (Qwen3 drops its reasoning): the
  span is what the whole conversation shows of it.
- The turn writes more before the words of the answer than the generation prompt has (GPT-OSS names the
  channel): the model has to produce it, so it is in the span.

The span of another role's turn begins with its content. A template's own generation blocks are taken as
they are, white space and headers included, as transformers takes them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from data_prep.chat.marks import Block, Turn
from data_prep.shapes.examples import Message

_CHECKED_TURNS = 6  # of one conversation, so that the check stays linear in its length


@dataclass(frozen=True)
class Headers:
    """What a template writes around the words of a turn.

    `before`: for each role, what precedes the trained characters, longest first. `stops`: the strings that
    turns end with. `endings`: all control strings, by their lengths.
    """

    before: Mapping[str, tuple[str, ...]]
    stops: tuple[str, ...]
    control: frozenset[str]
    lengths: tuple[int, ...]

    def stop_of(self, text: str) -> bool:
        """True if `text` ends with a control string."""
        return text.endswith(self.stops) or any(text[-length:] in self.control for length in self.lengths)


def make_headers(before: Mapping[str, Sequence[str]], stops: Sequence[str], control: Sequence[str]) -> Headers:
    """`Headers` in the order that the search needs."""
    return Headers(
        {role: tuple(sorted(texts, key=lambda text: (-len(text), text))) for role, texts in before.items()},
        tuple(stops),
        frozenset(control) - {""},
        tuple(sorted({len(text) for text in control} - {0})),
    )


def turn_span(turn: Turn, role: str, headers: Headers) -> tuple[int, int, bool] | None:
    """Start and stop of the trained characters of a turn, and whether they end with a stop token.

    None if the turn does not begin as turns of this role do.
    """
    text = turn.text
    for header in headers.before.get(role, ()):
        if text.startswith(header):
            break
    else:
        return None
    body = text.rstrip()
    stopped = body.endswith(headers.stops) or headers.stop_of(body)
    start = turn.start + len(header)
    return start, max(start, turn.start + len(body if stopped else text)), stopped


def block_spans(blocks: Sequence[Block], messages: Sequence[Message]) -> dict[int, tuple[int, int]]:
    """The characters that generation blocks cover, by message; blocks of one message are joined.

    A block outside of the loop over the messages belongs to the last answer; if all are, they are the
    answers in their order.
    """
    known = {block.message_index: (block.start, block.stop) for block in blocks}
    if len(known) == len(blocks) and None not in known:
        return {index: span for index, span in known.items() if index is not None}
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    ordered = len(blocks) == len(answers) and all(block.message_index is None for block in blocks)
    spans: dict[int, tuple[int, int]] = {}
    for number, block in enumerate(blocks):
        index = answers[number] if ordered else block.message_index
        if index is None:
            index = answers[-1] if answers else -1
        start = spans[index][0] if index in spans else block.start
        spans[index] = start, block.stop
    return spans


def find_fault(
    render: Callable[[Sequence[Message], bool], str | None],
    messages: Sequence[Message],
    text: str,
    turns: Sequence[tuple[Turn, int, int]],
    headers: Headers,
) -> str | None:
    """Compare spans with what inference sends and what the conversation up to each answer shows.

    `render` gives the text of messages with or without the generation prompt, None where the template
    refuses; `turns` are the assistant's, with start and stop of their spans in `text`. Returns what is wrong,
    or None. A few turns of a long conversation are looked at, the first and the last among them.
    """
    step = max(1, -(-len(turns) // _CHECKED_TURNS))
    for turn, start, stop in {turn[0].message_index: turn for turn in (*turns[::step], *turns[-1:])}.values():
        index = turn.message_index
        prompt = render(messages[:index], True) if index else None
        if prompt is not None:
            agreed = common_prefix(prompt, text)
            if agreed == len(prompt) and start != agreed:
                return f"messages[{index}]: the prompt has {agreed} characters, the marks say {start}"
            if agreed >= turn.start and start > agreed:
                return f"messages[{index}]: the marks leave {start - agreed} characters of the answer untrained"
        upto = render(messages[: index + 1], False)
        if upto is not None and (
            fault := _fault_at_end(upto, text[:stop], start, last_words(messages[index], ()), headers)
        ):
            return f"messages[{index}]: {fault}"
    return None


def last_words(message: Message, separators: Sequence[str]) -> str:
    """What the rendered turn must hold of a message: its text behind the last of `separators` and of "</think>"."""
    content = message.get("content")
    if isinstance(content, list):
        content = content[-1].get("text") if content and isinstance(content[-1], dict) else None
    if not isinstance(content, str):
        return ""
    for separator in ("</think>", *separators):
        content = content.rpartition(separator)[2]
    return content.strip()


def _fault_at_end(upto: str, ours: str, start: int, words: str, headers: Headers) -> str | None:
    """True if a span ends where the conversation up to its turn ends.

    `upto` is that conversation alone, `ours` the whole one as far as the end of the span.
    """
    if upto.startswith(ours):
        rest = upto[len(ours) :].strip()
        while rest and headers.stop_of(rest):  # as Phi 3 ends the whole conversation with another token
            rest = _without_stop(rest, headers).rstrip()
        return f"the marks leave out {rest[:40]!r} at the end of the answer" if rest else None
    # The template writes this turn otherwise once others follow; its end must still be the same words.
    answer, other = _without_stop(ours[start:], headers), _without_stop(upto, headers)
    if other.endswith(answer) or (words and other.endswith(words) and answer.endswith(words)):
        return None
    return "the text of the answer is not what the conversation up to it ends with"


def _without_stop(text: str, headers: Headers) -> str:
    text = text.rstrip()
    ends = [length for length in headers.lengths if text[-length:] in headers.control]
    return text[: -max(ends)] if ends else text


def common_prefix(one: str, other: str) -> int:
    """The number of characters that two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low
