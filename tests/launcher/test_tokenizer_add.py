"""`tokenizer add`: new special tokens get ids and rows, everything else of the folder stays as it was."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import bert_vocabulary, byte_level_folder, sentencepiece_folder
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from data_prep.tokenizer.extend import extend_tokenizer
from data_prep.tokenizer.open import open_tokenizer
from launcher.cli import main

IN, END = "<|im_start|>", "<|im_end|>"
TEXTS = ["a plain text", " two  blanks\n", "<|im_start|> is text here", "12,345 e\u0301 漢字"]


def llama(folder: Path, rows: int, **more: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    model = LlamaForCausalLM(LlamaConfig(**({"vocab_size": rows} | sizes | tokens | more)))  # type: ignore[arg-type]
    model.save_pretrained(folder, max_shard_size=more.pop("shard", "5GB"))
    return folder


def make_llama(folder: Path) -> Path:
    return llama(byte_level_folder(folder), open_tokenizer(str(folder)).vocab_size)


def make_tied(folder: Path) -> Path:
    return llama(byte_level_folder(folder), open_tokenizer(str(folder)).vocab_size, tie_word_embeddings=True)


def make_padded(folder: Path) -> Path:
    size = open_tokenizer(str(byte_level_folder(folder))).vocab_size
    return llama(folder, -(-size // 64) * 64 + 64)


def make_of_64(folder: Path) -> Path:
    """A multiple of 64 rows, all of them used."""
    size = open_tokenizer(str(byte_level_folder(folder))).vocab_size
    byte_level_folder(folder, extra=tuple(f"<|{n}|>" for n in range(-size % 64)))
    return llama(folder, open_tokenizer(str(folder)).vocab_size)


def make_sentencepiece(folder: Path) -> Path:
    return llama(sentencepiece_folder(folder, "bpe"), open_tokenizer(str(folder)).vocab_size)


def make_unigram_t5(folder: Path) -> Path:
    size = open_tokenizer(str(sentencepiece_folder(folder, "unigram"))).vocab_size
    config = T5Config(vocab_size=size, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def make_bert(folder: Path) -> Path:
    size = open_tokenizer(str(bert_vocabulary(folder / "vocab.txt"))).vocab_size
    config = BertConfig(
        vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def make_gpt2(folder: Path) -> Path:
    size = open_tokenizer(str(byte_level_folder(folder))).vocab_size
    GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(folder)
    return folder


def make_sharded(folder: Path) -> Path:
    make_llama(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {f"model-{n:05d}-of-00002.safetensors": {} for n in (1, 2)}
    for number, (name, tensor) in enumerate(sorted(weights.items())):
        parts[f"model-{number % 2 + 1:05d}-of-00002.safetensors"][name] = tensor  # type: ignore[index]
    for file, tensors in parts.items():
        save_file(tensors, folder / file, {"format": "pt"})
    where = {name: file for file, tensors in parts.items() for name in tensors}
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_bfloat16(folder: Path) -> Path:
    make_tied(folder)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": make_llama, "tied": make_tied, "padded": make_padded, "of 64": make_of_64, "sharded": make_sharded,
    "sentencepiece": make_sentencepiece, "t5": make_unigram_t5, "bert": make_bert, "gpt2": make_gpt2,
    "bfloat16": make_bfloat16,
}  # fmt: skip


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def add(*words: object) -> int:
    return main(["tokenizer", "add", *map(str, words)])


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_get_ids_and_rows_and_all_else_stays(tmp_path: Path, kind: str) -> None:
    base = MODELS[kind](tmp_path / "base")
    (base / "README.md").write_text("of the base")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    assert add(base, tmp_path / "out", "--special", IN, "--special", END) == 0
    old, new = open_tokenizer(str(base)), open_tokenizer(str(tmp_path / "out"))
    assert new.vocab_size == old.vocab_size + 2
    assert new.control_strings[-2:] == (IN, END) and new.special_tokens == old.special_tokens
    assert new.encode_batch(TEXTS) == old.encode_batch(TEXTS), "a special token is found in no plain text"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(f"a{END}", add_special_tokens=False)["input_ids"][-1] == old.vocab_size + 1
    before, after = all_weights(base), all_weights(tmp_path / "out")
    assert before.keys() == after.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    grown = 0
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        if after[name].shape == tensor.shape and not (kind == "padded" and tensor.shape[0] == config["vocab_size"]):
            assert torch.equal(after[name], tensor), name
            continue
        grown += 1
        assert torch.equal(after[name][: old.vocab_size], tensor[: old.vocab_size])
        assert after[name].shape[0] == config["vocab_size"]
        for place, ids in enumerate(old.encode_batch([IN, END])):
            expected = tensor[torch.tensor(ids)].float().mean(0).to(tensor.dtype)
            assert torch.equal(after[name][old.vocab_size + place], expected), name
    assert grown == {"bert": 2, "llama": 2, "padded": 2, "of 64": 2, "sharded": 2, "sentencepiece": 2}.get(kind, grown)
    assert grown >= 1
    sizes = {"padded": before["lm_head.weight"].shape[0] if "lm_head.weight" in before else 0}
    sizes["of 64"] = -(-new.vocab_size // 64) * 64
    assert config["vocab_size"] == sizes.get(kind, new.vocab_size)
    assert (tmp_path / "out" / "README.md").read_text() == "of the base"
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    changed = {"config.json", "tokenizer.json", "tokenizer_config.json", *(p.name for p in base.glob("model*"))}
    for path in base.iterdir():
        if path.is_file() and path.name not in changed | {"tokenizer.model", "vocab.txt"}:
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    index = tmp_path / "out" / "model.safetensors.index.json"
    if index.is_file():
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(t.nbytes for t in after.values())


def test_a_tokenizer_that_has_the_tokens_already_gets_rows_for_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = byte_level_folder(tmp_path / "base", extra=(IN, END))
    size = open_tokenizer(str(base)).vocab_size
    llama(base, size - 2)
    assert add(base, tmp_path / "out", "--special", IN, END, "--special", "<|new|>") == 0
    out = capsys.readouterr().out
    assert f"{IN} is a special token of {base} already; it keeps its id" in out
    assert f"rows {size - 2} to {size} of lm_head.weight and model.embed_tokens.weight" in out
    assert all_weights(tmp_path / "out")["lm_head.weight"].shape[0] == size + 1
    assert add(base, tmp_path / "rows") == 0, "no token needs to be named for that"
    assert all_weights(tmp_path / "rows")["lm_head.weight"].shape[0] == size


def test_pieces_that_were_learned_before_get_their_rows_too(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    extend_tokenizer(str(base), ["zyzzyva quokka " * 60] * 60, tmp_path / "extended", 5)
    for path in (tmp_path / "extended").iterdir():
        shutil.copyfile(path, base / path.name)
    extension = json.loads((base / "extension.json").read_text())
    assert add(base, tmp_path / "out", "--special", END) == 0
    before, after = all_weights(base)["lm_head.weight"], all_weights(tmp_path / "out")["lm_head.weight"]
    first = extension["pieces"][str(extension["base_vocab_size"])]
    assert torch.equal(after[extension["base_vocab_size"]], before[torch.tensor(first)].float().mean(0))
    assert after.shape[0] == extension["base_vocab_size"] + len(extension["pieces"]) + 1
    assert not (tmp_path / "out" / "extension.json").exists(), "every row is made"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_rows_made"] == after.shape[0]


def test_a_chat_template_comes_with_its_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tied(tmp_path / "base")
    assert add(base, tmp_path / "chat", "--chat") == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "chat")
    text = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert text == f"{IN}user\nhi{END}\n{IN}assistant\n"
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}<|user|>{{ m.content }}<|eot|>{% endfor %}")
    capsys.readouterr()
    assert add(base, tmp_path / "own", "--special", "<|user|>", "--chat-template", template) == 0
    assert "writes <|eot|>, which is no special token: add --special '<|eot|>'" in capsys.readouterr().err
    assert open_tokenizer(str(tmp_path / "own")).chat_template == template.read_text()
    template.write_text("{% if")
    assert add(base, tmp_path / "bad", "--chat-template", template) == 78


def test_a_tokenizer_alone_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = bert_vocabulary(tmp_path / "base" / "vocab.txt").parent
    assert add(base, tmp_path / "out", "--special", "[NEW]") == 0
    assert "holds no model (no config.json), so there are no rows to make" in capsys.readouterr().out
    assert open_tokenizer(str(tmp_path / "out")).control_strings[-1] == "[NEW]"
    assert not (tmp_path / "out" / "vocab.txt").exists(), "it does not know the new token"


@pytest.mark.parametrize(
    ("words", "code", "fault"),
    [
        ((), 78, "nothing to add: give --special TOKEN, or --chat"),
        (("--special", " "), 78, "a token is a text without blanks around it"),
        (("--special", "<x> "), 78, "a token is a text without blanks around it"),
        (("--special", "<s>"), 78, "nothing to add: .* has these tokens and rows for them"),
        (("--chat-template", "nowhere"), 66, "--chat-template nowhere: cannot be read"),
        (("--chat", "--chat-template", "x"), 78, "not allowed with argument --chat"),
    ],
)  # fmt: skip
def test_what_cannot_be_added(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, fault: str
) -> None:
    base = make_tied(tmp_path / "base")
    if "<s>" in words:
        words = ("--special", open_tokenizer(str(base)).control_strings[0])
    capsys.readouterr()
    try:
        assert add(base, tmp_path / "out", *words) == code
    except SystemExit as leave:
        assert leave.code == code
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(fault, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_weights_in_other_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tied(tmp_path / "base")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    assert add(base, tmp_path / "out", "--chat") == 66
    assert "no model.safetensors, only pytorch_model.bin: save the model as safetensors" in capsys.readouterr().err
    shutil.copyfile(make_tied(tmp_path / "again") / "model.safetensors", base / "model.safetensors")
    (base / "modeling_x.py").write_text("")
    assert add(base, tmp_path / "out", "--chat") == 0
    assert "not copied: modeling_x.py, pytorch_model.bin" in capsys.readouterr().out
    assert not (tmp_path / "out" / "modeling_x.py").exists()


def test_files_that_do_not_travel_stay_behind_in_folders_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tied(tmp_path / "base")
    (base / "original").mkdir()
    for name in ("consolidated.00.pth", "params.json"):
        (base / "original" / name).write_text("{}")
    assert add(base, tmp_path / "out", "--chat") == 0
    assert "not copied: original/consolidated.00.pth\n" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out" / "original").iterdir()] == ["params.json"]


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "weights.bin"])
def test_an_index_that_names_other_files_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    base = make_tied(tmp_path / "base")
    shutil.copyfile(base / "model.safetensors", tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert add(base, tmp_path / "out", "--chat") == 77
    assert f"names '{name}': only *.safetensors in the same folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
