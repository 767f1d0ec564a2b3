"""End tokens that the data taught join those of the base, in whichever form it has them."""

import json
from pathlib import Path
from typing import Any

import pytest
from base_folders import base_folder, run_of
from data_fixtures import prepared, section, write_jsonl

from data_prep.tokenizer.open import open_tokenizer
from engine.export.taught import taught_by
from engine.tasks import TASKS
from launcher.commands.export import export_run

CHATS = [
    {"messages": [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": f"how are you {n}"}]}
    for n in range(8)
]
PROMPTS = [{"prompt": f"hello {n}", "response": f"how are you {n}"} for n in range(8)]
TEXTS = [{"text": f"the river runs {n}"} for n in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base") / "llama", "llama", older=True)


@pytest.mark.parametrize(
    ("records", "chat", "names"),
    [
        (CHATS, {}, ["<|im_end|>"]),
        (CHATS, {"train_on_prompt": True}, ["<|im_end|>"]),  # the line break behind the last turn is trained, too
        (CHATS, {"train_roles": ["user", "assistant"]}, ["<|im_end|>"]),
        (PROMPTS, {}, ["<|end|>"]),
        (TEXTS, {}, ["<|end|>"]),
    ],
)
def test_the_tokens_that_end_what_is_trained(
    base: Path, tmp_path: Path, records: list[Any], chat: dict[str, Any], names: list[str]
) -> None:
    store, _ = prepared(section(tmp_path, base, write_jsonl(tmp_path / "a.jsonl", records), chat=chat))
    tokenizer = open_tokenizer(str(base))
    assert [tokenizer.decode([index]) for index in taught_by(store, TASKS["causal_lm"]).stop_ids] == names


IM_END = 485


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"eos_token_id": 1, "top_p": 0.5}, {"eos_token_id": [1, IM_END], "top_p": 0.5}),
        ({"eos_token_id": [1, 7]}, {"eos_token_id": [1, 7, IM_END]}),
        ({"eos_token_id": [IM_END, 1]}, {"eos_token_id": [IM_END, 1]}),
        ({"eos_token_id": IM_END, "_from_model_config": True}, {"eos_token_id": IM_END, "_from_model_config": True}),
        ({"eos_token_id": 1, "_from_model_config": True}, {"eos_token_id": [1, IM_END]}),
        ({"temperature": 0.3}, {"temperature": 0.3, "eos_token_id": [1, IM_END]}),  # the end that config.json names
        (None, {"eos_token_id": [1, IM_END], "bos_token_id": 0, "pad_token_id": 1}),
    ],
)
def test_they_join_the_generation_config(base: Path, tmp_path: Path, given: Any, expected: dict[str, Any]) -> None:
    assert open_tokenizer(str(base)).decode([IM_END]) == "<|im_end|>"
    copied = tmp_path / "base"
    copied.mkdir()
    for path in base.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    (copied / "generation_config.json").unlink()
    if given is not None:
        (copied / "generation_config.json").write_text(json.dumps(given))
    export_run(run_of(copied, tmp_path / "run"), tmp_path / "out", None, False, "bfloat16", 10**9)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == expected
