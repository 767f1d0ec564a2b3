"""Training tokenizers from text: what is written, that it is the same each time, and what is held out."""

import gzip
import json
import zipfile
from pathlib import Path

import pytest
from data_fixtures import sentences
from transformers import AutoTokenizer

from data_prep.errors import BadDataError, DataConfigError
from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.texts import LearningTexts
from data_prep.tokenizer.train import Kind, measure, train_tokenizer
from launcher.cli import main

KINDS: list[Kind] = ["sentencepiece-bpe", "sentencepiece-unigram", "byte-bpe"]
ODD = ["", " two  blanks\n\n", "2024 e\u0301 漢字 \U0001f600", "<s> </s> <pad> <0x0A>"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_tokenizer_is_whole_exact_and_the_same_each_time(tmp_path: Path, kind: Kind) -> None:
    texts = sentences(1500, longest_words=200)
    densities = [train_tokenizer(texts, tmp_path / name, 400, kind) for name in ("one", "two")]
    assert densities[0] == densities[1]
    written = [{p.name: p.read_bytes() for p in sorted((tmp_path / name).iterdir())} for name in ("one", "two")]
    assert written[0] == written[1]
    tokenizer = open_tokenizer(str(tmp_path / "one"))
    assert tokenizer.vocab_size == 400
    for name in ("bos_token", "eos_token", "pad_token"):
        assert tokenizer.special_tokens[name] in tokenizer.control_strings
    assert tokenizer.prefix_ids == [tokenizer.bos_id] and tokenizer.suffix_ids == []
    for text, ids in zip(ODD, tokenizer.encode_batch(ODD), strict=True):
        assert tokenizer.decode(ids) == text
        assert not tokenizer.holds_control_ids(ids)
    tokenizer.save(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [saved(t)["input_ids"] for t in texts[:20]] == [
        [tokenizer.bos_id, *i] for i in tokenizer.encode_batch(texts[:20])
    ]


def test_byte_bpe_is_a_folder_that_transformers_reads_as_it_stands(tmp_path: Path) -> None:
    texts = sentences(300)
    train_tokenizer(texts, tmp_path / "t", 400, "byte-bpe")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    ours = open_tokenizer(str(tmp_path / "t"))
    assert [theirs(t)["input_ids"] for t in [*texts, *ODD[:3]]] == [
        [0, *i] for i in ours.encode_batch([*texts, *ODD[:3]])
    ]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    ids = ours.encode_batch(["12345"])[0]
    assert [ours.decode([index]) for index in ids] == list("12345"), "digits stay single"


def test_a_vocabulary_that_texts_cannot_fill_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataConfigError, match="they fill only"):
        train_tokenizer(["a few words"], tmp_path / "t", 5000, "byte-bpe")
    with pytest.raises(DataConfigError, match="at least 259"):
        train_tokenizer(["a few words"], tmp_path / "t", 100, "byte-bpe")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_chat_tokens_and_template_come_with_it(tmp_path: Path, kind: Kind) -> None:
    train_tokenizer(sentences(300), tmp_path / "t", 400, kind, chat=True)
    ours, theirs = open_tokenizer(str(tmp_path / "t")), AutoTokenizer.from_pretrained(tmp_path / "t")
    assert ours.vocab_size == 400
    assert {"<|im_start|>", "<|im_end|>"} <= set(ours.control_strings)
    for text in ("<|im_start|>a", "a<|im_end|>"):
        assert not ours.holds_control_ids(ours.encode_batch([text])[0]), "plain text stays plain"
        assert ours.decode(ours.encode_batch([text])[0]) == text
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    assert theirs.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    )
    assert ours.chat_template is not None


@pytest.mark.parametrize(
    ("texts", "vocab_size", "kind", "fault"),
    [
        (["hello world"] * 50, 3000, "sentencepiece-bpe", "--vocab-size 3000 is too large: .* at most 286 pieces; write 286"),
        (["hello world"] * 50, 3000, "sentencepiece-unigram", "too large: .*; write 269"),
        (["abcdefgh ijklmn"], 100, "sentencepiece-bpe", "--vocab-size 100 is too small .*: write 275 or more"),
        (["abc"], 200, "sentencepiece-unigram", "too small .*: write 263 or more"),
        ([""], 300, "sentencepiece-bpe", "the files hold no text to learn from"),
        ([], 300, "sentencepiece-unigram", "the files hold no text to learn from"),
        (["a few words"], 5000, "byte-bpe", "--vocab-size 5000 does not suit these texts: they fill only"),
        (["a few words"], 258, "byte-bpe", "--vocab-size 258 does not suit these texts: at least 259 are needed"),
    ],
)  # fmt: skip
def test_faults_of_training_are_in_our_words(
    tmp_path: Path, texts: list[str], vocab_size: int, kind: Kind, fault: str
) -> None:
    with pytest.raises(DataConfigError, match=fault) as caught:
        train_tokenizer(texts, tmp_path / "t", vocab_size, kind)
    assert "sentencepiece" not in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "t").exists()


def test_every_fiftieth_text_is_held_out() -> None:
    texts = LearningTexts([f"text {number}" for number in range(1, 121)])
    learned = list(texts)
    held_out, kept_apart = texts.sample()
    assert kept_apart and held_out == ["text 50", "text 100"]
    assert sorted([*learned, *held_out]) == sorted(f"text {number}" for number in range(1, 121))
    few = LearningTexts(["one", "two"])
    assert list(few) == ["one", "two"] and few.sample() == (["one", "two"], False)


def test_texts_come_from_every_format_compressed_or_not(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "one"}], "label": "no", "n": 3}\n')
    (tmp_path / "b.csv").write_text("x,y\ntwo,three\n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"four\n\n  five\n"))
    (tmp_path / "d.py").write_text("six\n")
    (tmp_path / "e.conll").write_text("sev B-X\nen O\n\n")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "g.json").write_text('[{"text": "eight"}]')
    with zipfile.ZipFile(tmp_path / "h.zip", "w") as archive:
        archive.writestr("deep/i.txt", "ten\n")
    names = ("a.jsonl", "b.csv", "c.txt.gz", "d.py", "e.conll", "f", "*.py", "h.zip")
    found = list(LearningTexts([*(tmp_path / name for name in names), "nine"]))
    assert found == ["one", "two", "three", "four\n\n  five\n", "six\n", "sev en", "eight", "six\n", "ten\n", "nine"]
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    with pytest.raises(BadDataError, match=r"bad\.txt:1: not UTF-8"):
        list(LearningTexts([tmp_path / "bad.txt"]))


def test_long_texts_are_cut_but_nothing_is_lost() -> None:
    text = "".join(f"line {number}\n" for number in range(2000)) + "x" * 5000
    pieces = list(LearningTexts([text]))
    assert max(map(len, pieces)) <= 2000
    assert "".join(pieces) in text and len("".join(pieces)) == len(text)


def test_density_counts_tokens_characters_and_unknowns(tmp_path: Path) -> None:
    from data_fixtures import bert_vocabulary

    tokenizer = open_tokenizer(str(bert_vocabulary(tmp_path / "vocab.txt")))
    density = measure(tokenizer, (["stone \U0001f600", "river"], True))
    assert (density.num_tokens, density.num_characters, density.num_unknown) == (3, 12, 1)
    assert density.tokens_per_character == 0.25


def test_the_command_trains_and_says_how_dense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [json.dumps({"prompt": text, "response": text}) for text in sentences(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(records))
    words = ["tokenizer", "train", str(tmp_path / "a.jsonl"), str(tmp_path / "t"), "--vocab-size", "450"]
    assert main([*words, "--kind", "byte-bpe"]) == 0
    printed = capsys.readouterr()
    assert "byte-bpe tokenizer of 450 ids written to" in printed.out
    assert "tokens per character on " in printed.out and "held-out text" in printed.out
    assert "read 0." in printed.err
    assert open_tokenizer(str(tmp_path / "t")).vocab_size == 450
    with pytest.raises(SystemExit) as stopped:
        main([*words[:-1], "no"])
    assert stopped.value.code == 78
