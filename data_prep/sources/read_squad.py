"""SQuAD: articles of paragraphs of questions, one record a question."""

from collections.abc import Iterator
from typing import Any

from data_prep.errors import BadDataError
from data_prep.sources.records import Record, kind


def questions(article: Record) -> Iterator[Record]:
    """Records {"id", "question", "context", "title", "answers": {"text": [...], "answer_start": [...]}}.

    An impossible question has no answers. `line` is the number of the article. Raises BadDataError.
    """
    where = article.where.replace(": item ", ": article ")
    title = article.value.get("title", "")
    for index, paragraph in enumerate(_list(article.value, "paragraphs", where)):
        place = f"{where}, paragraph {index + 1}"
        context = _text(_object(paragraph, place), "context", place)
        for number, question in enumerate(_list(paragraph, "qas", place)):
            asked = f"{place}, question {number + 1}"
            value = {
                "id": _object(question, asked).get("id"),
                "question": _text(question, "question", asked),
                "context": context,
                "title": title,
                "answers": _answers(question, asked),
            }
            yield Record(value, asked, article.line)


def _answers(question: dict[str, Any], where: str) -> dict[str, list[Any]]:
    if question.get("is_impossible") is True:
        return {"text": [], "answer_start": []}
    answers = [_object(answer, where) for answer in _list(question, "answers", where)]
    starts = [answer.get("answer_start") for answer in answers]
    for start in starts:
        if not isinstance(start, int) or isinstance(start, bool):
            raise BadDataError(f"{where}: answer_start must be a whole number, not {kind(start)}")
    return {"text": [_text(answer, "text", where) for answer in answers], "answer_start": starts}


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadDataError(f"{where}: must be an object, not {kind(value)}")
    return value


def _list(value: dict[str, Any], name: str, where: str) -> list[Any]:
    found = _field(value, name, where)
    if not isinstance(found, list):
        raise BadDataError(f"{where}: field {name!r} must be a list, not {kind(found)}")
    return found


def _text(value: dict[str, Any], name: str, where: str) -> str:
    found = _field(value, name, where)
    if not isinstance(found, str):
        raise BadDataError(f"{where}: field {name!r} must be text, not {kind(found)}")
    return found


def _field(value: dict[str, Any], name: str, where: str) -> Any:
    if name not in value:
        raise BadDataError(f"{where}: field {name!r} is missing")
    return value[name]
