"""Real questions: every stored span, cut from the stored context by the stored offsets, is a true answer of its question."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_fixtures import SAMPLES, prepared, section
from ranks import rank_environment
from repository import ROOT
from training_runs import metrics
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from data_prep.token_store import TokenStore

pytestmark = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")

POLICIES = SAMPLES / "understanding" / "policyqa" / "dev.json"
CHINESE = SAMPLES / "understanding" / "cmrc2018" / "cmrc2018_trial.json"
#: Of each set: file, tokenizer, tokens of a row and of the stride, and the least share of answers that are whole tokens.
SETS = {
    "policies": (POLICIES, "bert_uncased_en", 128, 32, 0.97),
    "policies in byte pairs": (POLICIES, "gpt2", 128, 32, 0.95),
    "chinese": (CHINESE, "bert_zh", 256, 64, 0.99),
}


def questions_of(path: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """The context and the answers of every question."""
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    return [(paragraph["context"], qa["answers"]) for paragraph in paragraphs for qa in paragraph["qas"]]


def windows_of(store: TokenStore) -> dict[int, list[int]]:
    """The documents of every question."""
    found: dict[int, list[int]] = {}
    for document, number in enumerate(store.column("questions").tolist()):
        found.setdefault(number, []).append(document)
    return found


@pytest.mark.parametrize("name", SETS)
def test_spans_cut_from_the_stored_context_are_answers(name: str, tmp_path: Path) -> None:
    path, tokenizer, row_tokens, stride, share = SETS[name]
    files = [{"path": str(path)}]
    values = section(tmp_path, SAMPLES / "tokenizers" / tokenizer, files, row_tokens=row_tokens, stride_tokens=stride)
    store, _ = prepared(values, "question_answering")
    questions, windows = questions_of(path), windows_of(store)
    assert len(questions) == len(windows) > 1000
    whole, within, nowhere = 0, 0, 0
    for number, (context, answers) in enumerate(questions):
        first, *others = windows[number]
        stored = store.ragged("context_texts", first).tobytes()
        assert stored.decode() == context
        assert not any(len(store.ragged("context_texts", document)) for document in others), "a context is stored once"
        texts = [answer["text"] for answer in answers]
        assert store.ragged("answer_texts", first).tobytes() == b"".join(
            text.encode() + b"\xff" for text in dict.fromkeys(texts)
        )
        cut = {stored[start:stop].decode() for start, stop in spans_in_bytes(store, first, windows[number])}
        wanted = {text.strip() for text in texts}
        whole += len(cut & wanted)
        # An annotator's answer may begin or end inside a word; its tokens hold more.
        for text in cut - wanted:
            assert any(one in text and len(text) < len(one) + 40 for one in wanted), (text, wanted)
            within += 1
        nowhere += not cut
    noted = store.ledger["total"].get("notes", {}).get("answers_inside_tokens", 0)
    assert (within > 0) == (noted > 0) and within <= noted
    assert whole / (whole + within) > share
    assert nowhere < 0.05 * len(questions), "answers that no window holds whole"


def spans_in_bytes(store: TokenStore, first: int, documents: list[int]) -> list[tuple[int, int]]:
    """The spans of a question's windows as bytes of its context."""
    offsets = store.ragged("context_offsets", first).reshape(-1, 2)
    assert np.all(offsets[:, 0] <= offsets[:, 1])
    found = []
    for document in documents:
        head, before = (int(store.column(name)[document]) for name in ("pair_starts", "context_firsts"))
        assert head + int(store.column("context_counts")[document]) <= len(store.tokens(document))
        for start, stop in store.ragged("answer_spans", document).reshape(-1, 2).tolist():
            found.append((int(offsets[before + start - head][0]), int(offsets[before + stop - 1 - head][1])))
    return found


def eight_questions(path: Path) -> Path:
    """SQuAD's JSON with the first eight questions about short contexts of their own, whose answers windows do not cut."""
    articles = json.loads(POLICIES.read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    by_context = {one["context"]: one | {"qas": one["qas"][:1]} for one in reversed(paragraphs)}
    chosen = [one for one in by_context.values() if 100 < len(one["context"]) < 300][:8]
    path.write_text(json.dumps({"data": [{"title": "policies", "paragraphs": chosen}]}), encoding="utf-8")
    return path


@pytest.mark.ranks
def test_the_recipe_learns_eight_questions_by_heart_and_exports_its_model(tmp_path: Path) -> None:
    data = eight_questions(tmp_path / "eight.json")
    changes = [
        f"data.train={data}", f"data.validation={data}", "data.row_tokens=96", "data.stride_tokens=24",
        f"data.tokenizer={SAMPLES / 'tokenizers' / 'bert_uncased_en'}", "optimizer.schedule=constant",
        "model.config={model_type: bert, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size:"
        " 128, max_position_embeddings: 96, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}",
        "optimizer.learning_rate=2e-3", "batch.global_rows=16", "batch.micro_rows=8", "duration={steps: 100}",
        "evaluation.eval_every_steps=100", "evaluation.answers.max_tokens=96", "checkpoint={}", "export={at_end: true, dtype: float32}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "launcher.cli", "train", str(ROOT / "launcher" / "recipes" / "answer.yaml")]
    environment = rank_environment(2) | {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [*command, "--ranks", "2", *changes], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = tmp_path / "runs" / "answer"
    before, after = metrics(run_dir, "evaluation").values()
    assert before["f1"] < 0.5 and after["f1"] == after["exact_match"] == 1.0
    assert "has_answer_f1" not in after, "each of these questions has an answer"
    model = AutoModelForQuestionAnswering.from_pretrained(run_dir / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "export")
    for context, answers in questions_of(data)[:3]:
        paragraph = next(
            one for one in json.loads(data.read_text())["data"][0]["paragraphs"] if one["context"] == context
        )
        encoded = tokenizer(paragraph["qas"][0]["question"], context, return_tensors="pt", return_offsets_mapping=True)
        offsets = encoded.pop("offset_mapping")[0]
        if len(offsets) > 96:
            continue
        with torch.no_grad():
            output = model(**encoded)
        first, last = int(output.start_logits.argmax()), int(output.end_logits.argmax())
        assert context[offsets[first][0] : offsets[last][1]] in [answer["text"] for answer in answers]
