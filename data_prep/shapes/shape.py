"""The shape of records, and what records of each shape mean as examples."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.config import ShapeName
from data_prep.errors import BadDataError
from data_prep.shapes.chat import chat_from_turns, chat_from_two_lists
from data_prep.shapes.examples import (
    Example,
    LabelledExample,
    PromptExample,
    QuestionExample,
    RolesExample,
    ScoredExample,
    TaggedExample,
    TextExample,
)
from data_prep.shapes.fields import required_field, shown, text_at
from data_prep.shapes.label_names import LabelNames
from data_prep.shapes.prompts import alpaca, as_chat, parallel_pair, prompt_pair
from data_prep.shapes.roles import TurnForm
from data_prep.sources.records import Record, checked_text, kind


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of every record of a source. `fields`: our name -> the name in the records, dotted where nested."""

    name: ShapeName
    fields: Mapping[str, str] = field(hash=False)
    many: bool = False  # label: each record has a list of them
    refused: tuple[str, ...] = ()  # alpaca: fields that no first record had, but that would change its reading
    turns: TurnForm = field(default_factory=TurnForm)  # where records hold turns
    two_lists: bool = False  # prompt: prompt and response are lists of turns
    as_chat: bool = False  # a prompt and its response are a conversation of two turns
    has_tools: bool = field(default=False, compare=False)  # some of the first records declare tools
    flagged: bool = field(default=False, compare=False)  # some of the first records have training flags
    summary: str = field(default="", compare=False)
    labels: LabelNames | None = None  # label, tags: what the labels in the records are called

    @property
    def has_turns(self) -> bool:
        """True if its records hold lists of turns."""
        return self.two_lists or self.name in ("messages", "sharegpt")

    @property
    def gives_chats(self) -> bool:
        """True if its records may be conversations, which need a chat template."""
        return self.has_turns or self.as_chat or bool({"system", "history"} & set(self.fields))

    def describe(self) -> str:
        """A line for people: what the records were taken for."""
        return f"{self.name}: {self.summary}"

    def key(self) -> dict[str, Any]:
        """The parts that change the examples, as JSON values; part of a store's content key."""
        named = {} if self.labels is None else self.labels.key()
        # Stores made before training flags and the nulls of tables were understood have not this entry: they are not
        # found again where it could matter.
        flags = {"flags": True} if self.has_turns or self.flagged else {}
        return {"name": self.name, "fields": dict(sorted(self.fields.items())), "many": self.many, **named, **flags}


def to_example(shape: Shape, record: Record) -> Example:
    """The example that a record means. Raises BadDataError naming file:line and the place in the record."""
    example = _example(shape, record)
    return as_chat(example, record.where) if shape.as_chat and isinstance(example, PromptExample) else example


def says_untrained(shape: Shape, record: Record) -> bool:
    """True if a record that holds no turns says itself that it is not trained. Raises BadDataError."""
    flags = shape.turns.flags
    if shape.has_turns or record.value.keys().isdisjoint(flags.heads):
        return False
    return flags.of_a_record(record.value, 0, record.where) is False


def _example(shape: Shape, record: Record) -> Example:
    fields = shape.fields
    match shape.name:
        case "messages":
            return chat_from_turns(record, fields, fields["messages"], shape.turns)
        case "text":
            text = record.value.get(fields["text"]) if record.sound else None
            return TextExample(text if type(text) is str else text_at(record.value, fields["text"], record.where))
        case "prompt":
            return chat_from_two_lists(record, fields, shape.turns) if shape.two_lists else prompt_pair(record, fields)
        case "sharegpt":
            return chat_from_turns(record, fields, fields["conversations"], shape.turns)
        case "alpaca":
            return alpaca(record, fields, shape.refused)
        case "parallel":
            return parallel_pair(record, fields)
        case "label":
            return _named(labelled(record, fields, shape.many), shape, record)
        case "score":
            return scored(record, fields)
        case "tags":
            return _named(tagged(record, fields), shape, record)
        case "roles":
            return _named(with_roles(record, fields), shape, record)
        case "question":
            return questioned(record, fields)


def _named(example: Example, shape: Shape, record: Record) -> Example:
    return example if shape.labels is None else shape.labels.name_example(example, record.where)


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LARGEST_SCORE = 3.4e38
_NUMBER_CHARACTERS = 64


def number_of(value: Any) -> float | None:
    """The finite number that a value is or, as in CSV, that its text says; None for anything else."""
    if isinstance(value, str):
        if len(value) > _NUMBER_CHARACTERS or not _NUMBER.fullmatch(value.strip(" ")):
            return None
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def labelled(record: Record, fields: Mapping[str, str], many: bool) -> LabelledExample:
    """A text or pair with its label; with `many`, with a list of labels, which may be empty. Raises BadDataError."""
    name, where = fields["label"], record.where
    value, what = required_field(record.value, name, where), f"field {shown(name)!r}"
    if many != isinstance(value, list):
        wanted = "a list of labels, as" if many else "one label, as"
        raise BadDataError(
            f"{where}: {what} must be {wanted} in the first records of this source, not {kind(value)}", "wrong_type"
        )
    if many:
        labels = tuple(_label(item, f"{what}[{index}]", where) for index, item in enumerate(value))
    else:
        labels = (_label(value, what, where),)
    return LabelledExample(text_at(record.value, fields["text"], where), labels, _pair(record, fields), many)


def _label(value: Any, what: str, where: str) -> str:
    """The name of a label: text as it is; whole numbers and booleans as JSON writes them."""
    if isinstance(value, bool | int):
        return _written(value, what, where)
    if isinstance(value, float):
        if not value.is_integer():
            raise BadDataError(f"{where}: {what} is {value}, not a whole number; for regression write `shape: score`")
        return _written(int(value), what, where)  # tables with gaps hold whole numbers as floats
    if not checked_text(value, what, where):
        raise BadDataError(f"{where}: {what} is empty", "empty_label")
    return str(value)


def _written(value: int, what: str, where: str) -> str:
    try:
        return json.dumps(value)
    except ValueError:  # Python refuses to write numbers of thousands of digits
        raise BadDataError(f"{where}: {what} is too long a number") from None


def _pair(record: Record, fields: Mapping[str, str]) -> str | None:
    return text_at(record.value, fields["pair"], record.where) if "pair" in fields else None


def scored(record: Record, fields: Mapping[str, str]) -> ScoredExample:
    """A text or pair with a number. Raises BadDataError."""
    name, where = fields["score"], record.where
    value = required_field(record.value, name, where)
    number = number_of(value)
    if number is None:
        raise BadDataError(f"{where}: field {shown(name)!r} must be a finite number, not {_said(value)}")
    if abs(number) > _LARGEST_SCORE:
        raise BadDataError(f"{where}: field {shown(name)!r} is {number:g}, which is too large for a score in fp32")
    return ScoredExample(text_at(record.value, fields["text"], where), number, _pair(record, fields))


def _said(value: Any) -> str:
    return f"the text {shown(value)!r}" if isinstance(value, str) else kind(value)


def tagged(record: Record, fields: Mapping[str, str], ours: str = "tags") -> TaggedExample:
    """Words and as many tags (our field `ours`), each a list or one text with blanks between them.

    Raises BadDataError.
    """
    words_name, tags_name, where = fields["words"], fields[ours], record.where
    words_value = _items(required_field(record.value, words_name, where), words_name, where)
    tags_value = _items(required_field(record.value, tags_name, where), tags_name, where)
    words = tuple(
        word if type(word) is str and word.isascii() and word else _word(record, words_name, index, word)
        for index, word in enumerate(words_value)
    )
    tags = tuple(
        tag if type(tag) is str and tag.isascii() and tag else _tag(record, tags_name, index, tag)
        for index, tag in enumerate(tags_value)
    )
    if len(words) != len(tags):
        raise BadDataError(
            f"{where}: {len(words)} words in field {shown(words_name)!r},"
            f" but {len(tags)} tags in field {shown(tags_name)!r}",
            "unequal_lengths",
        )
    return TaggedExample(words, tags)


def with_roles(record: Record, fields: Mapping[str, str]) -> RolesExample:
    """Words, as many roles, and the numbers from 0 of the words of the predicate, a number or a list of them.

    Raises BadDataError.
    """
    name, where = fields["predicate"], record.where
    found = tagged(record, fields, "roles")
    value = required_field(record.value, name, where)
    numbers = value if isinstance(value, list) else [value]
    for number in numbers:
        if type(number) is not int or not 0 <= number < len(found.words):
            wanted = f"the number of a word, 0 to {len(found.words) - 1}, or a list of such numbers"
            said = str(number) if type(number) is int else _said(number)
            raise BadDataError(f"{where}: field {shown(name)!r} must be {wanted}, not {said}", "wrong_predicate")
    return RolesExample(found.words, found.tags, tuple(sorted(set(numbers))))


def _word(record: Record, name: str, index: int, word: Any) -> str:
    where, what = record.place(index), f"field {shown(name)!r}[{index}]"
    if not checked_text(word, what, where):
        raise BadDataError(f"{where}: {what} is an empty word", "empty_word")
    return str(word)


def _tag(record: Record, name: str, index: int, tag: Any) -> str:
    return _label(tag, f"field {shown(name)!r}[{index}]", record.place(index))


def _items(value: Any, name: str, where: str) -> list[Any]:
    # Only the blank separates: other white space (U+3000 in Chinese text) can be a word.
    items = value.split(" ") if isinstance(value, str) and value else value
    if not isinstance(items, list) or not items:
        state = "empty" if value in ("", []) else kind(value)
        fault = f"{where}: field {shown(name)!r} must be a list, or text with blanks between, not {state}"
        raise BadDataError(fault, "empty_field" if state == "empty" else "wrong_type")
    return items


def questioned(record: Record, fields: Mapping[str, str]) -> QuestionExample:
    """A question, its context, and where in it the answers stand.

    Answers are a list of ``{"text", "answer_start"}`` or SQuAD's object of two lists; an empty list means
    that there is none. Starts count characters. An answer that does not stand at its start is looked for:
    the occurrence nearest to that start is taken (the earlier of two equally near) and counted in
    `num_moved`; without any the record is wrong. Raises BadDataError.
    """
    value, where = record.value, record.where
    question = text_at(value, fields["question"], where)
    context = text_at(value, fields["context"], where)
    name = fields["answers"]
    what, found, moved = f"field {shown(name)!r}", [], 0
    for index, (text, start) in enumerate(_answers(required_field(value, name, where), what, where)):
        answer = checked_text(text, f"{what}[{index}].text", where)
        if not answer:
            raise BadDataError(f"{where}: {what}[{index}].text is empty; a question without answer has an empty list")
        if isinstance(start, bool) or not isinstance(start, int):
            raise BadDataError(f"{where}: {what}[{index}].answer_start must be a whole number, not {kind(start)}")
        place = _nearest(context, answer, start)
        if place < 0:
            raise BadDataError(
                f"{where}: {what}[{index}].text {shown(answer)!r} does not stand in the context", "answer_not_found"
            )
        found.append((place, answer))
        moved += place != start
    return QuestionExample(question, context, tuple(found), moved)


def _answers(value: Any, what: str, where: str) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise BadDataError(f"{where}: {what} must hold lists `text` and `answer_start` of equal length")
        return list(zip(texts, starts, strict=True))
    if not isinstance(value, list):
        raise BadDataError(f"{where}: {what} must be a list of answers, not {kind(value)}")
    for index, answer in enumerate(value):
        if not isinstance(answer, dict):
            raise BadDataError(f"{where}: {what}[{index}] must be an object, not {kind(answer)}")
        if missing := [name for name in ("text", "answer_start") if answer.get(name) is None]:
            raise BadDataError(f"{where}: {what}[{index}] lacks {missing[0]!r}")
    return [(answer["text"], answer["answer_start"]) for answer in value]


def _nearest(context: str, answer: str, start: int) -> int:
    """Where `answer` stands in `context`, as near to `start` as it does; -1 if it stands nowhere."""
    if start >= 0 and context.startswith(answer, start):
        return start
    start = min(max(start, 0), len(context))
    before = context.rfind(answer, 0, max(start + len(answer) - 1, 0))
    after = context.find(answer, start)
    if before < 0 or after < 0:
        return max(before, after)
    return before if start - before <= after - start else after
