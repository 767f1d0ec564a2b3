"""Windows over words: compared with a search of all windows, and what the documents of tags and roles look like."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fixtures import bert_vocabulary, prepared, section, write_jsonl
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import PreparationError
from data_prep.inspect.rows import Selection
from data_prep.inspect.terminal import describe
from data_prep.tasks.tagged_words import word_windows
from data_prep.tokenizer.open import open_tokenizer


@settings(examples(400))
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=40), room=st.integers(7, 20), stride=st.integers(0, 19))
def test_each_word_is_scored_where_it_is_farthest_from_a_cut(sizes: list[int], room: int, stride: int) -> None:
    windows = word_windows(sizes, room, min(stride, room - 1))
    begins = np.cumsum([0, *sizes]).tolist()
    assert all(begins[one.stop] - begins[one.first] <= room for one in windows)
    assert windows[0].first == 0 and windows[-1].stop == len(sizes)
    for before, after in pairwise(windows):
        assert before.first < after.first and before.stop < after.stop
        assert begins[before.stop] - begins[after.first] <= max(0, min(stride, room - 1))
    scored = [word for one in windows for word in range(one.scored_first, one.scored_stop)]
    assert scored == list(range(len(sizes))), "each word once, and in order"
    for number, one in enumerate(windows):
        for word in range(one.scored_first, one.scored_stop):
            distances = [
                min(
                    begins[word] - begins[other.first] if other.first else 10**6,
                    begins[other.stop] - begins[word + 1] if other.stop < len(sizes) else 10**6,
                )
                if other.first <= word < other.stop
                else -1
                for other in windows
            ]
            assert distances.index(max(distances)) == number


def store_of(folder: Path, task: str, records: list[dict[str, Any]], **more: Any) -> Any:
    path = write_jsonl(folder / "a.jsonl", records)
    vocabulary = bert_vocabulary(folder / "vocab.txt")
    return prepared(section(folder, vocabulary, path, **{"row_tokens": 16, "stride_tokens": 4, **more}), task)[0]


WORDS = ["ab", "river", "abcd", "the", "xyz", "of", "stone", "qqqqqqqqqqqqqqqqqqqq"]
LONG = {"tokens": WORDS, "tags": ["A", "B", "A", "B", "O", "O", "A", "B"]}
SHORT = {"tokens": ["the", "river"], "tags": ["O", "B"]}


def test_windows_are_counted_and_their_cut_words_too(tmp_path: Path) -> None:
    store = store_of(tmp_path, "token_classification", [SHORT, LONG, SHORT], overlong="split")
    total = store.manifest["ledger"]["total"]
    numbers = store.column("sentence_numbers").tolist()
    assert numbers[0] == 0 and numbers[-1] == 2 and set(numbers[1:-1]) == {1}
    assert total["extra_documents"] == len(numbers) - 3 > 0 and total["notes"] == {"windowed": 1}
    assert total["tokens_cut"] == 20 - 14 and total["targets_cut"] == 0 and total["truncated"] == 1
    assert total["targets"] == 2 + 8 + 2
    lengths = [len(store.tokens(document)) for document in range(store.num_documents)]
    assert max(lengths) <= 16


def test_other_policies_keep_their_meaning(tmp_path: Path) -> None:
    dropped = store_of(tmp_path / "drop", "token_classification", [SHORT, LONG], overlong="drop")
    assert dropped.num_documents == 2 and dropped.manifest["ledger"]["total"]["dropped"]["overlong"] == 1
    cut = store_of(tmp_path / "cut", "token_classification", [SHORT, LONG], overlong="truncate")
    assert cut.num_documents == 2 and cut.manifest["ledger"]["total"]["truncated"] == 1
    assert "sentence_numbers" not in cut.columns and "word_starts" not in cut.columns
    with pytest.raises(PreparationError, match=r"a\.jsonl:2: 35 tokens do not fit a row"):
        store_of(tmp_path / "error", "token_classification", [SHORT, LONG])


def test_every_piece_has_the_tag_of_its_word(tmp_path: Path) -> None:
    first = store_of(tmp_path / "1", "token_classification", [SHORT, LONG], row_tokens=64)
    every = store_of(tmp_path / "2", "token_classification", [SHORT, LONG], row_tokens=64, tag_pieces="every")
    for document, record in enumerate((SHORT, LONG)):
        tags, starts = every.token_column("tags", document), every.token_column("word_starts", document)
        assert first.token_column("tags", document).tolist() == np.where(starts == 1, tags, -1).tolist()
        assert [every.label_names[tag] for tag in tags[starts == 1]] == record["tags"]
        pieces = open_tokenizer(str(tmp_path / "2" / "vocab.txt")).encode_words([record["tokens"]])[0][1]
        assert [every.label_names[tag] for tag in tags[1:-1]] == [
            record["tags"][word] for word in pieces if word is not None
        ]
        assert every.targets(document).tolist() == [False, *[True] * len(pieces), False]


@pytest.mark.parametrize(
    ("task", "more", "words"),
    [
        ("token_classification", {"overlong": "split", "stride_tokens": 14}, "set data.stride_tokens to 3, or raise"),
        ("token_classification", {"overlong": "split", "deduplicate": True}, "are not duplicates"),
        ("sequence_classification", {"tag_pieces": "every"}, "tag_pieces belongs to tags of words"),
        ("sequence_classification", {"overlong": "split"}, "split would cut the examples"),
    ],
    ids=["stride", "deduplicate", "pieces", "other task"],
)
def test_settings_that_cannot_be_meant(task: str, more: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(PreparationError, match=words):
        store_of(tmp_path, task, [LONG], **more)


GAVE = {"tokens": ["river", "runs", "under"], "predicate": 1, "roles": ["ARG0", "V", "ARG1"]}


def test_sentences_without_a_predicate_are_an_error_or_dropped_and_counted(tmp_path: Path) -> None:
    records = [GAVE, {**GAVE, "predicate": [], "roles": ["O", "O", "O"]}]
    with pytest.raises(PreparationError, match=r"a\.jsonl:2: .*the sentence has no predicate .*min_targets: 1 drops"):
        store_of(tmp_path, "semantic_roles", records)
    store = store_of(tmp_path, "semantic_roles", records, min_targets=1)
    assert store.num_documents == 1 and sum(store.ledger["total"]["dropped_at_encoding"].values()) == 1
    assert store.label_names == ("ARG0", "ARG1", "V")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"predicate": 3}, r"a\.jsonl:2: field 'predicate' must be the number of a word, 0 to 2, .* not 3"),
        ({"predicate": "gave"}, r"a\.jsonl:2: .*'predicate' must be the number of a word"),
        ({"predicate": [1, True]}, r"not a boolean"),
        ({"roles": ["ARG0", "V"]}, r"a\.jsonl:2: 3 words in field 'tokens', but 2 tags in field 'roles'"),
    ],
    ids=["outside", "text", "boolean", "too few"],
)
def test_faulty_roles_are_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(PreparationError, match=words):
        store_of(tmp_path, "semantic_roles", [GAVE, {**GAVE, **change}, GAVE])


def test_long_sentences_with_roles_repeat_the_predicate_in_each_window(tmp_path: Path) -> None:
    tokens = ["the", "river"] * 12
    record = {"tokens": tokens, "predicate": [3], "roles": [f"A{place % 3}" for place in range(24)]}
    store = store_of(tmp_path, "semantic_roles", [record], overlong="split")
    assert store.num_documents > 1
    found: list[str] = []
    for document in range(store.num_documents):
        ids, types = store.tokens(document).tolist(), store.token_column("predicate_types", document).tolist()
        river = ids[types.index(1)]
        assert ids[-2:] == [river, 3] and types[-2:] == [1, 1] and len(ids) <= 16
        found += [store.label_names[tag] for tag in store.token_column("tags", document)[store.targets(document)]]
    assert found == record["roles"]
    shown = "\n".join(describe(store.path, Selection(number=0, count=9), color=False))
    assert "predicate at token 4" in shown and "predicate at token 14" in shown


def test_a_conllu_file_for_roles_needs_the_format_with_roles(tmp_path: Path) -> None:
    line = "1\tgo\tgo\tVERB\tVB\t_\t0\troot\t_\t_\tgo.01\tV\n\n"
    path = tmp_path / "a.conllu"
    path.write_text(line)
    values = section(tmp_path, bert_vocabulary(tmp_path / "vocab.txt"), path)
    with pytest.raises(PreparationError, match="`format: conllup` reads the predicates and roles"):
        prepared(values, "semantic_roles")
