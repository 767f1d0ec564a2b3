"""An export is the base folder with what training changed: every key and file of a base with all settings turned on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from base_folders import FAMILIES, RENAMED, base_folder, changed, check_export, read, run_of
from data_fixtures import sentences
from safetensors.torch import load_file
from transformers import AutoTokenizer

from launcher.commands.export import export_run


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], tuple[Path, Path]]:
    """For each family and form of its configuration: the base, and its export before step 1."""
    folders = {}
    for family in FAMILIES:
        for older in (True, False) if family in RENAMED else (True,):
            folder = tmp_path_factory.mktemp(family)
            base = base_folder(folder / "base", family, older)
            export_run(run_of(base, folder / "data"), folder / "out", None, False, "float32", 10**9)
            folders[family, older] = base, folder / "out"
    return folders


@pytest.mark.parametrize(
    ("family", "older"), [*((family, True) for family in FAMILIES), *((family, False) for family in RENAMED)]
)
def test_the_difference_is_explained(exported: Any, family: str, older: bool) -> None:
    base, out = exported[family, older]
    check_export(base, out, family, "float32")
    stored, original = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in stored)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_travel_and_code_does_not(exported: Any, family: str) -> None:
    base, out = exported[family, True]
    new = {"README.md", "chat_template.jinja", "additional_chat_templates"}
    kept = {path.name for path in base.iterdir()} - {"modeling_mine.py", "pytorch_model.bin"}
    assert {path.name for path in out.iterdir()} == kept | new
    for name in ("LICENSE", "preprocessor_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert read(out / "special_tokens_map.json") == read(base / "special_tokens_map.json")
    assert read(out / "tokenizer.json") == read(base / "tokenizer.json")
    assert changed(read(base / "tokenizer_config.json"), read(out / "tokenizer_config.json")) == (
        {"model_input_names"} if family in ("bert", "roberta") else set()  # they were trained with token types
    )
    assert (out / "additional_chat_templates" / "tool_use.jinja").is_file()
    before, after = read(base / "generation_config.json"), read(out / "generation_config.json")
    if FAMILIES[family][3] != "causal_lm":
        assert before == after
    else:
        assert changed(before, after) == {"eos_token_id", "_from_model_config"}
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert after["eos_token_id"] == [1, tokenizer.convert_tokens_to_ids("<|im_end|>")]


TEXTS = [*sentences(990), "", " ", "<|im_start|>user", "a <image> here", "don't   stop", "\n\n1234567", "\u4f60\u597d \U0001f600",
         "image_token", "<|begin|>", "x" * 400]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "distilbert"])
def test_the_tokenizer_gives_what_the_base_gives(exported: Any, family: str) -> None:
    """Ids, masks, types, padding and truncation of 1,000 texts and as many pairs."""
    base, out = exported[family, True]
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(base)
    assert type(ours) is type(theirs)
    assert (ours.padding_side, ours.truncation_side, ours.model_max_length) == ("left", "left", 96)
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert len(ours) == len(theirs)
    assert ours.get_chat_template() == theirs.get_chat_template()
    assert ours.chat_template == theirs.chat_template
    options: list[dict[str, Any]] = [{}, {"padding": True, "truncation": True}, {"truncation": True, "max_length": 7}]
    for given in options:
        assert ours(TEXTS, **given).data == theirs(TEXTS, **given).data
        assert ours(TEXTS, TEXTS[::-1], **given).data == theirs(TEXTS, TEXTS[::-1], **given).data


def test_bert_kinds_give_the_token_types_of_training(exported: Any) -> None:
    """The base names no token types, but training uses 1 for the second text of a pair."""
    base, out = exported["bert", True]
    encoded = AutoTokenizer.from_pretrained(out)("the river", "an old stone")
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(base)("the river", "an old stone")
    assert encoded["input_ids"] == AutoTokenizer.from_pretrained(base)("the river", "an old stone")["input_ids"]
    assert 0 < sum(encoded["token_type_ids"]) < len(encoded["input_ids"])
    assert sorted(encoded["token_type_ids"]) == encoded["token_type_ids"]
