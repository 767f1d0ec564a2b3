"""`fulltune predict` and `fulltune eval` with a model that answers questions, against the stock class on each question."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from data_fixtures import bert_vocabulary, sentences, write_jsonl

from data_prep.tokenizer.open import open_tokenizer
from launcher.cli import main

pytestmark = pytest.mark.usefixtures("work_here")
QUESTIONS = [{"question": f"which {text.split()[0]}", "context": text} for text in sentences(6, seed=4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers") / "model"
    tokenizer = open_tokenizer(str(bert_vocabulary(folder.parent / "vocab.txt")))
    tokenizer.save(folder, None)
    torch.manual_seed(5)
    config = hf.BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=1.0,
    )  # fmt: skip
    hf.BertForQuestionAnswering(config).save_pretrained(folder)
    return folder


def stock_answers(folder: Path) -> list[tuple[float, float, str]]:
    """For every question: the score of no answer, that of the best span of up to 30 tokens, and its text."""
    tokenizer = hf.BertTokenizerFast(str(folder.parent / "vocab.txt"))
    model = hf.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    found = []
    for one in QUESTIONS:
        inputs = tokenizer(one["question"], one["context"], return_tensors="pt", return_offsets_mapping=True)
        offsets = inputs.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            output = model(**inputs)
        starts, ends = output.start_logits[0], output.end_logits[0]
        places = [place for place, kind in enumerate(inputs.sequence_ids()) if kind == 1]
        score, first, last = max((float(starts[i] + ends[j]), i, j) for i in places for j in places if i <= j < i + 30)
        text = one["context"][offsets[first][0] : offsets[last][1]]
        found.append((float(starts[0] + ends[0]), score, text))
    return found


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 0, capfd.readouterr().err
    return capfd.readouterr().out


def test_answers_stand_beside_their_questions(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [one | {"id": f"q{at}"} for at, one in enumerate(QUESTIONS)])
    settings = ("data.row_tokens=64", "data.stride_tokens=8", "--micro-rows", 4)
    out = run(capfd, "predict", folder, "--in", source, "--out", "-", *settings)
    found = [json.loads(line) for line in out.splitlines()]
    assert [(one["id"], one["question"]) for one in found] == [
        (f"q{at}", one["question"]) for at, one in enumerate(QUESTIONS)
    ]
    for one, (null, score, text) in zip(found, stock_answers(folder), strict=True):
        assert one["answer"] == ("" if null > score else text)
        best = next(each for each in one["n_best"] if each["answer"])
        none = next(each for each in one["n_best"] if not each["answer"])
        assert best["answer"] == text
        assert best["score"] / none["score"] == pytest.approx(torch.tensor(score - null).exp().item(), rel=1e-3)
        assert sum(each["score"] for each in one["n_best"]) == pytest.approx(1.0)
    assert len({one["answer"] for one in found}) > 3


def test_figures_are_those_of_the_stock_answers(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each second question has the stock answer as its own, the others a word beside it; none is without an answer."""
    records: list[dict[str, Any]] = []
    for number, (one, (_, _, text)) in enumerate(zip(QUESTIONS, stock_answers(folder), strict=True)):
        answer = text if number % 2 else one["context"].split()[0]
        records.append(one | {"answers": [{"text": answer, "answer_start": one["context"].index(answer)}]})
    source = write_jsonl(tmp_path / "in.jsonl", records)
    settings = ("--json", "data.row_tokens=64", "data.stride_tokens=8")
    figures = json.loads(run(capfd, "eval", folder, "--data", source, *settings))
    right = sum(
        one["answers"][0]["text"] == text for one, (_, _, text) in zip(records, stock_answers(folder), strict=True)
    )
    assert figures["exact_match"] == right / 6 and 3 <= right < 6
    assert figures["exact_match"] <= figures["f1"] < 1 and "no_answer_f1" not in figures
