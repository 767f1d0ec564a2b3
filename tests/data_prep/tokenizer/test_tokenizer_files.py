"""Byte-level BPE from vocabulary and merges, and from tiktoken's ranks."""

import base64
import itertools
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from data_fixtures import SAMPLES, byte_level_folder, sentences
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from data_prep.errors import BadDataError, MissingInputError, RefusedError
from data_prep.tokenizer.open import open_tokenizer

TEXTS = [
    *sentences(40, seed=9),
    "",
    "  two blanks,  and\ttabs\n\n\nlines\r\n",
    "Straße, CAFÉ, e\u0301, 漢字かな, 北京大学生前来应聘。 \U0001f600",
    "it's 1234567 don't",
    "<|endoftext|> is text",
]
GPT2, RANKS = SAMPLES / "tokenizers/gpt2", SAMPLES / "tokenizers/tiktoken_small"
samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")


def older_files(folder: Path, vocabulary_name: str, merges_name: str) -> tokenizers.Tokenizer:
    """A byte-level BPE as vocabulary and merges; returns it as the library itself has it."""
    made = byte_level_folder(folder / "made")
    model = json.loads((made / "tokenizer.json").read_text())["model"]
    (folder / vocabulary_name).write_text(json.dumps(model["vocab"]))
    (folder / merges_name).write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    return tokenizers.Tokenizer.from_file(str(made / "tokenizer.json"))


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_vocabulary_and_merges_give_the_ids_of_the_same_tokenizer_json(tmp_path: Path, names: tuple[str, str]) -> None:
    expected = older_files(tmp_path, *names)
    for path in (tmp_path, tmp_path / names[0], tmp_path / names[1]):
        tokenizer = open_tokenizer(str(path))
        encoded = tokenizer.encode_batch(TEXTS)
        assert encoded == [expected.encode(text).ids for text in TEXTS]
        assert [tokenizer.decode(ids) for ids in encoded] == TEXTS
        assert tokenizer.special_tokens == {}


def test_a_config_beside_them_names_special_tokens_and_the_way_words_are_cut(tmp_path: Path) -> None:
    older_files(tmp_path, "vocab.json", "merges.txt")
    plain = open_tokenizer(str(tmp_path)).encode_batch(["1234 e\u0301"])[0]
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|x|>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(str(tmp_path))
    own = tokenizer.encode_batch(["1234 e\u0301"])[0]
    assert [tokenizer.decode([index]) for index in own[:4]] == ["1", "2", "3", "4"]
    assert tokenizer.decode(own) == "1234 \u00e9"
    assert plain != own
    assert tokenizer.eos_id is not None
    assert tokenizer.control_strings == ("<|im_end|>", "<|x|>")
    config["tokenizer_class"] = "StrangeTokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BadDataError, match="how StrangeTokenizer cuts words is not known"):
        open_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.X", null]}}')
    with pytest.raises(RefusedError, match="its own code, which is never run"):
        open_tokenizer(str(tmp_path))


def test_broken_files_are_named(tmp_path: Path) -> None:
    older_files(tmp_path, "vocab.json", "merges.txt")
    good = (tmp_path / "merges.txt").read_text()
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(BadDataError, match=r"merges\.txt:2: a merge is two tokens"):
        open_tokenizer(str(tmp_path))
    (tmp_path / "merges.txt").write_text(good)
    (tmp_path / "vocab.json").write_text("[1]")
    with pytest.raises(BadDataError, match=r"vocab\.json: not a vocabulary"):
        open_tokenizer(str(tmp_path))
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(MissingInputError, match=r"vocab\.json and merges\.txt"):
        open_tokenizer(str(tmp_path))
    (tmp_path / "t.model").write_bytes(b"AA== 0\nAQ== one\n")
    with pytest.raises(BadDataError, match=r"t\.model:2: not a rank"):
        open_tokenizer(str(tmp_path / "t.model"))
    (tmp_path / "t.model").write_bytes(b"AA== 0\n")
    with pytest.raises(BadDataError, match=r"t\.model: has no rank for byte 1"):
        open_tokenizer(str(tmp_path / "t.model"))


@samples
def test_gpt2_equals_the_library_on_the_same_files(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(GPT2))
    expected = tokenizers.Tokenizer(models.BPE.from_file(str(GPT2 / "encoder.json"), str(GPT2 / "vocab.bpe")))
    expected.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    expected.decoder = decoders.ByteLevel()
    shakespeare = (SAMPLES / "pretraining/tinyshakespeare/input.txt").read_text().split("\n\n")[:500]
    texts = [*TEXTS, *shakespeare]
    assert tokenizer.encode_batch(texts) == [expected.encode(text).ids for text in texts]
    assert tokenizer.encode_batch(["Hello world"]) == [[15496, 995]]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (50257, 50256, 50256)
    tokenizer.save(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    texts.remove(TEXTS[-1])  # which holds a control token's string, and transformers takes it for one
    assert [saved(text)["input_ids"] for text in texts] == tokenizer.encode_batch(texts)


def merge_by_rank(ranks: dict[bytes, int], word: bytes) -> list[int]:
    """tiktoken's rule: a known word is its rank; else the pair with the lowest rank merges, the first of equals."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[at : at + 1] for at in range(len(word))]
    while True:
        joined = [ranks.get(left + right, 1 << 30) for left, right in itertools.pairwise(parts)]
        if not joined or min(joined) == 1 << 30:
            return [ranks[part] for part in parts]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@samples
def test_ranks_encode_as_tiktoken_does(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(RANKS))
    file = next(RANKS.glob("*.model"))
    lines = [line.split() for line in file.read_bytes().splitlines()]
    ranks = {base64.b64decode(text): int(rank) for text, rank in lines}
    cutter = pre_tokenizers.Split(
        tokenizers.Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        ),
        behavior="isolated",
    )
    shakespeare = (SAMPLES / "pretraining/tinyshakespeare/input.txt").read_text().split("\n\n")[:300]
    texts = [*TEXTS, *shakespeare]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        words = [word.encode() for word, _ in cutter.pre_tokenize_str(text)]
        assert ids == [index for word in words for index in merge_by_rank(ranks, word)]
        assert tokenizer.decode(ids) == text
    # Llama 3.1's control tokens follow the ranks
    assert (tokenizer.vocab_size, tokenizer.prefix_ids, tokenizer.eos_id) == (2256, [2000], 2001)
    assert tokenizer.decode([2006, 2007, 2009]) == "<|start_header_id|><|end_header_id|><|eot_id|>"
    shutil.copy(file, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"2000": {"content": "<|e|>"}}}')
    assert open_tokenizer(str(tmp_path)).vocab_size == 2001
