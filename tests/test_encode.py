"""Records to documents: which ids, which targets."""

from pathlib import Path

import pytest
from data_fixtures import bert_vocabulary, byte_level_folder, sentencepiece_folder, sentences

from data_prep.encode import encode_causal_lm, encode_sequence_classification, flatten
from data_prep.errors import BadDataError
from data_prep.records import Record
from data_prep.tokenizer import Tokenizer, open_tokenizer
from data_prep.worker import id_type


def records(*values: dict[str, object]) -> list[Record]:
    return [Record(value, f"a.jsonl:{line}", line) for line, value in enumerate(values, 1)]


@pytest.fixture(params=["with bos", "without"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "with bos":
        return open_tokenizer(str(sentencepiece_folder(tmp_path)))
    return open_tokenizer(str(byte_level_folder(tmp_path)))


def test_plain_text_trains_all_but_the_first_token(tokenizer: Tokenizer) -> None:
    texts = sentences(20)
    for text, document in zip(
        texts, encode_causal_lm(records(*({"text": t} for t in texts)), tokenizer, None), strict=True
    ):
        content = tokenizer.encode_batch([text])[0]
        assert document.input_ids == [*tokenizer.prefix_ids, *content, tokenizer.eos_id]
        assert document.targets == [False] + [True] * (len(document.input_ids) - 1)


def test_prompt_and_response_are_encoded_apart_and_the_response_is_trained(tokenizer: Tokenizer) -> None:
    document = encode_causal_lm(records({"prompt": "the river", "response": "runs under"}), tokenizer, None)[0]
    prompt, response = tokenizer.encode_batch(["the river", "runs under"])
    assert document.input_ids == [*tokenizer.prefix_ids, *prompt, *response, tokenizer.eos_id]
    assert document.targets == [False] * (len(tokenizer.prefix_ids) + len(prompt)) + [True] * (len(response) + 1)


def test_the_first_token_is_never_a_target_even_without_a_prompt(tokenizer: Tokenizer) -> None:
    document = encode_causal_lm(records({"prompt": "", "response": "runs under"}), tokenizer, None)[0]
    assert document.targets == [False] + [True] * (len(document.input_ids) - 1)


def test_shapes_may_be_mixed_and_keep_their_order(tokenizer: Tokenizer) -> None:
    mixed = records({"text": "a river"}, {"prompt": "b", "response": "boats"}, {"text": "c"})
    together = encode_causal_lm(mixed, tokenizer, None)
    assert together == [encode_causal_lm([record], tokenizer, None)[0] for record in mixed]
    assert [document.line for document in together] == [1, 2, 3]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"text": ""}, "nothing in this record would be trained: no text"),
        ({"prompt": "a", "response": ""}, "nothing in this record would be trained: the response is empty"),
        ({"prompt": "a"}, r"field 'response' is missing \(fields: prompt\)"),
        ({"text": 3}, "field 'text' must be text, not a number"),
        ({"text": None}, "field 'text' must be text, not null"),
    ],
)
def test_records_without_targets(tokenizer: Tokenizer, value: dict[str, object], words: str) -> None:
    with pytest.raises(BadDataError, match=rf"^a\.jsonl:2: {words}"):
        encode_causal_lm(records({"text": "fine"}, value), tokenizer, None)


def test_classification_uses_the_tokenizers_own_special_tokens(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(bert_vocabulary(tmp_path / "vocab.txt")))
    label_index = {"bad": 0, "good": 1}
    first, second = encode_sequence_classification(
        records({"text": "the river", "label": "good"}, {"text": "boats and birds drift past", "label": "bad"}),
        tokenizer, label_index, 5,
    )  # fmt: skip
    content = tokenizer.encode_batch(["boats and birds drift past"])[0]
    assert first.input_ids == [2, *tokenizer.encode_batch(["the river"])[0], 3] and not first.truncated
    assert second.input_ids == [2, *content[:3], 3] and second.truncated
    assert (first.label, second.label) == (1, 0)
    for value, words in (
        ({"text": "a", "label": "so-so"}, "label 'so-so' is not one of bad, good"),
        ({"text": "a"}, "field 'label' is missing"),
        ({"text": "", "label": "bad"}, "the text is empty"),
    ):
        with pytest.raises(BadDataError, match=words):
            encode_sequence_classification(records(value), tokenizer, label_index, None)


def test_columns_are_the_documents_one_after_the_other(tokenizer: Tokenizer) -> None:
    documents = encode_causal_lm(records(*({"text": text} for text in sentences(5))), tokenizer, None)
    columns = flatten(documents, id_type(tokenizer.vocab_size))
    assert columns.input_ids.tolist() == [index for document in documents for index in document.input_ids]
    assert columns.marks.tolist() == [int(mark) for document in documents for mark in document.targets]
    assert columns.lengths.tolist() == [len(document.input_ids) for document in documents]
    assert columns.lines.tolist() == [1, 2, 3, 4, 5]


def test_id_type_is_the_smallest_that_holds_the_vocabulary() -> None:
    assert [id_type(size).name for size in (10, 65_536, 65_537, 262_144)] == ["uint16", "uint16", "uint32", "uint32"]
