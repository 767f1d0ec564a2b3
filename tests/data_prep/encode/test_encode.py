"""Examples to documents: which ids, which targets, compared with the tokenizer asked one text at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fixtures import bert_vocabulary, byte_level_folder, sentencepiece_folder, sentences

from data_prep.encode.blocks import Block, Names, marks_of, spans_to_marks
from data_prep.encode.content import Context
from data_prep.errors import BadDataError, UntrainableError
from data_prep.shapes.examples import (
    Example,
    LabelledExample,
    PromptExample,
    QuestionExample,
    ScoredExample,
    TaggedExample,
    TextExample,
)
from data_prep.sources.records import Record
from data_prep.tasks import causal_lm, question_answering, seq2seq_lm, sequence_classification, token_classification
from data_prep.tokenizer.backends import TokenizersBackend
from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.tokenizer import Tokenizer, id_type


def context(tokenizer: Tokenizer, **more: Any) -> Context:
    return Context(tokenizer, TokenizersBackend(tokenizer), None, Names(), **more)


def records(count: int) -> list[Record]:
    return [Record({}, f"a.jsonl:{line}", line) for line in range(1, count + 1)]


def encode(examples: list[Example], tokenizer: Tokenizer, **more: Any) -> Block:
    return causal_lm.encode(records(len(examples)), examples, context(tokenizer, **more))


def documents(block: Block, column: str = "input_ids") -> list[list[int]]:
    ends = np.cumsum(block.columns["lengths"].astype(np.int64))
    values = marks_of(block.columns) if column == "marks" else block.columns[column]
    return [part.tolist() for part in np.split(values, ends[:-1])]


@pytest.fixture(params=["with bos", "without"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "with bos":
        return open_tokenizer(str(sentencepiece_folder(tmp_path)))
    return open_tokenizer(str(byte_level_folder(tmp_path)))


@pytest.fixture
def bert(tmp_path: Path) -> Tokenizer:
    return open_tokenizer(str(bert_vocabulary(tmp_path / "vocab.txt")))


def test_plain_text_trains_all_but_the_first_token(tokenizer: Tokenizer) -> None:
    texts = sentences(200)
    block = encode([TextExample(text) for text in texts], tokenizer)
    for content, ids, marks in zip(
        tokenizer.encode_batch(texts), documents(block), documents(block, "marks"), strict=True
    ):
        assert ids == [*tokenizer.prefix_ids, *content, tokenizer.eos_id]
        assert marks == [0] + [1] * (len(ids) - 1)
    assert block.columns["lines"].tolist() == list(range(1, 201))
    assert block.num_targets == sum(map(sum, documents(block, "marks")))


def test_prompt_and_response_are_encoded_apart_and_the_response_is_trained(tokenizer: Tokenizer) -> None:
    block = encode([PromptExample("the river", "runs under"), PromptExample("", "boats")], tokenizer)
    prompt, response, boats = tokenizer.encode_batch(["the river", "runs under", "boats"])
    before = tokenizer.prefix_ids
    assert documents(block) == [
        [*before, *prompt, *response, tokenizer.eos_id], [*before, *boats, tokenizer.eos_id]
    ]  # fmt: skip
    first, second = documents(block, "marks")
    assert first == [0] * (len(before) + len(prompt)) + [1] * (len(response) + 1)
    assert second[0] == 0 and sum(second) == len(boats) + 1 - (not before), "the first token is never a target"
    assert (block.num_answers, block.num_stops) == (2, 2)


def test_prompts_are_trained_too_where_that_is_asked_for(tokenizer: Tokenizer) -> None:
    block = encode([PromptExample("the river", "runs under")], tokenizer, train_on_prompt=True)
    assert documents(block, "marks")[0] == [0] + [1] * (block.num_tokens - 1)


def test_kinds_of_examples_keep_their_order(tokenizer: Tokenizer) -> None:
    mixed: list[Example] = [
        TextExample("a river"),
        PromptExample("b", "boats"),
        PromptExample("c", "d"),
        TextExample("e"),
    ]
    together = documents(encode(mixed, tokenizer))
    assert together == [documents(encode([example], tokenizer))[0] for example in mixed]


@pytest.mark.parametrize(
    ("examples", "indices", "words"),
    [
        ([TextExample("fine"), TextExample("")], (1,), "no text"),
        ([PromptExample("a", "b"), PromptExample("a", ""), PromptExample("", "")], (1, 2), "the response is empty"),
        ([TextExample("a"), PromptExample("a", "b"), PromptExample("a", "")], (2,), "the response is empty"),
    ],
)
def test_what_trains_nothing_is_named(
    tokenizer: Tokenizer, examples: list[Example], indices: tuple[int, ...], words: str
) -> None:
    with pytest.raises(UntrainableError, match=rf"^a\.jsonl:{indices[0] + 1}: nothing .*{words}") as caught:
        encode(examples, tokenizer)
    assert caught.value.indices == indices


def test_marks_of_spans_may_share_a_token() -> None:
    assert spans_to_marks(6, np.array([0, 2, 3]), np.array([1, 4, 5])).tolist() == [1, 0, 1, 1, 1, 0]
    assert spans_to_marks(0, np.array([], int), np.array([], int)).tolist() == []


def test_classification_uses_the_tokenizers_own_special_tokens(bert: Tokenizer) -> None:
    examples: list[Example] = [
        LabelledExample("the river", ("good",)), LabelledExample("boats and birds drift past", ("bad",))
    ]  # fmt: skip
    ready = context(bert, limit_tokens=5)
    block = sequence_classification.encode(records(2), examples, ready)
    river, boats = bert.encode_batch(["the river", "boats and birds drift past"])
    assert documents(block) == [[2, *river, 3], [2, *boats[:3], 3]]
    assert block.num_truncated == 1 and block.num_targets == 2
    assert block.columns["labels"].tolist() == [0, 1] and list(ready.names.index) == ["good", "bad"]
    with pytest.raises(UntrainableError, match=r"a\.jsonl:2: .*the text is empty"):
        sequence_classification.encode(records(2), [examples[0], LabelledExample("", ("bad",))], ready)


def test_pairs_are_cut_at_their_longer_text(bert: Tokenizer) -> None:
    one, two = "the river runs under an old stone bridge", "boats drift"
    first, second = bert.encode_batch([one, two])
    for limit, keep in ((100, (len(first), len(second))), (10, (10 - 3 - len(second), len(second))), (7, (2, 2))):
        block = sequence_classification.encode(
            records(1), [LabelledExample(one, ("a",), two)], context(bert, limit_tokens=limit)
        )
        assert documents(block) == [[2, *first[: keep[0]], 3, *second[: keep[1]], 3]]
        assert block.columns["pair_starts"].tolist() == [2 + keep[0]]


def test_many_labels_and_scores(bert: Tokenizer) -> None:
    many: list[Example] = [LabelledExample("a", ("x", "y"), many=True), LabelledExample("b", (), many=True)]
    block = sequence_classification.encode(records(2), many, context(bert))
    assert block.columns["label_sets"].tolist() == [0, 1]
    assert block.columns["label_sets_lengths"].tolist() == [2, 0]
    block = sequence_classification.encode(records(1), [ScoredExample("a", 2.5)], context(bert))
    assert block.columns["scores"].tolist() == [2.5] and "labels" not in block.columns


def test_tags_stand_on_the_first_token_of_each_word(bert: Tokenizer) -> None:
    words = ("bridges", "\u200d", "of", "stone")  # the second becomes no token at all
    block = token_classification.encode(
        records(1), [TaggedExample(words, ("A", "B", "O", "A"))], context(bert, limit_tokens=None)
    )
    pieces = [bert.encode_batch([word])[0] or [bert.unk_id] for word in words]
    assert documents(block) == [[2, *(index for piece in pieces for index in piece), 3]]
    tags = documents(block, "tags")[0]
    starts = np.cumsum([1, *map(len, pieces)])[:-1].tolist()
    assert [place for place, tag in enumerate(tags) if tag >= 0] == starts
    assert [tags[place] for place in starts] == [0, 1, 2, 0]
    cut = token_classification.encode(
        records(1), [TaggedExample(words, ("A", "B", "O", "A"))], context(bert, limit_tokens=len(pieces[0]) + 2)
    )
    assert documents(cut) == [[2, *pieces[0], 3]] and cut.num_truncated == 1


def test_words_of_a_byte_level_tokenizer_keep_their_blanks(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(byte_level_folder(tmp_path)))
    block = token_classification.encode(
        records(1), [TaggedExample(("the", "river", "runs"), ("O", "B", "O"))], context(tokenizer)
    )
    assert tokenizer.decode(documents(block)[0]) == "the river runs"


def test_windows_share_their_stride_and_hold_the_answers(bert: Tokenizer) -> None:
    text = " ".join(sentences(6, 4))
    answer = text.split(" ")[20]
    start = len(" ".join(text.split(" ")[:20])) + 1
    examples: list[Example] = [
        QuestionExample("boats and birds", text, ((start, answer),)), QuestionExample("how many", "oil barrels", ())
    ]  # fmt: skip
    block = question_answering.encode(records(2), examples, context(bert, row_tokens=32, stride_tokens=8))
    question, content, other, oil = bert.encode_batch(["boats and birds", text, "how many", "oil barrels"])
    room = 32 - 3 - len(question)
    windows = [content[begin : begin + room] for begin in range(0, len(content) - 8, room - 8)]
    expected = [[2, *question, 3, *window, 3] for window in windows] + [[2, *other, 3, *oil, 3]]
    assert documents(block) == expected and block.num_extra == len(windows) - 1
    assert block.columns["questions"].tolist() == [0] * len(windows) + [1]
    counts = block.columns["answer_spans_lengths"].tolist()
    assert sum(counts) == len(block.columns["answer_spans"]) >= 2 and counts[-1] == 0
    place = 0
    for ids, count in zip(documents(block), counts, strict=True):
        for first, stop in block.columns["answer_spans"][place : place + count].reshape(-1, 2):
            assert ids[first:stop] == bert.encode_batch([answer])[0]
        place += count
    with pytest.raises(BadDataError, match=r"a\.jsonl:1: .*data\.stride_tokens"):
        question_answering.encode(records(2), examples, context(bert, row_tokens=32, stride_tokens=30))


@pytest.mark.parametrize("kind", ["word pieces", "byte pairs", "sentence pieces"])
def test_texts_of_a_question_stand_once_in_its_first_window(kind: str, tmp_path: Path) -> None:
    """Offsets are bytes of the stored context, without the blanks that tokenizers count to words."""
    make = {
        "word pieces": lambda: bert_vocabulary(tmp_path / "vocab.txt"),
        "byte pairs": lambda: byte_level_folder(tmp_path),
    }
    tokenizer = open_tokenizer(str(make.get(kind, lambda: sentencepiece_folder(tmp_path))()))
    text = "The  caf\u00e9 \u6e56 \U0001f6a2 boats\n\tdrift past " + " ".join(sentences(3, 4))
    answers = ((text.index("boats"), "boats"), (5, "caf\u00e9 \u6e56"), (text.index("boats"), "boats"))
    examples: list[Example] = [QuestionExample("which", text, answers), QuestionExample("how many", "oil", ())]
    block = question_answering.encode(records(2), examples, context(tokenizer, row_tokens=24, stride_tokens=4))
    columns = block.columns
    others = [0] * (block.num_documents - 2)
    assert len(others) >= 1, "several windows"
    stored = columns["context_texts"].tobytes()
    assert columns["context_texts_lengths"].tolist() == [len(text.encode()), *others, 3]
    assert stored.decode() == text + "oil"
    assert columns["answer_texts"].tobytes() == "boats\xff".encode("latin-1") + "caf\u00e9 \u6e56".encode() + b"\xff"
    assert columns["answer_texts_lengths"].tolist()[1:] == [*others, 0]
    ids, offsets = tokenizer.encode_with_offsets([text])[0]
    assert columns["context_offsets_lengths"].tolist()[0] == 2 * len(ids)
    places = columns["context_offsets"][: 2 * len(ids)].reshape(-1, 2).tolist()
    for (start, stop), (first, last) in zip(places, offsets, strict=True):
        assert stored[start:stop].decode() == text[first:last].strip()
    heads = columns["pair_starts"].tolist()
    windows = zip(documents(block), heads, columns["context_firsts"], columns["context_counts"], strict=True)
    for document, head, before, count in list(windows)[:-1]:
        assert document[head : head + count] == ids[before : before + count]
        assert document[head + count :] == tokenizer.suffix_ids


def test_answers_that_are_not_whole_tokens_are_counted(bert: Tokenizer) -> None:
    examples: list[Example] = [
        QuestionExample("which", "the boats drift", ((4, "boat"), (4, "boats "), (0, "the boats")))
    ]
    block = question_answering.encode(records(1), examples, context(bert, row_tokens=32, stride_tokens=4))
    pieces = bert.encode_batch(["boats"])[0]
    expected = {} if len(pieces) > 1 else {"answers_inside_tokens": 1}
    assert block.notes == expected and len(block.columns["answer_spans"]) == 6


def test_text_to_text_keeps_the_target_apart(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(byte_level_folder(tmp_path)))
    pair: list[Example] = [PromptExample("the river", "runs under a bridge")]
    source, target = tokenizer.encode_batch(["the river", "runs under a bridge"])
    block = seq2seq_lm.encode(records(1), pair, context(tokenizer))
    assert documents(block) == [source] and block.columns["target_ids"].tolist() == [*target, tokenizer.eos_id]
    cut = seq2seq_lm.encode(records(1), pair, context(tokenizer, limit_tokens=9, target_limit_tokens=3))
    assert cut.columns["target_ids"].tolist() == [*target[:2], tokenizer.eos_id] and cut.num_truncated == 1
    with pytest.raises(BadDataError, match=r"a\.jsonl:1: a target of .* \(data\.target_tokens\)"):
        seq2seq_lm.encode(records(1), pair, context(tokenizer, target_limit_tokens=3))


def test_id_type_is_the_smallest_that_holds_the_vocabulary() -> None:
    assert [id_type(size).name for size in (10, 65_536, 65_537, 262_144)] == ["uint16", "uint16", "uint32", "uint32"]
