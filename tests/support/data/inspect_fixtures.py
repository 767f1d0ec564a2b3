"""A store with hostile text and names, and a page taken apart: what the tests of inspect share."""

import re
from html.parser import HTMLParser
from pathlib import Path

import tokenizers
from store_fixtures import SourceDocuments, make_store

from data_prep.rows.arrange import RowPlan
from data_prep.tokenizer.tokenizer import Tokenizer

HOSTILE = (
    "\x1b[2J\x1b]0;title\x07<script>alert('x')</script>\" onload=\"y\u202eabc\u2066 \x9b31m &amp; \u27e6z\u27e7 \r end"
)
COLOR = re.compile(r"\x1b\[[0-9;]*m")


def answered(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[bool]]:
    """A document with a trained answer and end of text."""
    first, second = tokenizer.encode_batch([prompt, answer])
    assert tokenizer.eos_id is not None
    return [*first, *second, tokenizer.eos_id], [False] * len(first) + [True] * (len(second) + 1)


def chat_store(folder: Path, tokenizer: Tokenizer) -> Path:
    """Two rows of three documents from two sources, one with a name that would colour a terminal."""
    first = [answered(tokenizer, "the river", " 漢字 runs"), answered(tokenizer, HOSTILE, HOSTILE)]
    second = [answered(tokenizer, "under\n\n  the\t", "bridge")]
    sources = [SourceDocuments("one", first, dropped={"no answer": 3}), SourceDocuments("two<i>\x1b[1m", second)]
    plan = RowPlan(sum(len(ids) for ids, _ in first), "best_fit", "error")
    make_store(folder, sources, plan, tokenizer=backend(tokenizer), vocab_size=tokenizer.vocab_size)
    return folder


def backend(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer.files(None)["tokenizer.json"])


class Page(HTMLParser):
    """Elements, attributes and text of a page; the parser itself complains of nothing, so borders are counted."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.trained = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "mark" in self.open:
            self.trained += data
