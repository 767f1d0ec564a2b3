"""Names of fields in published data sets are recognised; two candidates are never chosen between."""

import json
from typing import Any

import pytest
from shape_fixtures import HI, example, recognised, refusal

from data_prep.shapes.examples import (
    Example,
    LabelledExample,
    PromptExample,
    QuestionExample,
    ScoredExample,
    TaggedExample,
    TextExample,
)

LABELS = (
    "class_index category intent class target sentiment polarity emotion topic lang language entailment_judgment stance genre"
    " is_duplicate label_text Label Sentiment Category Emotion"
).split()
TEXTS = (
    "utterance query question review tweet headline comment post message passage document body statement claim input"
    " title Text Review Tweet"
).split()
PAIRS = [
    ("sentence_A", "sentence_B"), ("Sentence1", "Sentence2"), ("sentence_1", "sentence_2"), ("text1", "text2"),
    ("query", "passage"), ("query", "document"), ("question", "passage"), ("question", "sentence"),
    ("question", "answer"), ("claim", "evidence"), ("context", "response"), ("s1", "s2"),
]  # fmt: skip
SUMMARIES = [
    ("document", "summary"), ("article", "highlights"), ("article", "summary"), ("dialogue", "summary"),
    ("text", "summary"), ("content", "summary"), ("text", "headline"), ("Document", "Summary"),
]  # fmt: skip
PROMPTS = [
    ("inputs", "targets"), ("input", "target"), ("input_text", "target_text"), ("Question", "Answer"),
    ("prompt", "output"), ("user", "assistant"), ("question", "solution"), ("problem", "answer"),
    ("context", "response"), ("instruction", "answer"), ("instruction", "completion"),
]  # fmt: skip
TRANSLATIONS = [
    ("src", "trg"), ("source_text", "target_text"), ("source_sentence", "target_sentence"), ("en", "de"),
    ("zh-CN", "en_XX"), ("original", "translation"),
]  # fmt: skip
TAGS = "ner pos srl upos xpos chunk bio_tags iob slots slot_labels tag ner_labels Tags NER POS".split()

RECOGNISED: list[tuple[str, dict[str, Any], Example]] = [
    *(("sequence_classification", {"text": "a", name: "x", "id": 1}, LabelledExample("a", ("x",))) for name in LABELS),
    *(("sequence_classification", {name: "a", "label": 1}, LabelledExample("a", ("1",))) for name in TEXTS),
    *(
        ("sequence_classification", {one: "a", two: "b", "label": "x"}, LabelledExample("a", ("x",), "b"))
        for one, two in PAIRS
    ),
    *(
        ("sequence_classification", {"sentence1": "a", "sentence2": "b", name: 3.5}, ScoredExample("a", 3.5, "b"))
        for name in ("relatedness_score", "similarity", "Relatedness", "sts_score")
    ),
    ("sequence_classification", {"review": "a", "topics": ["x", "y"]}, LabelledExample("a", ("x", "y"), many=True)),
    ("sequence_classification", {"text": "a", "Class Index": 2}, LabelledExample("a", ("2",))),
    ("sequence_classification", {"tweet": "a", "target": 0.5}, ScoredExample("a", 0.5)),
    ("sequence_classification", {"review": "a", "title": "b", "sentiment": "x"}, LabelledExample("a", ("x",))),
    *(("seq2seq_lm", {one: "a", two: "b", "id": 3}, PromptExample("a", "b")) for one, two in SUMMARIES + PROMPTS),
    *(("seq2seq_lm", {one: "a", two: "b"}, PromptExample("a", "b")) for one, two in TRANSLATIONS),
    ("seq2seq_lm", {"translation": {"de": "a", "en": "b"}, "id": "7"}, PromptExample("a", "b")),
    ("seq2seq_lm", {"translation": {"en": "b", "de": "a"}}, PromptExample("b", "a")),
    *(("causal_lm", {one: "a", two: "b"}, PromptExample("a", "b")) for one, two in PROMPTS + SUMMARIES[:4]),
    ("causal_lm", {"instruction": "a", "input": "c", "answer": "b"}, PromptExample("a\n\nc", "b")),
    *(
        ("causal_lm", {name: "a", "title": "t"}, TextExample("a"))
        for name in ("article", "body", "raw_content", "Text")
    ),
    *(
        ("token_classification", {"tokens": ["a", "b"], name: ["O", 1]}, TaggedExample(("a", "b"), ("O", "1")))
        for name in TAGS
    ),
    (
        "token_classification",
        {"text": "a b", "tokens": ["a", "b"], "upos": ["N", "V"]},
        TaggedExample(("a", "b"), ("N", "V")),
    ),
    ("token_classification", {"seq_in": "a b", "seq_out": "O B"}, TaggedExample(("a", "b"), ("O", "B"))),
    *(
        (
            "question_answering",
            {"question": "q", name: "it is me", answers: [{"text": "me", "answer_start": 6}]},
            QuestionExample("q", "it is me", ((6, "me"),)),
        )
        for name, answers in (
            ("passage", "answers"),
            ("Context", "Answers"),
            ("context", "answer"),
            ("article", "answer"),
        )
    ),
]


@pytest.mark.parametrize(("task", "value", "meaning"), RECOGNISED)
def test_usual_names(task: str, value: dict[str, Any], meaning: Example) -> None:
    assert example(value, task) == meaning
    assert example(value, task, shape=recognised(value, task).name) == meaning


@pytest.mark.parametrize(
    ("task", "value", "options", "meaning"),
    [
        ("sequence_classification", {"text": "a", "label": 1, "category": "x"}, {}, LabelledExample("a", ("1",))),
        ("sequence_classification", {"text": "a", "title": "b", "label": 1}, {}, LabelledExample("a", ("1",))),
        ("sequence_classification", {"text": "a", "review": "b", "label": 1}, {}, LabelledExample("a", ("1",))),
        ("causal_lm", {"text": "a", "summary": "b"}, {}, TextExample("a")),
        ("causal_lm", {"content": "a", "title": "b"}, {}, TextExample("a")),
        ("causal_lm", {"problem": "a", "solution": "b", "answer": "c"}, {}, PromptExample("a", "b")),
        ("token_classification", {"tokens": ["a"], "tags": ["N"], "xpos": ["V"]}, {}, TaggedExample(("a",), ("N",))),
        ("sequence_classification", {"utterance": "a", "x": "y"}, {"fields": {"label": "x"}}, LabelledExample("a", ("y",))),
        ("sequence_classification", {"s": "a", "intent": "y"}, {"fields": {"text": "s"}}, LabelledExample("a", ("y",))),
        ("sequence_classification", {"text": "a", "category": "x", "topic": "y"}, {"fields": {"label": "topic"}}, LabelledExample("a", ("y",))),
        ("sequence_classification", {"sentence_A": "a", "sentence_B": "b", "relatedness_score": "4.5", "entailment_judgment": "x"}, {"shape": "label"}, LabelledExample("a", ("x",), "b")),
        ("sequence_classification", {"sentence_A": "a", "sentence_B": "b", "relatedness_score": "4.5", "entailment_judgment": "x"}, {"shape": "score"}, ScoredExample("a", 4.5, "b")),
        ("sequence_classification", {"query": "a", "passage": "b", "label": "x"}, {"fields": {"pair": ""}}, None),
        ("seq2seq_lm", {"translation": {"de": "a", "en": "b"}}, {"fields": {"source": "translation.en", "target": "translation.de"}}, PromptExample("b", "a")),
        ("seq2seq_lm", {"story": "a", "summary": "b", "x": "c"}, {"fields": {"response": "x"}}, PromptExample("a", "c")),
    ],
)  # fmt: skip
def test_better_known_names_come_first_and_fields_decide(
    task: str, value: dict[str, Any], options: Any, meaning: Example | None
) -> None:
    if meaning is None:
        assert "readings fit" in refusal(value, task, **options)
    else:
        assert example(value, task, **options) == meaning


@pytest.mark.parametrize(
    ("task", "value", "words"),
    [
        ("sequence_classification", {"text": "a", "category": "x", "sentiment": "y"}, "`fields: {text: text, label: category}` or `fields: {text: text, label: sentiment}`"),
        ("sequence_classification", {"text": "a", "lang": "x", "topic": "y"}, "2 readings fit"),
        ("sequence_classification", {"text": "a", "coarse_label": 1, "fine_label": 2}, "`fields: {text: text, label: coarse_label}` or"),
        ("sequence_classification", {"sentence_A": "a", "sentence_B": "b", "relatedness_score": 4.5, "entailment_judgment": "x"}, "`shape: label` or `shape: score`"),
        ("sequence_classification", {"review": "a", "rating": 4}, "`shape: label` or `shape: score`"),
        ("sequence_classification", {"review": "a", "comment": "b", "label": 4}, "`fields: {text: review, label: label}` or"),
        ("sequence_classification", {"Title": "a", "Description": "b", "Class Index": 4}, "`fields: {text: Title, label: Class Index}` or"),
        ("token_classification", {"tokens": ["a"], "pos": ["x"], "ner": ["y"]}, "`fields: {words: tokens, tags: pos}` or `fields: {words: tokens, tags: ner}`"),
        ("seq2seq_lm", {"article": "a", "highlights": "b", "summary": "c"}, "`fields: {prompt: article, response: highlights}` or"),
        ("seq2seq_lm", {"translation": {"de": "a", "en": "b", "fr": "c"}}, "6 readings fit"),
        ("seq2seq_lm", {"en": "a", "de": "b", "fr": "c"}, "6 readings fit"),
        ("causal_lm", {"article": "a", "body": "b"}, "2 readings fit"),
        ("causal_lm", {"prompt": "a", "messages": [], "text": ""}, "2 readings fit"),
    ],
)  # fmt: skip
def test_two_candidates_are_an_error_with_the_lines_to_write(task: str, value: dict[str, Any], words: str) -> None:
    assert words in refusal(value, task)


def test_the_direction_of_a_translation_is_said() -> None:
    described = recognised({"translation": {"de": "a", "en": "b"}}, "seq2seq_lm").describe()
    assert "prompt = translation.de, response = translation.en" in described
    assert "for the other way write `fields: {source: translation.en, target: translation.de}`" in described
    assert "other way" not in recognised({"source": "a", "target": "b"}, "seq2seq_lm").describe()


@pytest.mark.parametrize(
    ("task", "value", "words"),
    [
        ("sequence_classification", {"text": "a", "lable": "b"}, "nearest: `shape: label` with `fields: {text: text, label: lable}`"),
        ("sequence_classification", {"msg": "a", "kind": "b"}, "nearest: `shape: label` with `fields: {text: ..., label: ...}`, which lacks text and label (one of msg, kind)"),
        ("sequence_classification", {"headline": "a", "is_sarcastic": 1}, "`fields: {text: headline, label: ...}`, which lacks label (one of is_sarcastic)"),
        ("causal_lm", {"prompt": "a", "chosen": "b", "rejected": "c"}, "`fields: {prompt: prompt, response: ...}`, which lacks response (one of chosen, rejected)"),
        ("token_classification", {"sentence": ["a"], "gold": ["b"]}, "`fields: {words: sentence, tags: ...}`, which lacks tags (one of gold)"),
        ("question_answering", {"question": "a", "paragraph": "b"}, "`fields: {question: question, context: paragraph, answers: ...}`, which lacks answers"),
        ("seq2seq_lm", {"dialogue": "a", "sumary": "b"}, "`fields: {prompt: dialogue, response: sumary}`"),
        ("seq2seq_lm", {"abstract": "a", "number": 1}, "which lacks"),
    ],
)  # fmt: skip
def test_what_comes_nearest_is_said_with_the_line_to_write(task: str, value: dict[str, Any], words: str) -> None:
    message = refusal(value, task)
    assert "no shape of task" in message and words in message


LINES: list[tuple[str, list[str], str]] = [
    ("sequence_classification", ["good film\t1", "bad film\t0"], "2 columns separated by tabs: write `format: tsv`, and `columns: [...]`"),
    ("sequence_classification", ["1\ta\tb", "0\tc\td"], "3 columns separated by tabs: write `format: tsv`"),
    ("sequence_classification", ["a;1", "b;0"], 'write `format: csv` and `delimiter: ";"`'),
    ("sequence_classification", ["a|1", "b|0"], 'write `format: csv` and `delimiter: "|"`'),
    ("sequence_classification", ["a,1", "b,0"], "columns separated by ',': write `format: csv`"),
    ("sequence_classification", ['{"text": "a", "label": 1}'], "JSON objects: write `format: jsonl`"),
    ("token_classification", ["EU B-ORG", "rejects O"], "words with 2 columns: write `format: conll`"),
    ("token_classification", ["EU\tB-ORG", "rejects\tO"], "words with 2 columns: write `format: conll`"),
    ("token_classification", ["EU NNP B-NP B-ORG", "rejects VBZ B-VP O"], "4 columns: write `format: conll` and `columns: [token, ..., tag]`"),
    ("token_classification", ["a b\tO O", "c d e\tO O B"], "2 columns separated by tabs: write `format: tsv`"),
    ("seq2seq_lm", ["hello\thallo", "you\tdu"], "2 columns separated by tabs: write `format: tsv`"),
    ("question_answering", ["a", "b"], "no shape of task question_answering"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "lines", "words"), LINES)
def test_lines_of_text_that_are_records_of_another_format(task: str, lines: list[str], words: str) -> None:
    assert words in refusal([{"text": line} for line in lines], task)


def test_a_table_of_one_column_names_its_delimiter() -> None:
    found = refusal({"text;label": "a;1"}, "sequence_classification", format="csv")
    assert 'it looks like `delimiter: ";"`' in found
    assert "if the file has no header line" in refusal({"a film": "1"}, "sequence_classification", format="csv")


def test_json_that_is_trained_as_text_is_said() -> None:
    line = json.dumps({"messages": HI})
    assert "its texts are JSON objects" in recognised({"text": line}).describe()
    assert "JSON" not in recognised([{"text": line}, {"text": "plain"}]).describe()


def test_later_records_must_have_the_same_names() -> None:
    values = [{"utterance": "a", "intent": "x"}, {"utterance": "b", "topic": "y"}]
    assert "data.jsonl:2: the records of a source must agree" in refusal(values, "sequence_classification")
    values = [{"utterance": "a", "intent": "x"}, {"utterance": "b", "intent": None}]
    assert "data.jsonl:2: field 'intent'" in refusal(values, "sequence_classification")
