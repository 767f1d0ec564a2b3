"""What a record means, whatever form it came in: one type for each kind of example."""

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]  # role, content and whatever else the chat template may read (tool_calls, name ...)


@dataclass(frozen=True, slots=True)
class TextExample:
    """Plain text: every token is trained."""

    text: str


@dataclass(frozen=True, slots=True)
class PromptExample:
    """An answer to a prompt. Also a translation pair (source, target)."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation for the chat template.

    `trained` marks turns as (not) trained by the record itself; None leaves it to the settings.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    trained: tuple[bool | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """A text, or a pair of texts, with its labels (one, or several where a text may have many)."""

    text: str
    labels: tuple[str, ...]
    pair: str | None = None
    many: bool = False


@dataclass(frozen=True, slots=True)
class ScoredExample:
    """A text, or a pair of texts, with a number."""

    text: str
    score: float
    pair: str | None = None


@dataclass(frozen=True, slots=True)
class TaggedExample:
    """Words and one tag each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RolesExample(TaggedExample):
    """Words and the role that each has for one predicate, which are the words with these numbers, if any."""

    predicate: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class QuestionExample:
    """A question about a context; answers are (first character, text) in it, none for unanswerable ones.

    `num_moved`: how many of them were found elsewhere than the record says.
    """

    question: str
    context: str
    answers: tuple[tuple[int, str], ...]
    num_moved: int = 0


Example = TextExample | PromptExample | ChatExample | LabelledExample | ScoredExample | TaggedExample | QuestionExample
