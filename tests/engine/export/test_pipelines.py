"""Exported folders in others' hands: transformers' pipelines and Auto classes, and `fulltune predict`, answer alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from data_fixtures import bert_vocabulary, sentences, write_jsonl

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from data_prep.tokenizer.open import open_tokenizer
from engine.run_file import dump_yaml
from engine.tasks import TASKS
from launcher.cli import main

pytestmark = pytest.mark.usefixtures("work_here")
TEXTS = [
    " ".join(word for word in text.split() if word.isascii() and word.isalpha())
    for text in sentences(6, seed=8, longest_words=9)
]
CONTEXT = " ".join(TEXTS[:3])
#: Of each task: records to train with, and records to predict.
RECORDS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "sequence_classification": (
        [{"text": text, "label": "bad good fair".split()[number % 3]} for number, text in enumerate(TEXTS)],
        [{"text": text} for text in TEXTS],
    ),
    "token_classification": (
        [{"tokens": text.split(), "tags": ["B-X", "O", "I-X"] * 3} for text in TEXTS],
        [{"tokens": text.split()} for text in TEXTS],
    ),
    "question_answering": (
        [{"question": "a river", "context": CONTEXT, "answers": [{"text": CONTEXT[:4], "answer_start": 0}]}],
        [{"question": text, "context": CONTEXT} for text in TEXTS],
    ),
    "masked_lm": ([{"text": text} for text in TEXTS], []),
}


ROLES = "semantic_roles"
LABELS, SETS, SCORES = "sequence_classification", "sets", "scores"
RECORDS |= {
    ROLES: (
        [{"tokens": text.split(), "roles": ["V", "ARG1", "O"] * 3, "predicate": [0]} for text in TEXTS],
        [{"tokens": text.split(), "predicate": [0]} for text in TEXTS],
    ),
    SETS: (
        [{"text": text, "labels": ["bad", "good", "fair"][number % 4 :]} for number, text in enumerate(TEXTS)],
        RECORDS[LABELS][1],
    ),
    SCORES: ([{"text": text, "score": number / 4} for number, text in enumerate(TEXTS)], RECORDS[LABELS][1]),
}


def exported(folder: Path, task: str) -> Path:
    """The export of a run's starting weights: a small BERT with a head of the task, large enough to have opinions."""
    vocabulary = bert_vocabulary(folder / "vocab.txt")
    records, task = RECORDS[task][0], task if task in TASKS else LABELS
    for record in records:
        record |= {key: record[key][: len(record["tokens"])] for key in ("tags", "roles") if key in record}
    data = {
        "store_dir": str(folder / "store"), "train": str(write_jsonl(folder / "train.jsonl", records)),
        "tokenizer": str(vocabulary), "row_tokens": 64, "workers": 1, "stride_tokens": 8,
    }  # fmt: skip
    values = {
        "run_dir": str(folder / "run"), "task": task, "data": data, "seed": 6,
        "model": {"init": "random", "config": {
            "model_type": "bert", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 1.0,
            "vocab_size": open_tokenizer(str(vocabulary)).vocab_size}},
        "optimizer": {"learning_rate": 1e-3}, "batch": {"global_rows": 2}, "duration": {"steps": 1},
    }  # fmt: skip
    (folder / "run.yaml").write_text(dump_yaml(values))
    prepare(DataConfig.model_validate(data), data, task, progress=False)
    out = folder / "export"
    assert main(["export", str(folder / "run.yaml"), str(out), "--step", "0", "--dtype", "float32"]) == 0
    return out


def predicted(folder: Path, task: str, *more: str) -> list[dict[str, Any]]:
    source, out = write_jsonl(folder / "in.jsonl", RECORDS[task][1]), folder / "out.jsonl"
    assert main(["predict", str(folder / "export"), "--in", str(source), "--out", str(out), *more]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_every_task_has_a_test_here() -> None:
    assert set(TASKS) == {*RECORDS, "causal_lm"} - {SETS, SCORES}, "`fulltune generate` has a test of its own"


def test_text_classification(tmp_path: Path) -> None:
    theirs = hf.pipeline("text-classification", model=str(exported(tmp_path, "sequence_classification")), top_k=None)(
        TEXTS
    )
    ours = predicted(tmp_path, "sequence_classification")
    for one, each in zip(ours, theirs, strict=True):
        assert one["probabilities"] == pytest.approx({label["label"]: label["score"] for label in each}, abs=1e-5)
        assert one["label"] == each[0]["label"]
    assert len({one["probabilities"][one["label"]] for one in ours}) == len(TEXTS)


@pytest.mark.parametrize("kind", [SETS, SCORES])
def test_several_labels_and_scores(tmp_path: Path, kind: str) -> None:
    """The pipeline takes from config.json which of the two it is: a chance of its own for each label, or the output itself."""
    function = "none" if kind == SCORES else "sigmoid"
    pipeline = hf.pipeline("text-classification", model=str(exported(tmp_path, kind)), top_k=None)
    theirs = pipeline(TEXTS, function_to_apply=function)
    for one, each in zip(predicted(tmp_path, kind), theirs, strict=True):
        if kind == SCORES:
            assert one["score"] == pytest.approx(each[0]["score"], abs=1e-5)
        else:
            assert one["probabilities"] == pytest.approx({label["label"]: label["score"] for label in each}, abs=1e-5)
            assert set(one["labels"]) == {label["label"] for label in each if label["score"] >= 0.5}


def test_token_classification(tmp_path: Path) -> None:
    """The pipeline gives every piece of a word a tag; that of a word is the one of its first piece."""
    folder = exported(tmp_path, "token_classification")
    theirs = hf.pipeline("token-classification", model=str(folder), ignore_labels=[])(TEXTS)
    ours = predicted(tmp_path, "token_classification")
    for one, pieces in zip(ours, theirs, strict=True):
        assert one["tags"] == [piece["entity"] for piece in pieces if not piece["word"].startswith("##")]
        assert len(one["words"]) == len(one["tags"])
    assert len({tag for one in ours for tag in one["tags"]}) > 1


def test_roles(tmp_path: Path) -> None:
    """A sentence and its predicate as a pair for the Auto class, the predicate's pieces in the sentence of type 1 too."""
    folder = exported(tmp_path, ROLES)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModelForTokenClassification.from_pretrained(folder).eval()
    for one in predicted(tmp_path, ROLES, "--task", ROLES):
        assert one["predicate"] == [0]
        words = one["words"]
        inputs = tokenizer(words, [words[0]], is_split_into_words=True, return_tensors="pt")
        owners = list(zip(inputs.sequence_ids(0), inputs.word_ids(0), strict=True))
        inputs["token_type_ids"][0, [place for place, owner in enumerate(owners) if owner == (0, 0)]] = 1
        with torch.no_grad():
            best = model(**inputs).logits[0].argmax(-1).tolist()
        assert one["tags"] == [model.config.id2label[best[owners.index((0, at))]] for at in range(len(words))]


def test_fill_mask(tmp_path: Path) -> None:
    folder = exported(tmp_path, "masked_lm")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModelForMaskedLM.from_pretrained(folder).eval()
    text = f"{TEXTS[0]} {tokenizer.mask_token} {TEXTS[1]}"
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)]
    best, *_ = hf.pipeline("fill-mask", model=str(folder))(text)
    assert (best["token"], best["score"]) == (
        int(logits.argmax()),
        pytest.approx(logits.softmax(-1).max().item(), rel=1e-4),
    )


def test_question_answering(tmp_path: Path) -> None:
    """transformers 5 has no pipeline for it: the best span of the Auto class, of all of at most 30 tokens of the context."""
    folder = exported(tmp_path, "question_answering")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    ours = predicted(tmp_path, "question_answering", "evaluation.answers.null_threshold=1e9", "data.stride_tokens=8")
    for one, record in zip(ours, RECORDS["question_answering"][1], strict=True):
        inputs = tokenizer(record["question"], record["context"], return_tensors="pt", return_offsets_mapping=True)
        offsets = inputs.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            output = model(**inputs)
        begins, ends = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        inside = [place for place, kind in enumerate(inputs.sequence_ids(0)) if kind == 1]
        spans = [(begins[i] + ends[j], i, j) for i in inside for j in inside if i <= j < i + 30]
        _, first, last = max(spans)
        assert one["answer"] == record["context"][offsets[first][0] : offsets[last][1]]
        assert one["question"] == record["question"] and 0 < one["score"] <= 1
