"""Both encoders give the same ids, and one different id ends a preparation."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import bert_vocabulary, byte_level_folder, sentencepiece_folder, sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import BadDataError, DataConfigError
from data_prep.tokenizer.backends import Backend, GigatokenBackend, TokenizersBackend, open_backend
from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.tokenizer import FlatIds, Tokenizer


def encode_each(tokenizer: Tokenizer, texts: list[str], rendered: bool = False) -> list[list[int]]:
    encode = tokenizer.encode_rendered if rendered else tokenizer.encode_flat
    return [encode([text])[0].tolist() for text in texts]


def split(result: FlatIds) -> list[list[int]]:
    ids, ends = result
    return [part.tolist() for part in np.split(ids, ends[:-1])]


def test_flat_ids_are_those_of_each_text(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(byte_level_folder(tmp_path)))
    texts = [*sentences(150), "", "<|end|> is text here"]
    backend = TokenizersBackend(tokenizer)
    assert split(backend.encode(texts)) == tokenizer.encode_batch(texts)
    assert split(backend.encode_rendered(texts)) == encode_each(tokenizer, texts, rendered=True)
    assert tokenizer.eos_id in split(backend.encode_rendered(texts))[-1]
    assert tokenizer.eos_id not in split(backend.encode(texts))[-1]
    ids, ends = backend.encode([])
    assert len(ids) == len(ends) == 0


def test_auto_falls_back_where_the_fast_one_cannot(tmp_path: Path) -> None:
    for folder in (sentencepiece_folder(tmp_path / "s"), bert_vocabulary(tmp_path / "vocab.txt")):
        tokenizer = open_tokenizer(str(folder))
        assert open_backend("auto", tokenizer).name == "tokenizers"


class TestGigatoken:
    """With the real library, where it is installed."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("gigatoken")

    @pytest.fixture
    def tokenizer(self, tmp_path: Path) -> Tokenizer:
        return open_tokenizer(str(byte_level_folder(tmp_path)))

    @pytest.fixture
    def backend(self, tokenizer: Tokenizer) -> Backend:
        opened = open_backend("auto", tokenizer)
        assert opened.name == "gigatoken"
        return opened

    def test_same_ids_short_long_and_with_control_strings(self, tokenizer: Tokenizer, backend: Backend) -> None:
        texts = [
            *sentences(300, 3),
            "",
            " ",
            "<|end|>",
            "a<|begin|>b<|end|>",
            "x" * 5000,
            "漢字 " * 900,
            "\ufdee apart",
        ]
        reference = TokenizersBackend(tokenizer)
        for _ in range(2):
            assert split(backend.encode(texts)) == split(reference.encode(texts))
            assert split(backend.encode_rendered(texts)) == split(reference.encode_rendered(texts))

    @settings(max_examples=60, deadline=None)
    @given(texts=st.lists(st.text(alphabet=st.characters(codec="utf-8"), max_size=60), max_size=8))
    def test_same_ids_for_any_text(self, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
        tokenizer = open_tokenizer(str(byte_level_folder(tmp_path_factory.mktemp("t"))))
        backend = GigatokenBackend(tokenizer)
        assert split(backend.encode(texts)) == split(TokenizersBackend(tokenizer).encode(texts))

    def test_one_different_id_closes_the_gate(self, tokenizer: Tokenizer) -> None:
        from gigatoken.gigatoken_rs import load_hf_json

        backend = GigatokenBackend(tokenizer)
        merges = json.loads(tokenizer.pipeline_json)["model"]["merges"]
        model = {**json.loads(tokenizer.pipeline_json)["model"], "merges": merges[:-1]}
        backend._engines["plain"] = load_hf_json(tokenizer.pipeline_with(model=model))
        last = "".join(merges[-1]).replace("Ġ", " ")
        with pytest.raises(BadDataError, match=r"encode a text differently .*set data.backend: tokenizers"):
            backend.encode([f"{last} {last}"])

    def test_a_pipeline_it_reads_in_its_own_way_is_refused(self, tmp_path: Path) -> None:
        folder = byte_level_folder(tmp_path)
        pipeline = json.loads((folder / "tokenizer.json").read_text())
        pipeline["pre_tokenizer"]["use_regex"] = False
        (folder / "tokenizer.json").write_text(json.dumps(pipeline))
        tokenizer = open_tokenizer(str(folder))
        with pytest.raises((BadDataError, DataConfigError)):
            open_backend("gigatoken", tokenizer)
        assert open_backend("auto", tokenizer).name == "tokenizers"

    def test_the_engine_is_opened_anew_when_its_cache_has_grown(
        self, tokenizer: Tokenizer, backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert isinstance(backend, GigatokenBackend)
        backend.encode(["a"])
        before = backend._engines["plain"]
        monkeypatch.setattr("data_prep.tokenizer.backends._GROWTH_LIMIT_BYTES", -(1 << 40))
        monkeypatch.setattr("data_prep.tokenizer.backends._MEASURED_EVERY_CHARACTERS", 1)
        texts = sentences(5)
        assert split(backend.encode(texts)) == tokenizer.encode_batch(texts)
        assert backend._engines["plain"] is not before
