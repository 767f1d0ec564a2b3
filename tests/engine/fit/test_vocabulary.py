"""A tokenizer with more tokens than the model has rows: what counts are the ids that the data use."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from store_fixtures import VOCABULARY, SourceDocuments, make_store
from tokenizers import AddedToken

from data_prep.rows.arrange import RowPlan
from data_prep.token_store import TokenStore, documents_with_ids_from, largest_id
from engine.fit.vocabulary import check_tokenizer, check_vocabulary

ADDED = ("<|im_start|>", "<|im_end|>", "<image>")


def store(folder: Path, *documents: list[int], name: str = "store") -> TokenStore:
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ADDED])
    records = SourceDocuments("records", [(ids, [False] + [True] * (len(ids) - 1)) for ids in documents])
    size = VOCABULARY + len(ADDED)
    return make_store(
        folder / name, [records], RowPlan(16, "best_fit", "error", 1), vocab_size=size, tokenizer=tokenizer
    )[0]


@pytest.mark.parametrize(
    ("documents", "rows", "verdict", "said"),
    [
        (([1, 2], [3, 4]), VOCABULARY + 3, None, ""),
        (([1, 2], [3, 4]), VOCABULARY, "warning", "no record uses the rest ('<|im_start|>' (id 300), '<|im_end|>'"),
        (([1, 301], [300, 4]), VOCABULARY + 2, "warning", "('<image>' (id 302); the largest id in use is 301), so it"),
        (([300, 301], [300, 4]), VOCABULARY, "error", "2 tokens beyond them: '<|im_start|>' (id 300, in 2 documents)"),
        (([300, 301], [300, 4]), VOCABULARY, "error", "--special '<|im_start|>' --special '<|im_end|>'`, then"),
        (([1, 302],), VOCABULARY + 2, "error", "'<image>' (id 302, in 1 documents)"),
        (([1, 302], [7, 7]), 100, "error", "prepare the data with the model's own tokenizer"),
    ],
)
def test_ids_in_use_decide(
    tmp_path: Path, documents: tuple[list[int], ...], rows: int, verdict: str | None, said: str
) -> None:
    found = check_vocabulary("model.path model", rows, VOCABULARY + 3, [store(tmp_path, *documents)])
    assert (None if found is None else found.verdict) == verdict
    assert found is None or (said in found.text and found.text.startswith("model.path: model: vocabulary mismatch: "))
    assert found is None or found.code == (65 if verdict == "error" else 78)


def test_held_out_records_count_as_well(tmp_path: Path) -> None:
    both = [store(tmp_path, [1, 2]), store(tmp_path, [1, 300], [300, 2], name="held-out")]
    found = check_vocabulary("model.config", VOCABULARY, VOCABULARY + 3, both)
    assert found is not None and "in 2 documents" in found.text and "leave model.config.vocab_size out" in found.text


def test_before_there_is_a_store_it_is_a_warning(tmp_path: Path) -> None:
    folder = store(tmp_path, [1, 2]).tokenizer_dir
    found = check_tokenizer("model.path model", VOCABULARY + 1, VOCABULARY + 3, folder)
    assert found is not None and found.verdict == "warning"
    assert "records that use '<|im_end|>' (id 301), '<image>' (id 302) will be refused" in found.text
    assert check_tokenizer("model.path model", VOCABULARY + 3, VOCABULARY + 3, folder) is None


def test_ids_are_counted_as_numpy_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(3)
    documents = [draw.integers(0, VOCABULARY, draw.integers(2, 16)).tolist() for _ in range(50)]
    made = store(tmp_path, *documents)
    monkeypatch.setattr("data_prep.token_store.ids._BLOCK_TOKENS", 37)
    assert largest_id(made) == max(map(max, documents)), "of an older store, whose manifest does not have it"
    expected = {token: sum(token in ids for ids in documents) for token in range(250, VOCABULARY)}
    assert documents_with_ids_from(made, 250) == {token: count for token, count in expected.items() if count}
