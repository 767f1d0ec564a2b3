"""What the files beside a vocabulary say is followed and kept: tokens they name, tokens around a text, every other key."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from data_fixtures import byte_level_folder, sentencepiece_folder
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.tokenizer.open import open_tokenizer

IMAGE = {"content": "<image>", "lstrip": False, "rstrip": True, "normalized": False, "single_word": False}


def folder_with(folder: Path, **config: Any) -> Path:
    byte_level_folder(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"extra_special_tokens": {"image_token": "<image>"}},
        {"extra_special_tokens": {"image_token": "<image>"}, "image_token": "<image>"},
        {"extra_special_tokens": {"image_token": IMAGE}},
        {"extra_special_tokens": ["<image>"]},
        {"extra_special_tokens": [IMAGE]},
        {"additional_special_tokens": ["<image>"]},
        {"additional_special_tokens": [{"__type": "AddedToken", **IMAGE}], "extra_special_tokens": {}},
        {"image_token": "<image>"},
        {"image_token": IMAGE},
        {"model_specific_special_tokens": {"image_token": "<image>"}},
        {"added_tokens_decoder": {"484": {**IMAGE, "special": True}}},
        {"mask_token": "<image>"},
    ],
)
def test_every_form_names_the_token_and_no_name_becomes_one(tmp_path: Path, config: dict[str, Any]) -> None:
    plain = open_tokenizer(str(folder_with(tmp_path / "plain")))
    named = open_tokenizer(str(folder_with(tmp_path / "named", **config)))
    assert named.vocab_size == plain.vocab_size + 1
    assert named.control_strings == (*plain.control_strings, "<image>")
    text = "what is an image_token, or a content, lstrip or __type"
    assert named.encode_batch([text]) == plain.encode_batch([text])
    named.save(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.convert_tokens_to_ids("<image>") == plain.vocab_size == saved("<image>")["input_ids"][-1]
    if "__type" in str(config) or "lstrip" not in str(config):  # else transformers cannot read the base
        theirs = AutoTokenizer.from_pretrained(tmp_path / "named")
        assert saved("an <image> here")["input_ids"] == theirs("an <image> here")["input_ids"]
        assert saved.all_special_tokens == theirs.all_special_tokens


def test_tokens_that_only_older_files_name(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "base")
    size = open_tokenizer(str(folder)).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<b>": size + 1, "<a>": size}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<b>"]}))
    tokenizer = open_tokenizer(str(folder))
    assert tokenizer.plain_added_strings == ("<a>",)
    assert "<b>" in tokenizer.control_strings
    assert tokenizer.decode([size, size + 1]) == "<a><b>"


def test_every_key_and_file_is_kept_and_the_new_forms_get_the_old_ones(tmp_path: Path) -> None:
    other = {"padding_side": "left", "model_max_length": 77, "mine": {"deep": [None, 1]}, "truncation_side": "left"}
    templates = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    folder = folder_with(
        tmp_path / "base", tokenizer_class="TokenizersBackend", extra_special_tokens=["<x>"], chat_template=templates,
        auto_map={"AutoTokenizer": ["x.X", None]}, **other,
    )  # fmt: skip
    (folder / "vocab.txt").write_text("kept")
    (folder / "tokenizer.model").write_bytes(b"\xff\x00")
    (folder / "code.py").write_text("raise SystemExit")
    tokenizer = open_tokenizer(str(folder))
    assert tokenizer.notes == ("tokenizer: its own code (auto_map) is never run, and does not travel",)
    tokenizer.save(tmp_path / "saved", "{{ 3 }}")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved.items() >= other.items()
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert saved["additional_special_tokens"] == ["<x>"]
    assert {"extra_special_tokens", "auto_map"}.isdisjoint(saved)
    assert saved["chat_template"] == [{"name": "default", "template": "{{ 3 }}"}, templates[1]]
    assert (tmp_path / "saved" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ 2 }}"
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == b"\xff\x00"
    assert not (tmp_path / "saved" / "code.py").exists()


@pytest.mark.parametrize("kind", ["byte", "unigram"])
def test_truncation_and_padding_are_kept_and_act_on_no_encoding(tmp_path: Path, kind: str) -> None:
    folder = byte_level_folder(tmp_path / "base")
    if kind == "unigram":
        open_tokenizer(str(sentencepiece_folder(tmp_path / "model", "unigram"))).save(folder)
    path = folder / "tokenizer.json"
    limited = tokenizers.Tokenizer.from_file(str(path))
    limited.enable_truncation(3)
    limited.enable_padding(length=5, pad_id=1, pad_token="x")
    limited.save(str(path))
    tokenizer = open_tokenizer(str(folder))
    assert len(tokenizer.encode_batch(["one two three four five six seven"])[0]) > 5
    tokenizer.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert saved == json.loads(path.read_text())
    assert saved["truncation"]["max_length"] == 3


BOS, EOS = "<|begin|>", "<|end|>"


@pytest.mark.parametrize(
    ("config", "in_file", "expected", "said"),
    [
        # A class of transformers 4 that makes the post-processor anew; the file has none to follow.
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}, None, [BOS], "no post-processor"),
        ({"tokenizer_class": "LlamaTokenizer"}, None, [BOS], "no post-processor"),
        ({"tokenizer_class": "GemmaTokenizerFast", "add_eos_token": True}, None, [BOS, EOS], "no post-processor"),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, None, [], None),
        ({"tokenizer_class": "GPTNeoXTokenizerFast", "add_bos_token": True}, None, [BOS], "no post-processor"),
        # The file's post-processor rules where versions differ.
        ({"tokenizer_class": "LlamaTokenizerFast", "add_eos_token": True}, [BOS], [BOS], "transformers 4 would follow"),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, [BOS], [BOS], "transformers 4 would follow"),
        ({"tokenizer_class": "LlamaTokenizerFast"}, [BOS], [BOS], None),
        ({"tokenizer_class": "GPTNeoXTokenizerFast"}, [BOS], [BOS], "transformers 4 would follow"),
        # No version looks at the setting.
        ({"add_bos_token": True}, None, [], "makes no use of"),
        ({"add_eos_token": True}, [BOS], [BOS], "makes no use of"),
        ({"add_bos_token": True, "add_eos_token": False}, [BOS], [BOS], None),
        ({}, [BOS], [BOS], None),
    ],
)  # fmt: skip
def test_tokens_around_a_text(
    tmp_path: Path, config: dict[str, Any], in_file: list[str] | None, expected: list[str], said: str | None
) -> None:
    folder = byte_level_folder(tmp_path / "base", add_bos=in_file is not None)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    whole = json.loads((folder / "tokenizer.json").read_text())
    if in_file is None:
        whole["post_processor"] = None
        (folder / "tokenizer.json").write_text(json.dumps(whole))
    tokenizer = open_tokenizer(str(folder))
    assert [tokenizer.decode([index]) for index in (*tokenizer.prefix_ids, *tokenizer.suffix_ids)] == expected
    assert len(tokenizer.notes) == (said is not None)
    assert said is None or said in tokenizer.notes[0]
    tokenizer.save(tmp_path / "saved")
    again = open_tokenizer(str(tmp_path / "saved"))
    assert (again.prefix_ids, again.suffix_ids) == (tokenizer.prefix_ids, tokenizer.suffix_ids)
    assert again.notes == ()  # what was decided is written down: every version reads the same
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")("river")["input_ids"]
    assert theirs == [*tokenizer.prefix_ids, *tokenizer.encode_batch(["river"])[0], *tokenizer.suffix_ids]


@pytest.mark.parametrize(
    ("config", "expected"), [({"add_bos_token": True}, [BOS]), ({"add_eos_token": True}, [EOS]), ({}, [])]
)
def test_settings_are_followed_where_vocabulary_and_merges_are_all_there_is(
    tmp_path: Path, config: dict[str, Any], expected: list[str]
) -> None:
    whole = json.loads((byte_level_folder(tmp_path / "base") / "tokenizer.json").read_text())
    folder = tmp_path / "pair"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(map(" ".join, whole["model"]["merges"])))
    names = {"tokenizer_class": "GPT2Tokenizer", "bos_token": BOS, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
    tokenizer = open_tokenizer(str(folder))
    assert [tokenizer.decode([index]) for index in (*tokenizer.prefix_ids, *tokenizer.suffix_ids)] == expected
