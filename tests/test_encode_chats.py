"""Conversations through the whole preparation: ids and trained tokens are those of transformers, template by template."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import byte_level_folder, prepared, section, sentences, write_jsonl
from transformers import AutoTokenizer

_OF_PARTS = ("idefics", "llava", "smolvlm")  # theirs fail on content that is plain text


def real_templates() -> list[Path]:
    """Templates with generation blocks that TRL ships, where it is installed: transformers gives masks for those."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return []
    folder = Path(found.origin).parent / "chat_templates"
    chosen = [path for path in folder.glob("*.jinja") if "generation %}" in path.read_text(encoding="utf-8")]
    return sorted(path for path in chosen if not path.name.startswith(_OF_PARTS))


def conversations(count: int) -> list[list[dict[str, str]]]:
    texts = sentences(4 * count, 7, longest_words=12)
    made = []
    for number in range(count):
        words = texts[4 * number : 4 * number + 4]
        turns = 2 if number % 3 else 4
        made.append([{"role": ("user", "assistant")[n % 2], "content": words[n]} for n in range(turns)])
    return made


@pytest.mark.parametrize("backend", ["tokenizers", "gigatoken"])
@pytest.mark.parametrize("template", real_templates(), ids=lambda path: path.stem)
def test_ids_and_marks_are_those_of_transformers(template: Path, backend: str, tmp_path: Path) -> None:
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
    control = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<end_of_turn>")
    folder = byte_level_folder(tmp_path / "t", template.read_text(encoding="utf-8"), extra=control)
    said = conversations(60)
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns} for turns in said])
    chat: dict[str, Any] = {"allow_untrained_stop": True}  # not every template's stop is a token of this vocabulary
    store, _ = prepared(section(tmp_path, folder, path, row_tokens=4096, backend=backend, chat=chat))
    saved = AutoTokenizer.from_pretrained(store.tokenizer_dir)
    for document, turns in enumerate(said):
        theirs = saved.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        assert store.tokens(document).tolist() == theirs["input_ids"]
        trained, masked = store.targets(document).tolist(), [bool(mark) for mark in theirs["assistant_masks"]]
        # Where a token holds the blank before an answer too, we train it and transformers may not.
        assert all(ours for ours, wanted in zip(trained, masked, strict=True) if wanted)
        assert sum(trained) - sum(masked) <= len(turns) // 2
