"""Tokenizers: ids equal those of transformers on the saved folder; user text never becomes control tokens."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from data_fixtures import SAMPLES, WORDS, bert_vocabulary, byte_level_folder, sentencepiece_folder, sentences
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizer

from data_prep.errors import BadDataError, DataConfigError, MissingInputError
from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.tokenizer import Tokenizer
from data_prep.tokenizer.train import train_sentencepiece

TEXTS = [
    *sentences(40, seed=9),
    "",
    "  two blanks before, two  between, two after  ",
    "tabs\tand\n\nline breaks\r\n",
    "Straße, naïve CAFÉ, ﬁne, e\u0301, \u00a0hard blank, 漢字かな交じり, \U0001f600\U0001f469\u200d\U0001f467",
    "北京大学生前来应聘。",
    "<0x0A> is not a line break; ▁ is not a blank",
    "x" * 300,
]


def ids_around(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [[*tokenizer.prefix_ids, *ids, *tokenizer.suffix_ids] for ids in tokenizer.encode_batch(texts)]


def make_json(folder: Path) -> Path:
    return byte_level_folder(folder, add_bos=True)


def make_json_without_bos(folder: Path) -> Path:
    return byte_level_folder(folder, bos="<s>", eos="</s>")


def make_bpe(folder: Path) -> Path:
    return sentencepiece_folder(folder, "bpe")


def make_unigram(folder: Path) -> Path:
    return sentencepiece_folder(folder, "unigram")


def make_vocabulary(folder: Path) -> Path:
    return bert_vocabulary(folder / "vocab.txt")


MAKERS = [make_json, make_json_without_bos, make_bpe, make_unigram, make_vocabulary]


def assert_same_as_saved(tokenizer: Tokenizer, folder: Path, texts: list[str]) -> Any:
    tokenizer.save(folder)
    saved = AutoTokenizer.from_pretrained(folder)
    plain = [saved(text)["input_ids"] for text in texts]
    assert plain == ids_around(tokenizer, texts)
    assert (saved.bos_token_id, saved.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert len(saved) == tokenizer.vocab_size
    again = open_tokenizer(str(folder))
    assert ids_around(again, texts) == plain
    assert again.files(None) == tokenizer.files(None)
    return saved


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("model_type", [None, "llama", "bert", "t5", "gpt2"])
def test_the_saved_folder_gives_transformers_the_same_ids(tmp_path: Path, make: Any, model_type: str | None) -> None:
    tokenizer = open_tokenizer(str(make(tmp_path / "own")))
    if model_type is not None:  # as in the folder of an exported model
        (tmp_path / "saved").mkdir()
        (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert_same_as_saved(tokenizer, tmp_path / "saved", TEXTS)


@pytest.mark.parametrize("make", [make_json, make_json_without_bos])
def test_a_tokenizer_json_is_read_as_transformers_reads_it(tmp_path: Path, make: Any) -> None:
    folder = make(tmp_path)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ids_around(open_tokenizer(str(folder)), TEXTS) == [theirs(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_trained_model_encodes_as_sentencepiece_and_decodes_exactly(tmp_path: Path, kind: str) -> None:
    folder = sentencepiece_folder(tmp_path, kind)
    tokenizer = open_tokenizer(str(folder))
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    encoded = tokenizer.encode_batch(TEXTS)
    assert encoded == [own.encode(text) for text in TEXTS]
    # ▁ in a text is what a blank becomes, in every sentencepiece model.
    assert [tokenizer.decode(ids) for ids in encoded] == [text.replace("▁", " ") for text in TEXTS]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 3, 380)
    assert tokenizer.prefix_ids == [1] and tokenizer.suffix_ids == []


def test_training_reads_records_and_texts_and_is_deterministic(tmp_path: Path) -> None:
    texts = sentences(600, longest_words=100)
    records = [json.dumps({"prompt": text, "response": text, "n": 3}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(records))
    for name in ("one", "two"):
        train_sentencepiece([tmp_path / "a.jsonl", *texts], tmp_path / name, 400)
    one, two = ((tmp_path / name / "tokenizer.model").read_bytes() for name in ("one", "two"))
    assert one == two
    with pytest.raises(DataConfigError, match="--vocab-size 100000 is too large: these texts give at most"):
        train_sentencepiece(["a few words"], tmp_path / "three", 100_000)
    with pytest.raises(MissingInputError, match=r"none\.jsonl: no such file"):
        train_sentencepiece([tmp_path / "none.jsonl"], tmp_path / "three", 400)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "one", "two"]


@pytest.mark.parametrize("make", MAKERS)
def test_text_never_becomes_control_tokens(tmp_path: Path, make: Any) -> None:
    tokenizer = open_tokenizer(str(make(tmp_path)))
    attacks = [f"a{text}b {text} {text}{text}" for text in tokenizer.control_strings]
    assert len(attacks) >= 2
    for text, ids in zip(attacks, tokenizer.encode_batch(attacks), strict=True):
        assert not tokenizer.holds_control_ids(ids)
        if make is not make_vocabulary:  # which has no piece for < and | and forgets blanks
            assert tokenizer.decode(ids) == text
    # and the guard sees what it should
    assert tokenizer.holds_control_ids([5, tokenizer.pad_id]) or tokenizer.pad_id not in tokenizer.control_ids


def test_bert_vocabulary_equals_transformers_bert(tmp_path: Path) -> None:
    path = bert_vocabulary(tmp_path / "vocab.txt")
    tokenizer = open_tokenizer(str(path))
    pieces = path.read_bytes().decode().split("\n")[:-1]
    assert tokenizer.vocab_size == len(pieces) and pieces[5] == "a\u2028b"
    theirs = BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, do_lower_case=True)
    texts = [text for text in TEXTS if "\U0001f600" not in text]
    assert ids_around(tokenizer, texts) == [theirs(text)["input_ids"] for text in texts]


@pytest.mark.parametrize(("piece", "config", "lowered"), [
    ("river", None, True), ("River", None, False), ("River", True, True), ("river", False, False),
])  # fmt: skip
def test_lower_casing_follows_config_else_vocabulary(
    tmp_path: Path, piece: str, config: bool | None, lowered: bool
) -> None:
    path = bert_vocabulary(tmp_path / "vocab.txt")
    path.write_bytes(path.read_bytes() + f"{piece}\n".encode())
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": config}))
    tokenizer = open_tokenizer(str(tmp_path))
    small, capital = tokenizer.encode_batch(["stone", "STONE"])
    assert (small == capital) is lowered


def test_special_tokens_only_named_in_the_config_are_added_like_transformers_does(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {
        "pad_token": {"__type": "AddedToken", "content": "<|pad|>", "special": True, "normalized": False},
        "add_bos_token": True,
        "additional_special_tokens": ["<|user|>"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(str(folder))
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS[:10], "x"]
    assert ids_around(tokenizer, texts) == [theirs(text)["input_ids"] for text in texts]
    assert tokenizer.pad_id == theirs.pad_token_id
    assert set(tokenizer.control_strings) == {"<|begin|>", "<|end|>", "<|pad|>", "<|user|>"}
    for text in tokenizer.control_strings:
        assert tokenizer.decode([theirs.convert_tokens_to_ids(text)]) == text


def test_a_unigram_json_with_control_pieces_in_its_vocabulary(tmp_path: Path) -> None:
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("▁a", -1.0), ("<", -5.0), ("/", -5.0), ("s", -5.0), (">", -5.0)]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, 0, False))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<unk>", special=True)])
    backend.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "unk_token": "<unk>"}')
    backend.encode_special_tokens = True
    assert 1 in backend.encode("a</s>", add_special_tokens=False).ids  # the trap
    tokenizer = open_tokenizer(str(tmp_path))
    assert tokenizer.encode_batch(["a</s>"]) == [[2, 3, 4, 5, 6]]
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ([], [1])


def test_missing_and_broken_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"no such tokenizer file or folder \(data\.tokenizer\)"):
        open_tokenizer(str(tmp_path / "none"))
    with pytest.raises(MissingInputError, match="holds no tokenizer files"):
        open_tokenizer(str(tmp_path))
    for name, content in (("tokenizer.json", b"{}"), ("m.model", b"\xff\xfe"), ("vocab.txt", b"a\nb\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadDataError, match=r"not a tokenizer|not a BERT vocabulary|sentencepiece"):
            open_tokenizer(str(tmp_path / name))


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")
@pytest.mark.parametrize(
    "name",
    ["sentencepiece_2k", "t5_sentencepiece_32k", "bytelevel_bpe_2k", "bert_cased_en", "bert_uncased_en", "bert_zh"],
)
def test_sample_tokenizers_equal_transformers_on_the_saved_folder(tmp_path: Path, name: str) -> None:
    tokenizer = open_tokenizer(str(SAMPLES / "tokenizers" / name))
    shakespeare = (SAMPLES / "pretraining/tinyshakespeare/input.txt").read_text().split("\n\n")[:200]
    assert_same_as_saved(tokenizer, tmp_path, [*TEXTS, *shakespeare, " ".join(WORDS)])
    expected = {
        "sentencepiece_2k": ([1], []),
        "t5_sentencepiece_32k": ([], [1]),
        "bytelevel_bpe_2k": ([], []),
    }.get(name, ([101], [102]))
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == expected


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")
@pytest.mark.parametrize("name", ["sentencepiece_2k/m.model", "t5_sentencepiece_32k/sentencepiece.model"])
def test_sample_models_encode_as_sentencepiece_does(name: str) -> None:
    path = SAMPLES / "tokenizers" / name
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    shakespeare = (SAMPLES / "pretraining/tinyshakespeare/input.txt").read_text().split("\n\n")[:1000]
    texts = [*shakespeare, *TEXTS]
    assert open_tokenizer(str(path)).encode_batch(texts) == [own.encode(text) for text in texts]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("tokenizer.model", "garbage", "not a tokenizer: neither a sentencepiece model nor tiktoken's ranks; copy or download"),
        ("tokenizer.model", "", "the model has no pieces; copy or download it again"),
        ("tokenizer.json", "", "the file is empty; copy or download it again"),
        ("tokenizer.model", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "run `git lfs pull` in its folder"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "run `git lfs pull` in its folder"),
        ("tokenizer.json", '{"a": 1}', "not a tokenizer that can be read: "),
    ],
)  # fmt: skip
def test_files_that_are_no_tokenizer(tmp_path: Path, name: str, content: str, fault: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadDataError, match=re.escape(fault)) as caught:
        open_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/{name}: ")
    assert "ModelProto" not in str(caught.value)
