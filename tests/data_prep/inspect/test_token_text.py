"""Tokens become whole characters again, and nothing in them acts on a terminal."""

from pathlib import Path

import pytest
from data_fixtures import bert_vocabulary, byte_level_folder, sentencepiece_folder
from hypothesis import given
from hypothesis import strategies as st

from data_prep.inspect.token_text import TokenText, clean, visible
from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_tokenizer(str(byte_level_folder(tmp_path_factory.mktemp("byte_level"))))


@pytest.mark.parametrize("kind", ["byte_level", "bpe", "unigram", "bert"])
def test_pieces_are_the_decoded_text(tmp_path: Path, kind: str) -> None:
    folder = {
        "byte_level": lambda: byte_level_folder(tmp_path / "in"),
        "bpe": lambda: sentencepiece_folder(tmp_path / "in", "bpe"),
        "unigram": lambda: sentencepiece_folder(tmp_path / "in", "unigram"),
        "bert": lambda: bert_vocabulary(tmp_path / "in" / "vocab.txt"),
    }[kind]()
    tokenizer = open_tokenizer(str(folder))
    tokenizer.save(tmp_path / "out")
    text = "the river  runs 漢字 naïve 😀\n\tbirds don" if kind != "bert" else "the river runs under birds don"
    ids = tokenizer.encode_batch([text])[0]
    pieces = TokenText(tmp_path / "out").pieces(ids, [None] * len(ids))
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids) == text
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == len(ids)
    if kind != "bert":
        smiley = next(piece for piece in pieces if "😀" in piece.text)
        assert smiley.stop - smiley.start >= 4 and smiley.text == "😀", "bytes of one character are one piece"


def test_ideographs_of_wordpiece_stand_together(tmp_path: Path) -> None:
    file = bert_vocabulary(tmp_path / "vocab.txt")
    file.write_bytes(file.read_bytes() + "漢\n字\n".encode())
    tokenizer = open_tokenizer(str(file))
    tokenizer.save(tmp_path / "out")
    ids = tokenizer.encode_batch(["the 漢字 river"])[0]
    pieces = TokenText(tmp_path / "out").pieces(ids, [None] * len(ids))
    assert [piece.text for piece in pieces] == ["the", "漢", "字", " river"]


_READ: list[tuple[Tokenizer, TokenText]] = []


@given(st.text())
def test_any_text_comes_out_of_its_pieces(text: str) -> None:
    if not _READ:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            tokenizer = open_tokenizer(str(byte_level_folder(Path(folder) / "in")))
            tokenizer.save(Path(folder) / "out")
            _READ.append((tokenizer, TokenText(Path(folder) / "out")))
    tokenizer, reader = _READ[0]
    ids = tokenizer.encode_batch([text])[0]
    pieces = reader.pieces(ids, [None] * len(ids))
    assert "".join(piece.text for piece in pieces) == text
    for runs in visible([piece.text for piece in pieces]):
        for shown, is_sign in runs:
            assert all(char.isprintable() or (char == "\n" and is_sign) for char in shown), ascii(shown)


def test_a_character_cut_by_marks_or_borders_is_shown_as_bytes(tmp_path: Path, byte_level: Tokenizer) -> None:
    byte_level.save(tmp_path)
    reader = TokenText(tmp_path)
    ids = byte_level.encode_batch(["Ω€"])[0]
    assert len(ids) == 5
    cut = reader.pieces(ids, [False, False, False, True, True])
    assert [piece.text for piece in cut] == ["Ω", "\udce2", "\udc82", "\udcac"]
    assert visible(["\udce2"]) == [[("<0xE2>", True)]]
    assert [piece.text for piece in reader.pieces(ids[1:4], [None] * 3)] == ["\udca9", "\udce2\udc82"]
    assert reader.token_bytes(60000) == b"<no token 60000>"


def test_blanks_are_visible_where_they_could_be_missed() -> None:
    def line(*texts: str) -> str:
        return "".join(shown for runs in visible(texts) for shown, _ in runs)

    assert line("a b", " c") == "a b c"
    assert line("a", " ", "b") == "a b"
    assert line("a  b") == "a··b"
    assert line("a ", " b") == "a··b"
    assert line(" a\n", " b ") == "·a↵\n·b·"
    assert line("\t\x00\x7f\r\x9b\u202e") == "⇥␀␡␍<U+009B><U+202E>"
    assert clean("a\nb\x1b[1m") == "a↵b␛[1m"
