"""The page about a store stands alone, and whatever is in the data stays text."""

import re
from pathlib import Path

import pytest
from data_fixtures import byte_level_folder
from inspect_fixtures import COLOR, Page, backend, chat_store
from store_fixtures import SourceDocuments, make_store

from data_prep.errors import CannotWriteError
from data_prep.inspect.page import render_page, write_page
from data_prep.inspect.rows import Selection
from data_prep.inspect.terminal import describe
from data_prep.inspect.token_text import clean
from data_prep.rows.arrange import RowPlan
from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_tokenizer(str(byte_level_folder(tmp_path_factory.mktemp("byte_level"))))


def test_page_stands_alone_and_user_text_stays_text(tmp_path: Path, byte_level: Tokenizer) -> None:
    path = chat_store(tmp_path / "store", byte_level)
    write_page(path, tmp_path / "page.html", Selection(count=20))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert not {"script", "link", "img", "iframe", "object"} & set(page.elements)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert not re.search(r"https?:|url\(|@import", text)
    assert "<script>alert('x')</script>\" onload=\"y<U+202E>abc" in page.text
    assert page.trained.count("<script>") == 1 and " 漢字 runs<|end|>" in page.trained
    assert {"svg", "table", "details"} <= set(page.elements)
    assert "two<i>␛[1m.jsonl:3" in page.text
    assert "unusable: 3 no answer: one 3" in page.text
    assert [entry.name for entry in tmp_path.iterdir() if "page" in entry.name] == ["page.html"]


def test_control_tokens_with_hostile_names_stay_text(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>\x1b[31m"
    tokenizer = open_tokenizer(str(byte_level_folder(tmp_path / "in", extra=(name,))))
    index = next(iter(tokenizer.control_ids - {tokenizer.bos_id, tokenizer.eos_id}))
    source = SourceDocuments("text", [([5, index, index], [True] * 3)])
    plan = RowPlan(4)
    make_store(tmp_path / "s", [source], plan, tokenizer=backend(tokenizer), vocab_size=tokenizer.vocab_size)
    page = Page(render_page(tmp_path / "s", Selection()))
    assert "img" not in page.elements and not page.open
    assert page.trained.count(clean(name)) == 2
    for color in (False, True):
        text = "\n".join(describe(tmp_path / "s", None, color))
        assert "\x1b" not in COLOR.sub("", text) and "\x1b[31m" not in text and text.count("<img src=x") == 3


def test_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, byte_level: Tokenizer) -> None:
    path = chat_store(tmp_path / "store", byte_level)
    with pytest.raises(CannotWriteError, match="--html"):
        write_page(path, tmp_path / "nowhere" / "page.html", Selection())
    (tmp_path / "page.html").mkdir()
    (tmp_path / "page.html" / "kept").touch()
    with pytest.raises(CannotWriteError, match="--html"):
        write_page(path, tmp_path / "page.html", Selection())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["page.html", "store"]
