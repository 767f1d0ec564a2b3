"""Ids and trained tokens of conversations are those of transformers, with the templates of real models."""

import json
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from chat_templates import control_strings, trl_cases, trl_templates
from data_fixtures import SAMPLES, byte_level_folder, prepared, section, sentences, write_jsonl
from transformers import AutoTokenizer

from data_prep.chat.format import ChatFormat
from data_prep.config import ChatConfig
from data_prep.encode.blocks import Block, Names, marks_of
from data_prep.encode.content import Context
from data_prep.errors import BadDataError
from data_prep.shapes.examples import ChatExample
from data_prep.sources.records import Record
from data_prep.tasks import causal_lm
from data_prep.tokenizer.backends import GigatokenBackend, TokenizersBackend
from data_prep.tokenizer.open import open_tokenizer

TEMPLATES = trl_templates()
_EACH = 24  # conversations a template; all templates together see all of them
_AWKWARD = (
    "  blanks around \n",
    "two\n\nlines\n",
    "é漢\U0001f600",
    "{{ 7 * 7 }}",
    "<p>User: x</p>",
    "C",
    "a\u0301\u200b ",
)

pytestmark = pytest.mark.skipif(not TEMPLATES, reason="needs TRL's chat templates")


@cache
def conversations() -> list[list[dict[str, str]]]:
    """Two hundred: real questions and answers where the samples are, sentences, and awkward texts."""
    texts = sentences(300, 7, longest_words=12)
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    pairs += [(one, other) for one in _AWKWARD for other in _AWKWARD]
    path = SAMPLES / "generation/gsm8k/train.jsonl"
    if path.exists():
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:200]]
        pairs += [(record["question"], record["answer"]) for record in records]
    made = []
    for number in range(200):
        turns = [pairs[(7 * number + 11 * turn) % len(pairs)] for turn in range(1 + number % 3)]
        system = [{"role": "system", "content": texts[number]}] if number % 4 == 0 else []
        roles = ("user", "assistant")
        made.append(
            [
                *system,
                *({"role": role, "content": text} for pair in turns for role, text in zip(roles, pair, strict=True)),
            ]
        )
    return made


def tokenizer_for(template: str, folder: Path) -> Path:
    """A byte-level tokenizer with the template's special tokens; its offsets cover blanks, as those of real ones do."""
    own = [text for text in control_strings(template) if text not in ("<|begin|>", "<|end|>")]
    made = byte_level_folder(folder, template, extra=tuple(own))
    pipeline = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))
    pipeline["post_processor"]["trim_offsets"] = False
    (made / "tokenizer.json").write_text(json.dumps(pipeline), encoding="utf-8")
    return made


def documents(block: Block) -> list[tuple[list[int], list[int]]]:
    ends = np.cumsum(block.columns["lengths"])[:-1]
    ids, marks = (np.split(values, ends) for values in (block.columns["input_ids"], marks_of(block.columns)))
    return [(one.tolist(), other.tolist()) for one, other in zip(ids, marks, strict=True)]


@pytest.mark.parametrize("path", trl_cases())
def test_ids_and_marks_are_those_of_transformers(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    template = path.read_text(encoding="utf-8")
    has_blocks = "{% generation" in template or "{%- generation" in template
    folder = tokenizer_for(template, tmp_path / "t")
    tokenizer, saved = open_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    settings = ChatConfig(allow_untrained_stop=True)
    now = datetime.now()  # transformers' clock cannot be set
    chat = ChatFormat(template, tokenizer.special_tokens, tokenizer.control_strings, now, settings)
    backends = TokenizersBackend(tokenizer), GigatokenBackend(tokenizer)
    first = TEMPLATES.index(path) * _EACH
    compared = trained = 0
    for number in range(first, first + _EACH):
        turns: list[dict[str, Any]] = list(conversations()[number % len(conversations())])
        shown = turns
        if "text" not in chat.plan.contents:
            shown = [dict(turn, content=[{"type": "text", "text": turn["content"]}]) for turn in turns]
        asked: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": has_blocks}
        try:
            theirs = saved.apply_chat_template(shown, **asked)
        except jinja2.TemplateError:
            theirs = None  # a template without system turns
        for backend in backends:
            context = Context(tokenizer, backend, chat, Names(), allow_untrained_stop=True)
            record = Record({}, "a.jsonl:1", 1)
            if theirs is None:
                with pytest.raises(BadDataError, match=r"a\.jsonl:1: "):
                    causal_lm.encode([record], [ChatExample(turns)], context)
                continue
            ((ids, marks),) = documents(causal_lm.encode([record], [ChatExample(turns)], context))
            assert ids == theirs["input_ids"]
            assert any(marks)
            if has_blocks:
                assert marks == [0, *theirs["assistant_masks"][1:]]
                trained += sum(marks)
            compared += 1
    assert compared >= _EACH and (trained > 0) == has_blocks


@pytest.mark.parametrize("backend", ["tokenizers", "gigatoken"])
def test_all_of_them_through_the_whole_preparation(backend: str, tmp_path: Path) -> None:
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
    template = next(path for path in TEMPLATES if path.stem == "qwen2_5_training").read_text(encoding="utf-8")
    folder = tokenizer_for(template, tmp_path / "t")
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns} for turns in conversations()])
    store, _ = prepared(section(tmp_path, folder, path, row_tokens=4096, backend=backend))
    saved = AutoTokenizer.from_pretrained(store.tokenizer_dir)
    assert store.num_documents == len(conversations()) == 200
    for document, turns in enumerate(conversations()):
        theirs = saved.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        assert store.tokens(document).tolist() == theirs["input_ids"]
        assert store.targets(document).tolist() == [bool(mark) for mark in theirs["assistant_masks"]]
