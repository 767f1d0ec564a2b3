"""Extending tokenizers: old ids stay, new pieces are really used, and the spelling of each is the base's own."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from data_fixtures import SAMPLES, bert_vocabulary, byte_level_folder, sentencepiece_folder, sentences
from examples import IS_LONG
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from data_prep.errors import CannotWriteError, DataConfigError, MissingInputError
from data_prep.tokenizer.extend import ExtensionReport, extend_tokenizer
from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.tokenizer import Tokenizer
from launcher.cli import main

samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")
CHINESE = "北京大学生前来应聘 我们在图书馆学习 今天天气很好 兰州公交集团 学习语言模型 图书馆今天开放 大学图书馆".split()
MEDICAL = (
    "thrombocytopenia haemodialysis anticoagulant myocardial infarction pneumothorax subcutaneous angioplasty "
    "cholecystectomy intravenous hepatocellular carcinoma echocardiogram bronchoscopy 2024 mg/kg naïveté"
).split()
HOSTILE = [" two  blanks ", "line\n\nbreaks\r\n\t", "e\u0301 ﬁ \U0001f600 \u3000", "<0x0A> ▁ </s> <|end|> [SEP]"]


def new_texts(count: int, seed: int = 3) -> list[str]:
    draw = random.Random(seed)
    words = [*MEDICAL, *MEDICAL, *CHINESE]
    return [" ".join(draw.choices(words, k=draw.randint(3, 30))) + draw.choice(["。", ".", ""]) for _ in range(count)]


def make_byte_level(folder: Path) -> Path:
    return byte_level_folder(folder, chat_template="{{ messages }}", add_bos=True, extra=("<|user|>",))


def make_bpe(folder: Path) -> Path:
    return sentencepiece_folder(folder, "bpe")


def make_unigram(folder: Path) -> Path:
    return sentencepiece_folder(folder, "unigram")


def make_wordpiece(folder: Path) -> Path:
    return bert_vocabulary(folder / "vocab.txt").parent


def make_llama_json(folder: Path) -> Path:
    """As Llama 2's tokenizer.json: nothing is cut before the model sees it; a normalizer writes blanks as ▁."""
    open_tokenizer(str(make_bpe(folder / "pieces"))).save(folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["pre_tokenizer"] = None
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    values["normalizer"] = {"type": "Sequence", "normalizers": steps}
    values["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder


MAKERS = [make_byte_level, make_bpe, make_unigram, make_wordpiece, make_llama_json]
NUM_PIECES = 120


def extended(make: Any, folder: Path, texts: list[str] | None = None) -> tuple[Tokenizer, Tokenizer, ExtensionReport]:
    base = make(folder / "base")
    report = extend_tokenizer(str(base), texts or new_texts(400), folder / "out", NUM_PIECES)
    return open_tokenizer(str(base)), open_tokenizer(str(folder / "out")), report


def vocabulary(folder: Path | str, tokenizer: Tokenizer) -> dict[str, int]:
    return tokenizers.Tokenizer.from_str(tokenizer.files(None)["tokenizer.json"]).get_vocab(with_added_tokens=True)


def spelling(folder: Path) -> dict[int, list[int]]:
    return {int(index): ids for index, ids in json.loads((folder / "extension.json").read_text())["pieces"].items()}


@pytest.mark.parametrize("make", MAKERS)
def test_old_pieces_keep_their_ids_and_new_ones_follow(tmp_path: Path, make: Any) -> None:
    base, larger, report = extended(make, tmp_path)
    before, after = vocabulary(tmp_path, base), vocabulary(tmp_path, larger)
    assert before.items() <= after.items()
    assert len(set(after.values())) == len(after)
    new = sorted(after.items() - before.items(), key=lambda item: item[1])
    assert [index for _, index in new] == list(range(base.vocab_size, base.vocab_size + report.num_pieces))
    assert larger.vocab_size == base.vocab_size + report.num_pieces
    assert 0 < report.num_pieces <= NUM_PIECES
    for name in ("special_tokens", "control_ids", "control_strings", "prefix_ids", "suffix_ids", "chat_template"):
        assert getattr(larger, name) == getattr(base, name), name
    assert sorted(spelling(tmp_path / "out")) == [index for _, index in new]
    added = {token["content"] for token in json.loads(larger.files(None)["tokenizer.json"])["added_tokens"]}
    assert not any(piece in added for piece, _ in new), "pieces of the model, not added tokens"


@pytest.mark.parametrize("make", MAKERS)
def test_transformers_opens_it_to_the_same_ids(tmp_path: Path, make: Any) -> None:
    base, larger, _ = extended(make, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [*new_texts(30, seed=4), *sentences(30), *HOSTILE[:3]]
    expected = [[*larger.prefix_ids, *ids, *larger.suffix_ids] for ids in larger.encode_batch(texts)]
    assert [theirs(text)["input_ids"] for text in texts] == expected
    assert len(theirs) == larger.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == tuple(
        getattr(larger, name) if f"{name.removesuffix('_id')}_token" in base.special_tokens else None
        for name in ("bos_id", "eos_id", "pad_id")
    )


@pytest.mark.parametrize("make", MAKERS)
def test_new_text_takes_fewer_tokens_and_comes_back_exactly(tmp_path: Path, make: Any) -> None:
    base, larger, report = extended(make, tmp_path)
    assert report.after.held_out and report.after.num_characters == report.before.num_characters
    if make is not make_wordpiece:  # to whom the Chinese words were unknown, one token each
        assert report.after.tokens_per_character < 0.6 * report.before.tokens_per_character
    assert report.after.num_unknown <= report.before.num_unknown
    texts = [*new_texts(100, seed=5), *sentences(100), *HOSTILE, *larger.control_strings]
    changed = 0
    for text, old, new in zip(texts, base.encode_batch(texts), larger.encode_batch(texts), strict=True):
        if base.decode(old) == text:
            assert larger.decode(new) == text
        assert not larger.holds_control_ids(new)
        changed += old != new
    assert changed > 90


@pytest.mark.parametrize("make", MAKERS)
def test_text_of_the_old_kind_keeps_its_tokens(tmp_path: Path, make: Any) -> None:
    base, larger, _ = extended(make, tmp_path)
    texts = sentences(300, seed=77)
    pairs = list(zip(base.encode_batch(texts), larger.encode_batch(texts), strict=True))
    assert sum(index >= base.vocab_size for _, new in pairs for index in new) < 0.12 * sum(len(new) for _, new in pairs)
    words = [word for text in texts for word in text.split()]
    same = [old == new for old, new in zip(base.encode_batch(words), larger.encode_batch(words), strict=True)]
    assert sum(same) > 0.8 * len(same)


@pytest.mark.parametrize("make", MAKERS)
def test_every_new_piece_is_used_or_builds_one_that_is(tmp_path: Path, make: Any) -> None:
    texts = new_texts(49)  # too few to hold any out, so this is all it learned from
    base, larger, report = extended(make, tmp_path, texts)
    assert not report.after.held_out
    used = {index for ids in larger.encode_batch(texts) for index in ids}
    unused = set(range(base.vocab_size, larger.vocab_size)) - used
    assert len(unused) == report.num_parts
    if make in (make_unigram, make_wordpiece):
        assert not unused
    merges = json.loads(larger.files(None)["tokenizer.json"])["model"].get("merges", [])
    parts = {part for merge in merges for part in merge}
    names = {index: piece for piece, index in vocabulary(tmp_path, larger).items()}
    assert all(names[index] in parts for index in unused)


def longest_match(pieces: dict[str, int], piece: str) -> list[int]:
    ids, inside, rest = [], piece.startswith("##"), piece.removeprefix("##")
    while rest:
        length = max((n for n in range(1, len(rest) + 1) if ("##" if inside else "") + rest[:n] in pieces), default=0)
        if not length:
            return [pieces["[UNK]"]]
        ids.append(pieces[("##" if inside else "") + rest[:length]])
        rest, inside = rest[length:], True
    return ids


@pytest.mark.parametrize("make", MAKERS)
def test_the_spelling_is_how_the_base_encodes_the_piece(tmp_path: Path, make: Any) -> None:
    base, larger, _ = extended(make, tmp_path)
    before, after = vocabulary(tmp_path, base), vocabulary(tmp_path, larger)
    names = {index: piece for piece, index in after.items()}
    model = tokenizers.Tokenizer.from_str(base.files(None)["tokenizer.json"]).model
    written = json.loads((tmp_path / "out" / "extension.json").read_text())
    assert written["base_vocab_size"] == base.vocab_size
    for index, ids in spelling(tmp_path / "out").items():
        piece = names[index]
        if make is make_wordpiece:
            assert ids == longest_match(before, piece)
        else:
            assert ids == [token.id for token in model.tokenize(piece)]
            assert base.decode(ids) == larger.decode([index])
        assert max(ids) < base.vocab_size


@pytest.mark.parametrize("make", [make_byte_level, make_bpe, make_llama_json])
def test_bpe_first_cuts_as_it_always_did(tmp_path: Path, make: Any) -> None:
    """New merges rank last: with each new token replaced by what it was merged from, the base's tokens remain."""
    base, larger, _ = extended(make, tmp_path)
    after = vocabulary(tmp_path, larger)
    values = json.loads(larger.files(None)["tokenizer.json"])["model"]
    old_merges = json.loads(base.files(None)["tokenizer.json"])["model"]["merges"]
    assert values["merges"][: len(old_merges)] == old_merges
    made = {after[left + right] for left, right in values["merges"][len(old_merges) :]}
    assert min(made) >= base.vocab_size, "no new way to an old piece"


def test_old_unigram_pieces_stay_within_reach(tmp_path: Path) -> None:
    base, larger, _ = extended(make_unigram, tmp_path)
    models_ = [tokenizers.Tokenizer.from_str(t.files(None)["tokenizer.json"]).model for t in (base, larger)]
    reached = 0
    for piece, index in vocabulary(tmp_path, base).items():
        if [token.id for token in models_[0].tokenize(piece)] == [index]:
            assert [token.id for token in models_[1].tokenize(piece)] == [index], piece
            reached += 1
    assert reached > 100
    scores = [json.loads(t.files(None)["tokenizer.json"])["model"]["vocab"] for t in (base, larger)]
    assert scores[1][: len(scores[0])] == scores[0], "old scores do not change"


def test_a_rare_old_unigram_piece_wins_its_own_text(tmp_path: Path) -> None:
    """▁zebra and fish are frequent in the new text, so together they would be likelier than the old ▁zebrafish."""
    letters = [(letter, -8.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), *letters, ("▁zebrafish", -12.0)], 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    (tmp_path / "base").mkdir()
    backend.save(str(tmp_path / "base" / "tokenizer.json"))
    letters_once = ("abcdegjklmnopqtuvwxy", "yxwvutqponmlkjgedcba")
    texts = [f"zebra {one}{two}fish" for one, two in zip(*letters_once, strict=True)]
    extend_tokenizer(str(tmp_path / "base"), texts, tmp_path / "out", 2)
    tokenizer = open_tokenizer(str(tmp_path / "out"))
    pieces = [piece for piece, _ in json.loads(tokenizer.files(None)["tokenizer.json"])["model"]["vocab"]]
    assert pieces[29:] == ["▁zebra", "fish"]
    assert tokenizer.encode_batch(["zebra qfish", "zebrafish"]) == [[29, 1, 18, 30], [28]]


def test_strings_of_control_tokens_and_bytes_are_never_learned(tmp_path: Path) -> None:
    texts = [f"<|end|><|user|> </s> <0x0A><0x41> [SEP] {text}" for text in new_texts(200)]
    for make in MAKERS:
        base, larger, _ = extended(make, tmp_path / make.__name__, texts)
        attacks = [*larger.control_strings, *("<|end|>", "</s>", "<0x0A>", "[SEP]")]
        for ids in larger.encode_batch(attacks):
            assert not larger.holds_control_ids(ids)
        names = {index: piece for piece, index in vocabulary(tmp_path, larger).items()}
        learned = [names[index] for index in range(base.vocab_size, larger.vocab_size)]
        assert not any(mark in piece for piece in learned for mark in ("<|end|>", "<|user|>", "<0x0A>", "<0x41>"))


def test_tokens_added_after_the_vocabulary_keep_their_ids(tmp_path: Path) -> None:
    """The base's file numbers them from the size of its vocabulary, which grows."""
    base = make_byte_level(tmp_path / "base")
    values = json.loads((base / "tokenizer.json").read_text())
    size = len(values["model"]["vocab"])
    assert [token["id"] for token in values["added_tokens"]] == [size, size + 1, size + 2]
    (base / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>", "model_max_length": 512})
    )
    extend_tokenizer(str(base), new_texts(100), tmp_path / "out", 20)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [theirs.convert_tokens_to_ids(text) for text in ("<|begin|>", "<|end|>", "<|user|>", "<|pad|>")] == list(
        range(size, size + 4)
    )
    assert theirs.model_max_length == 512
    assert min(spelling(tmp_path / "out")) == size + 4


@pytest.mark.parametrize("make", MAKERS)
def test_extending_twice_gives_rows_for_both(tmp_path: Path, make: Any) -> None:
    base, first, _ = extended(make, tmp_path)
    again = [text.upper() for text in new_texts(300, seed=8)] if make is not make_wordpiece else ["zebra quagga"] * 60
    extend_tokenizer(str(tmp_path / "out"), again, tmp_path / "twice", 30)
    twice = open_tokenizer(str(tmp_path / "twice"))
    ids = spelling(tmp_path / "twice")
    assert sorted(ids) == list(range(base.vocab_size, twice.vocab_size))
    assert {index: ids[index] for index in range(base.vocab_size, first.vocab_size)} == spelling(tmp_path / "out")
    assert json.loads((tmp_path / "twice" / "extension.json").read_text())["base_vocab_size"] == base.vocab_size
    assert twice.vocab_size > first.vocab_size
    assert vocabulary(tmp_path, first).items() <= vocabulary(tmp_path, twice).items()


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_texts_give_the_same_files(tmp_path: Path, make: Any) -> None:
    extended(make, tmp_path / "one")
    extended(make, tmp_path / "two")
    for path in (tmp_path / "one" / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "out" / path.name).read_bytes(), path.name


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    base = make_byte_level(tmp_path / "base")
    with pytest.raises(DataConfigError, match="no piece that occurs twice"):
        extend_tokenizer(str(base), ["q"], tmp_path / "out", 5)
    with pytest.raises(MissingInputError, match=r"none\.txt: no such file"):
        extend_tokenizer(str(base), [tmp_path / "none.txt"], tmp_path / "out", 5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(CannotWriteError, match="not an empty folder"):
        extend_tokenizer(str(base), new_texts(50), tmp_path / "full", 5)
    (tmp_path / "words").mkdir()
    whole = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
    whole.save(str(tmp_path / "words" / "tokenizer.json"))
    with pytest.raises(DataConfigError, match="type WordLevel cannot be extended"):
        extend_tokenizer(str(tmp_path / "words"), new_texts(50), tmp_path / "out", 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "full", "words"]


def test_the_extension_travels_with_a_saved_tokenizer(tmp_path: Path) -> None:
    _, larger, _ = extended(make_byte_level, tmp_path)
    larger.save(tmp_path / "saved")
    assert spelling(tmp_path / "saved") == spelling(tmp_path / "out")


def test_the_command_says_what_the_pieces_bring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_byte_level(tmp_path / "base")
    (tmp_path / "a.txt").write_text("\n".join(text * 40 for text in new_texts(120)))
    words = ["tokenizer", "extend", str(base), str(tmp_path / "a.txt"), str(tmp_path / "out"), "--add", "40"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert f"40 pieces added to {base}" in printed
    assert "tokens per character: " in printed and "of the tokens there; most often " in printed
    assert main(words) == 73
    assert "exists and is not an empty folder" in capsys.readouterr().err


def beginning(sample: str, folder: Path, num_characters: int) -> Path:
    """The first lines of a sample file, which take a fraction of the time; with all examples, the whole of it."""
    if IS_LONG:
        return SAMPLES / sample
    text = (SAMPLES / sample).read_text(encoding="utf-8")
    path = folder / Path(sample).name
    path.write_text(text[: text.index("\n", num_characters) + 1], encoding="utf-8")
    return path


@samples
@pytest.mark.parametrize(
    ("name", "factor"), [("bytelevel_bpe_2k", 2.0), pytest.param("gpt2", 1.8, marks=pytest.mark.long)]
)
def test_chinese_pieces_make_chinese_text_much_shorter(tmp_path: Path, name: str, factor: float) -> None:
    inputs = [
        beginning("pretraining/cluecorpussmall/CLUECorpusSmall_sampled.txt", tmp_path, 60_000),
        beginning("generation/csl_ts/dev.tsv", tmp_path, 60_000),
        SAMPLES / "generation/alpaca_demo/alpaca_zh_demo.json",
    ]
    base = SAMPLES / "tokenizers" / name
    report = extend_tokenizer(str(base), inputs, tmp_path / "out", 1500)
    assert report.after.held_out and report.num_pieces == 1500
    assert report.before.tokens_per_character > factor * report.after.tokens_per_character
    old, new = open_tokenizer(str(base)), open_tokenizer(str(tmp_path / "out"))
    english = (SAMPLES / "pretraining/tinyshakespeare/input.txt").read_text().split("\n\n")[:500]
    same = [a == b for a, b in zip(old.encode_batch(english), new.encode_batch(english), strict=True)]
    assert sum(same) > 0.98 * len(same)  # the Chinese text has English words in it, too


@samples
@pytest.mark.parametrize(
    "name",
    ["sentencepiece_2k", pytest.param("t5_sentencepiece_32k", marks=pytest.mark.long), "bert_uncased_en", "bert_zh"],
)
def test_sample_tokenizers_learn_a_domain_and_keep_the_rest(tmp_path: Path, name: str) -> None:
    base = SAMPLES / "tokenizers" / name
    questions = beginning("generation/gsm8k/train.jsonl", tmp_path, 300_000)
    report = extend_tokenizer(str(base), [questions], tmp_path / "out", 500)
    assert report.after.num_tokens < report.before.num_tokens
    old, new = open_tokenizer(str(base)), open_tokenizer(str(tmp_path / "out"))
    own = "cluecorpussmall/CLUECorpusSmall_sampled.txt" if name == "bert_zh" else "tinyshakespeare/input.txt"
    other = (SAMPLES / "pretraining" / own).read_text().split()[:20000]
    same = [a == b for a, b in zip(old.encode_batch(other), new.encode_batch(other), strict=True)]
    assert sum(same) > 0.85 * len(same)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["James earns $20 an hour.", "Natalia sold 48/2 = <<48/2=24>>24 clips in May.", *other[:200]]
    assert [theirs(t, add_special_tokens=False)["input_ids"] for t in texts] == new.encode_batch(texts)
