"""Prompts and their answers: plain pairs, Alpaca records and translations, and their form as a conversation."""

from collections.abc import Iterable, Mapping, Sequence

from data_prep.errors import BadDataError
from data_prep.shapes.examples import ChatExample, Message, PromptExample
from data_prep.shapes.fields import lookup, required_field, shown, text_at
from data_prep.sources.records import Record, checked_text, kind


def as_chat(pair: PromptExample, where: str) -> ChatExample:
    """A prompt and its response as turns of the user and the assistant, which both say something."""
    for name, text in (("prompt", pair.prompt), ("response", pair.response)):
        if not text or text.isspace():
            fault = f"{where}: the {name} is empty: as a turn of a conversation it must say something"
            raise BadDataError(fault, "empty_turn")
    return ChatExample([{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.response}])


def prompt_pair(record: Record, fields: Mapping[str, str]) -> PromptExample:
    """A prompt and its response. Raises BadDataError."""
    value, where = record.value, record.where
    return PromptExample(text_at(value, fields["prompt"], where), text_at(value, fields["response"], where))


def alpaca(record: Record, fields: Mapping[str, str], refused: Sequence[str]) -> PromptExample | ChatExample:
    """An instruction with an optional input, and its output; a conversation where system or history are mapped.

    `refused` names fields that would have changed this, had one of the first records had them.
    Raises BadDataError.
    """
    value, where = record.value, record.where
    for name in refused:
        if lookup(value, name) not in (None, "", []):
            raise BadDataError(
                f"{where}: field {name!r} is filled here, but in none of the first records of this source;"
                f" map it, or leave it out with an empty name, in `fields:`"
            )
    prompt = text_at(value, fields["instruction"], where)
    answer = text_at(value, fields["output"], where)
    extra = _optional_text(record, fields.get("input"))
    if extra and not extra.isspace():
        prompt = f"{prompt}\n\n{extra}"
    if "system" not in fields and "history" not in fields:
        return PromptExample(prompt, answer)
    system = _optional_text(record, fields.get("system"))
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for question, reply in _history(record, fields.get("history")):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    for message in messages:
        if not message["content"] or message["content"].isspace():
            fault = f"{where}: the conversation of this record has an empty turn of the {message['role']}"
            raise BadDataError(fault, "empty_turn")
    return ChatExample(messages)


def _optional_text(record: Record, name: str | None) -> str:
    found = None if name is None else lookup(record.value, name)
    return "" if name is None or found is None else checked_text(found, f"field {shown(name)!r}", record.where)


def _history(record: Record, name: str | None) -> Iterable[tuple[str, str]]:
    """Earlier turns: a list of [user, assistant]."""
    found = None if name is None else lookup(record.value, name)
    if name is None or found is None or found == "":
        return
    if not isinstance(found, list):
        raise BadDataError(f"{record.where}: field {shown(name)!r} must be a list of turns, not {kind(found)}")
    for index, turn in enumerate(found):
        what = f"field {shown(name)!r}[{index}]"
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadDataError(f"{record.where}: {what} must be a list of two texts, of the user and the assistant")
        yield checked_text(turn[0], f"{what}[0]", record.where), checked_text(turn[1], f"{what}[1]", record.where)


def parallel_pair(record: Record, fields: Mapping[str, str]) -> PromptExample:
    """A source and its target. A source may be a list of sentences, which blanks join; of a list of targets the
    first is taken. Raises BadDataError."""
    return PromptExample(_source(record, fields["source"]), _target(record, fields["target"]))


def _source(record: Record, name: str) -> str:
    found = required_field(record.value, name, record.where)
    if not isinstance(found, list):
        return text_at(record.value, name, record.where)
    what = f"field {shown(name)!r}"
    return " ".join(checked_text(text, f"{what}[{index}]", record.where) for index, text in enumerate(found))


def _target(record: Record, name: str) -> str:
    found = required_field(record.value, name, record.where)
    if not isinstance(found, list):
        return text_at(record.value, name, record.where)
    if not found:
        raise BadDataError(f"{record.where}: field {shown(name)!r} is an empty list")
    return checked_text(found[0], f"field {shown(name)!r}[0]", record.where)
