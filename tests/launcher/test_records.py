"""Records: what they are made of, and how their values are named."""

from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest

from data_prep.config import SourceConfig
from data_prep.errors import BadDataError
from data_prep.sources.records import WHOLE_FILE, Record, SourceFile, Span, checked_text, kind


def test_records_and_files_travel_to_workers() -> None:
    source = SourceFile("a", "a", "jsonl", "none", SourceConfig(path="a"), 5, 6, "ab", (Span(0, 5, 1), WHOLE_FILE))
    for value in (Record({"text": "a"}, "a:1", 1), source):
        assert ForkingPickler.loads(ForkingPickler.dumps(value)) == value


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "null"), (True, "a boolean"), (1, "a number"), (0.5, "a number"), ([], "a list"), ({}, "an object")],
)
def test_what_is_no_text_is_named(value: Any, words: str) -> None:
    assert kind(value) == words
    with pytest.raises(BadDataError, match=rf"^a\.jsonl:7: field 'text' must be text, not {words}$"):
        checked_text(value, "field 'text'", "a.jsonl:7")


def test_texts_are_what_utf8_can_hold() -> None:
    for text in ("", "a", "漢\U0001f600\0"):
        assert checked_text(text, "field 'text'", "a.jsonl:7") is text
    with pytest.raises(BadDataError, match=r"^a\.jsonl:7: field 'text' holds half of a surrogate pair at character 2$"):
        checked_text("é \ud83d", "field 'text'", "a.jsonl:7")
