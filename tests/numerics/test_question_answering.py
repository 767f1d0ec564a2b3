"""Question answering against the stock classes, and its answers against a search through all spans."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from equivalence_cases import make_model, window_loss
from memory_stores import QuestionStore, memory_store

from engine.model.attention import PACKED_ATTENTION, register_packed_attention
from engine.model.isolation import check_isolation, fit_to_rows
from engine.model.reach import unreached_parameters
from engine.model.task_model import TaskModel
from engine.tasks import TASKS
from engine.tasks.answers import AnswerOptions
from engine.tasks.task import STILL, Task

register_packed_attention()
TASK = TASKS["question_answering"]
ROWS = np.array([3, 0, 14, 15, 9])
SIZE = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
FAMILIES = {
    "bert": {"intermediate_size": 48}, "roberta": {"intermediate_size": 48, "type_vocab_size": 1, "max_position_embeddings": 64},
    "modernbert": {"intermediate_size": 48, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    "gpt2": {"n_positions": 64}, "llama": {"intermediate_size": 48}, "qwen2": {"intermediate_size": 48, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
}  # fmt: skip


def form(packed: bool) -> Task:
    assert TASK.padded is not None
    return TASK if packed else TASK.padded


def model_of(family: str, packed: bool) -> Any:
    config = transformers.AutoConfig.for_model(family, **SIZE, **FAMILIES[family])
    config.num_labels = 5  # as a classifier's: the head needs two
    torch.manual_seed(5)
    attention = PACKED_ATTENTION if packed else "sdpa"
    return TASK.auto_class(config).from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("packed", [True, False], ids=["flat", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_sum_of_the_stock_ones_of_windows_alone(family: str, packed: bool) -> None:
    store, index = memory_store(TASK.name)
    model, stock = model_of(family, packed), model_of(family, False)
    batch = form(packed).batch(store, index, ROWS, 0, STILL)
    output = TaskModel(model, form(packed))(batch)
    output.loss_sum.backward()
    expected = sum(window_loss(stock, store, document) for document in ROWS)
    expected.backward()
    assert output.values == {} and output.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_keeps_documents_apart_and_reaches_all_its_parameters(family: str) -> None:
    config = transformers.AutoConfig.for_model(family, **SIZE, **FAMILIES[family])
    check_isolation(config, TASK)
    assert fit_to_rows(config, TASK, form(False)) is TASK
    assert unreached_parameters(config, TASK) == unreached_parameters(config, form(False)) == ()


def all_spans(store: QuestionStore, document: int, model: Any, most: int) -> list[tuple[float, str, int]]:
    """Every span of a window's context of up to `most` tokens: its score, its text, and its first word."""
    ids = torch.from_numpy(store.documents[document])[None]
    with torch.no_grad():
        output = model(ids, token_type_ids=(torch.arange(ids.shape[1]) >= 1).long()[None])
    words, before = store.words(document), int(store.column("context_firsts")[document])
    found = []
    for first, last in itertools.combinations_with_replacement(range(store.counts[document]), 2):
        if last - first < most:
            score = float(output.start_logits[0, 1 + first] + output.end_logits[0, 1 + last])
            found.append((score, " ".join(words[before + first : before + last + 1]), before + first))
    return found


def null_score(store: QuestionStore, document: int, model: Any) -> float:
    ids = torch.from_numpy(store.documents[document])[None]
    with torch.no_grad():
        output = model(ids, token_type_ids=(torch.arange(ids.shape[1]) >= 1).long()[None])
    return float(output.start_logits[0, 0] + output.end_logits[0, 0])


@pytest.mark.parametrize("packed", [True, False], ids=["flat", "padded"])
@pytest.mark.parametrize("threshold", [None, -0.2, 5.0])
def test_answers_are_the_best_of_all_spans_of_all_windows(packed: bool, threshold: float | None) -> None:
    """And the figures are those of these answers."""
    store, index = memory_store(TASK.name)
    assert isinstance(store, QuestionStore)
    options = AnswerOptions(max_tokens=3, n_best=4, null_threshold=threshold)
    assert TASK.configured is not None
    task = TASK.configured(TASK, options)
    task = task if packed else task.padded
    model, stock = (make_model("bert_answers", packed=one).eval() for one in (packed, False))
    results, objects = [], []
    for rows in (np.arange(13), np.arange(13, 24)):  # the windows of question 6 are in two batches
        batch = task.batch(store, index, rows, 0, STILL)
        with torch.no_grad():
            output = TaskModel(model, task)(batch)
        results += task.results(output, batch)
        objects += task.predictions(output, batch, store)
    exact = 0
    for question in range(12):
        windows = [2 * question, 2 * question + 1]
        found = sorted(span for window in windows for span in all_spans(store, window, stock, 3))
        spans = sorted({span[1:]: span for span in found}.values())  # of a span in both windows the higher score
        null = min(null_score(store, window, stock) for window in windows)
        score, text, _ = spans[-1]
        expected = "" if null - score > (threshold or 0.0) else text
        answer = task.join([objects[window] for window in windows])
        assert answer["answer"] == expected
        entries = [*((score, text) for score, text, _ in spans[-4:]), (null, "")]
        shares = np.exp([score for score, _ in entries])
        by_share = sorted(zip(shares / shares.sum(), (text for _, text in entries), strict=True), reverse=True)
        assert [one["answer"] for one in answer["n_best"]] == [text for _, text in by_share]
        assert [one["score"] for one in answer["n_best"]] == pytest.approx([share for share, _ in by_share], rel=1e-4)
        assert answer["score"] in [one["score"] for one in answer["n_best"]]
        exact += expected in (store.answers(2 * question) or [""])
    figures = task.figures(results, store)
    assert figures["exact_match"] == pytest.approx(exact / 12) and 0 < exact < 12
    assert figures["has_answer_f1"] > 0 and len(figures) == 10


def test_without_unanswerable_questions_every_one_gets_an_answer() -> None:
    store, index = memory_store(TASK.name)
    model = make_model("bert_answers", packed=True).eval()
    with torch.no_grad():
        model.qa_outputs.bias += torch.tensor([9.0, 9.0])
        batch = TASK.batch(store, index, np.array([0, 1]), 0, STILL)
        output = TaskModel(model, TASK)(batch)
    logits = output.values["logits"].clone()
    logits[:, 0] = 1e3  # the null span is far ahead
    output = output._replace(values=output.values | {"logits": logits})
    results = TASK.results(output, batch)
    assert set(TASK.figures(results, store)) == {"exact_match", "f1"}
    given = TASK.join([one | {"threshold": math.inf} for one in TASK.predictions(output, batch, store)])
    none = TASK.join(TASK.predictions(output, batch, store))
    assert given["answer"] and "" not in [one["answer"] for one in given["n_best"]]
    assert none["answer"] == "" and none["score"] == pytest.approx(1.0)


def test_of_several_answers_in_a_window_the_first_is_trained_and_none_points_at_the_first_token() -> None:
    store, index = memory_store(TASK.name)
    for task in (form(True), form(False)):
        batch = task.batch(store, index, np.arange(8), 0, STILL)
        for document, (first, last) in enumerate(batch.target_ids.tolist()):
            spans = store.ragged("answer_spans", document).tolist()
            assert [first, last + 1] == (spans[:2] or [0, 1])
            position = int(batch.target_positions[document])
            assert batch.input_ids.flatten()[position] == store.documents[document][first]
        assert batch.target_owners.tolist() == batch.columns["documents"].tolist() == list(range(8))


def test_a_model_with_broken_weights_reaches_the_check_of_the_loss() -> None:
    """Logits that are no numbers are not searched for answers in vain: the evaluation says what is wrong."""
    store, index = memory_store(TASK.name)
    batch = TASK.batch(store, index, np.arange(3), 0, STILL)
    model = make_model("bert_answers", packed=True).eval()
    with torch.no_grad():
        output = TaskModel(model, TASK)(batch)
    broken = output._replace(values={name: value * math.nan for name, value in output.values.items()})
    assert [math.isnan(result.loss) for result in TASK.results(broken, batch)] == [True] * 3
    assert dataclasses.asdict(TASK.results(output, batch)[0])["num_targets"] == 1
