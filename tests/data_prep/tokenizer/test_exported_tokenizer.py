"""What AutoTokenizer makes of an exported folder, and the warning where it makes something else of it."""

import json
from pathlib import Path

import pytest
from repository import ROOT
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.train import train_sentencepiece
from launcher.commands.export import misreading_class

TEXT = "It's 2024: two  blanks, 12345 and\n\n    an indented line\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    sources = sorted((ROOT / "data_prep").rglob("*.py"))
    train_sentencepiece([path.read_text() for path in sources], folder / "sentencepiece", 600)
    return folder / "sentencepiece"


def exported(trained: Path, folder: Path, model_type: str) -> Path:
    open_tokenizer(str(trained)).save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "gpt2", "bert", "t5"])
def test_auto_tokenizer_gives_the_ids_of_training(trained: Path, tmp_path: Path, model_type: str) -> None:
    folder = exported(trained, tmp_path, model_type)
    ours = open_tokenizer(str(trained))
    expected = [*ours.prefix_ids, *ours.encode_batch([TEXT])[0], *ours.suffix_ids]
    assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] == expected
    assert misreading_class(folder) is None


def test_a_class_with_rules_of_its_own_is_named_and_the_advice_holds(trained: Path, tmp_path: Path) -> None:
    folder = exported(trained, tmp_path, "qwen2")
    assert misreading_class(folder) == "Qwen2Tokenizer"
    ours = open_tokenizer(str(trained))
    expected = [*ours.prefix_ids, *ours.encode_batch([TEXT])[0], *ours.suffix_ids]
    assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] != expected
    assert PreTrainedTokenizerFast.from_pretrained(folder)(TEXT)["input_ids"] == expected
