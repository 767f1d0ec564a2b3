"""`fulltune generate`: what it answers, and the folders it refuses without running or asking anything."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from data_fixtures import byte_level_folder
from repository import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig

from data_prep.tokenizer.open import open_tokenizer
from engine.errors import ConfigError, DataError, MissingInputError, RefusedForSecurityError
from launcher.commands.generate import generate


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = byte_level_folder(tmp_path / "model")
    config = LlamaConfig(
        vocab_size=open_tokenizer(str(folder)).vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def answers(model: Path, *prompts: str, chat: bool = False, temperature: float = 0.0, seed: int = 0) -> list[str]:
    return list(generate(str(model), list(prompts), chat, 8, temperature, seed))


def test_the_likeliest_tokens_or_a_seeded_draw(model: Path) -> None:
    assert answers(model, "the river", "an old") == answers(model, "the river") + answers(model, "an old")
    assert answers(model, "the river", seed=1) == answers(model, "the river", seed=2)
    drawn = [answers(model, "the river", temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_chat_goes_through_the_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="no chat template"):
        answers(model, "the river", chat=True)
    (model / "chat_template.jinja").write_text("User: {{ messages[0]['content'] }}\nAssistant:")
    assert answers(model, "the river", chat=True) == answers(model, "User: the river\nAssistant:")


def test_bad_folders_and_numbers_are_one_line(model: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"no config\.json"):
        answers(tmp_path, "x")
    with pytest.raises(ConfigError, match="--temperature"):
        answers(model, "x", temperature=-1.0)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(ConfigError, match="BertForSequenceClassification does not generate text"):
        answers(model, "x")
    (model / "config.json").write_text("{")
    with pytest.raises(DataError, match="model: "):
        answers(model, "x")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(RefusedForSecurityError, match=r"no \*\.safetensors"):
        answers(model, "x")


def test_code_in_the_folder_is_refused_without_a_question(model: Path) -> None:
    """On a terminal, where transformers would ask; `y` is typed ahead."""
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text("import pathlib\npathlib.Path('ran').write_text('')\n")
    ours, theirs = pty.openpty()
    os.write(ours, b"y\ny\n")
    result = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "generate", str(model), "--prompt", "x"],
        cwd=model, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=theirs, capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (77, "")
    assert result.stderr == f"fulltune: error: {model}: brings its own code, which is never run\n"
    assert not (model / "ran").exists()
