"""Held-out figures are exact, and the same to the last digit on any number of ranks."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from equivalence_cases import Case, make_model, reference_gradients, store_of
from memory_stores import QuestionStore, memory_store
from ranks import run_ranks
from repository import WORKERS
from scipy import stats
from sklearn import metrics as oracle

from engine.model.attention import register_packed_attention
from engine.tasks import TASKS
from engine.tasks.task import STILL, DocumentResult, LossOptions, document_results, mean_loss

register_packed_attention()
SIZES = ("1", "3", "100", "60")  # rows of a micro-batch; the last in tokens
FAMILIES = ("llama", "bert", "bert_sets", "bert_scores", "bert_tags", "bert_answers")


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Figures by number of ranks, family and micro-batch size."""
    folder = tmp_path_factory.mktemp("evaluations")
    results = {}
    for world_size in (1, 2, 3):
        run_ranks(world_size, WORKERS / "evaluation_worker.py", folder, ",".join(FAMILIES))
        results[world_size] = json.loads((folder / f"evaluations-{world_size}.json").read_text())
    return results


@pytest.mark.ranks
@pytest.mark.parametrize("family", FAMILIES)
def test_figures_are_the_same_to_the_last_digit_on_one_rank_on_two_and_on_three(
    evaluations: dict[int, dict[str, Any]], family: str
) -> None:
    compared = 0
    for size in (*SIZES, "sources"):
        one, two, three = (
            {name: value for name, value in evaluations[world_size][family][size].items() if name != "seconds"}
            for world_size in (1, 2, 3)
        )
        assert one == two == three, size
        compared += len(one)
    assert compared >= 5 * 3


@pytest.mark.ranks
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_micro_batches_are_the_same_groups_of_rows_on_one_rank_and_on_two(
    evaluations: dict[int, dict[str, Any]], family: str, size: str
) -> None:
    """Models of other sizes would show other neighbours in their last digits; these may be too small for it."""
    (alone,), (first, second) = (evaluations[world_size][family][f"groups {size}"] for world_size in (1, 2))
    assert len(first) == len(second) == -(-len(alone) // 2), "ranks run the model equally often"
    assert sorted(group for group in (*first, *second) if group) == sorted(alone)
    _, rows = memory_store(Case("", family).task)
    assert sorted(row for group in alone for row in group) == list(range(rows.num_rows))
    assert second.count([]) == len(alone) % 2


@pytest.mark.ranks
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [*SIZES, "sources"])
def test_held_out_loss_is_that_of_a_plain_process(
    evaluations: dict[int, dict[str, Any]], family: str, size: str
) -> None:
    figures = evaluations[2][family][size]
    _, rows = memory_store(Case("", family).task)
    _, figures_alone = reference_gradients(family, np.arange(rows.num_rows))
    expected = figures_alone["loss"]
    assert figures["loss"] == pytest.approx(expected, rel=1e-6 if family == "llama" else 1e-5)
    assert figures["targets"] == rows.row_targets.sum()
    if family == "llama":
        assert figures["perplexity"] == pytest.approx(np.exp(expected), rel=1e-6)


@pytest.mark.ranks
@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_loss_of_each_source_is_exact(evaluations: dict[int, dict[str, Any]], family: str) -> None:
    figures = evaluations[2][family]["sources"]
    _, rows = memory_store(Case("", family).task)
    cut = rows.num_rows // 3
    for name, own in (("first", np.arange(cut)), ("second", np.arange(cut, rows.num_rows))):
        _, figures_alone = reference_gradients(family, own)
        assert figures[f"loss/{name}"] == pytest.approx(figures_alone["loss"], rel=1e-5)
    assert not any(name.startswith("loss/") for name in evaluations[2][family]["1"])


@pytest.mark.ranks
@pytest.mark.parametrize("size", [*SIZES, "sources"])
def test_held_out_accuracy_and_f1_are_exact(evaluations: dict[int, dict[str, Any]], size: str) -> None:
    figures = evaluations[2]["bert"][size]
    store, _ = memory_store("sequence_classification")
    model = make_model("bert", packed=False).eval()
    with torch.no_grad():
        predicted = [int(model(torch.from_numpy(ids)[None]).logits.argmax()) for ids in store.documents]
    assert figures["accuracy"] == pytest.approx(float((store.labels == predicted).mean()))
    assert figures["macro_f1"] == pytest.approx(oracle.f1_score(store.labels, predicted, average="macro"))


@pytest.mark.ranks
@pytest.mark.parametrize("size", [*SIZES, "sources"])
def test_held_out_figures_of_sets_and_scores_are_exact(evaluations: dict[int, dict[str, Any]], size: str) -> None:
    guessed: dict[str, Any] = {}
    for family in ("bert_sets", "bert_scores"):
        model = make_model(family, packed=False).eval()
        with torch.no_grad():
            store, _ = store_of(family)
            guessed[family] = torch.cat([model(torch.from_numpy(ids)[None]).logits for ids in store.documents]).numpy()
    sets, scores = evaluations[2]["bert_sets"][size], evaluations[2]["bert_scores"][size]
    truth = np.array([[document >> number & 1 for number in range(3)] for document in range(24)])
    chosen = guessed["bert_sets"] >= 0
    assert sets["micro_f1"] == pytest.approx(oracle.f1_score(truth, chosen, average="micro"))
    assert sets["macro_f1"] == pytest.approx(oracle.f1_score(truth, chosen, average="macro"))
    assert sets["exact_match"] == pytest.approx(oracle.accuracy_score(truth, chosen))
    true_scores = store_of("bert_scores")[0].column("scores")
    assert scores["pearson"] == pytest.approx(stats.pearsonr(true_scores, guessed["bert_scores"][:, 0])[0], rel=1e-4)
    assert scores["spearman"] == pytest.approx(stats.spearmanr(true_scores, guessed["bert_scores"][:, 0])[0], rel=1e-4)
    assert scores["mse"] == pytest.approx(scores["loss"], rel=1e-6)


@pytest.mark.ranks
@pytest.mark.parametrize("size", [*SIZES, "sources"])
def test_held_out_accuracy_and_f1_over_tags_are_exact(evaluations: dict[int, dict[str, Any]], size: str) -> None:
    figures = evaluations[2]["bert_tags"][size]
    store, _ = memory_store("token_classification")
    model = make_model("bert_tags", packed=False).eval()
    truth, predicted = [], []
    with torch.no_grad():
        for ids, tags in zip(store.documents, store.tags, strict=True):
            truth += tags[tags >= 0].tolist()
            predicted += model(torch.from_numpy(ids)[None]).logits[0].argmax(-1)[torch.from_numpy(tags >= 0)].tolist()
    assert len(truth) == figures["targets"] > 100
    assert figures["accuracy"] == pytest.approx(oracle.accuracy_score(truth, predicted))
    assert figures["macro_f1"] == pytest.approx(oracle.f1_score(truth, predicted, average="macro"))


@pytest.mark.ranks
@pytest.mark.parametrize("size", [*SIZES, "sources"])
def test_held_out_answers_are_exact(evaluations: dict[int, dict[str, Any]], size: str) -> None:
    """The best span of both windows of each question, found in one window at a time, against its answers."""
    figures = evaluations[2]["bert_answers"][size]
    store, _ = memory_store("question_answering")
    assert isinstance(store, QuestionStore)
    model = make_model("bert_answers", packed=False).eval()
    exact, f1 = [], []
    for question in range(12):
        found, nulls = [], []
        for window in (2 * question, 2 * question + 1):
            ids = torch.from_numpy(store.documents[window])[None]
            with torch.no_grad():
                output = model(ids, token_type_ids=(torch.arange(ids.shape[1]) >= 1).long()[None])
            starts, ends = output.start_logits[0], output.end_logits[0]
            nulls.append(float(starts[0] + ends[0]))
            before = int(store.column("context_firsts")[window])
            count = store.counts[window]
            found += [
                (float(starts[1 + first] + ends[1 + last]), before + first, before + last)
                for first in range(count)
                for last in range(first, count)
            ]
        score, first, last = max(found)
        text = "" if min(nulls) > score else " ".join(store.words(2 * question)[first : last + 1])
        exact.append(text in (store.answers(2 * question) or [""]))
        f1.append(max(words_f1(text, answer) for answer in store.answers(2 * question) or [""]))
    assert figures["exact_match"] == pytest.approx(np.mean(exact))
    assert figures["best_f1"] >= figures["f1"] == pytest.approx(np.mean(f1)) and len(set(f1)) > 2


def words_f1(text: str, answer: str) -> float:
    """F1 over words, of texts without articles and marks."""
    found, wanted = Counter(text.split()), Counter(answer.split())
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (found & wanted).total() / (found.total() + wanted.total())


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluation_stops_when_one_rank_is_asked_and_goes_back_to_training(
    evaluations: dict[int, dict[str, Any]], family: str, world_size: int
) -> None:
    results = evaluations[world_size][family]
    assert results["stopped"] is None
    assert results["rounds"] == 3
    assert results["trains_again"] is True
    assert "the held-out loss is not finite" in results["not finite"]


def test_results_are_sums_by_document_in_double_precision() -> None:
    losses = torch.tensor([1.0, 2.0**-30, 4.0, 2.0**-30], dtype=torch.float32)
    results = document_results(losses, torch.tensor([2, 2, 0, 2]), 4)
    assert [(result.loss, result.num_targets) for result in results] == [
        (4.0, 1),
        (0.0, 0),
        (1.0 + 2.0**-29, 3),
        (0.0, 0),
    ]
    assert mean_loss(results) == (5.0 + 2.0**-29) / 4
    assert mean_loss([]) == 0.0


def test_the_mean_loss_does_not_depend_on_the_order() -> None:
    draw = np.random.default_rng(3)
    results = [DocumentResult(float(loss), 1) for loss in draw.lognormal(0, 8, 500)]
    expected = mean_loss(results)
    assert all(mean_loss([results[place] for place in draw.permutation(500)]) == expected for _ in range(20))


def test_each_document_of_a_pack_has_the_sum_of_its_own_targets() -> None:
    """The losses of a pack's documents, against the stock model on each document alone."""
    task = TASKS["causal_lm"]
    store, index = memory_store(task.name)
    batch = task.batch(store, index, np.array([2, 0]), 0, STILL)
    packed, alone = (make_model("llama", packed=one).eval() for one in (True, False))
    with torch.no_grad():
        results = task.results(task.loss(packed, batch, LossOptions()), batch)
        for document, result in zip([6, 7, 8, 0, 1, 2], results, strict=True):
            ids = torch.from_numpy(store.documents[document])
            mark = torch.from_numpy(store.marks[document])[1:]
            logits = alone(ids[None], use_cache=False).logits[0, :-1][mark]
            expected = torch.nn.functional.cross_entropy(logits, ids[1:][mark], reduction="sum").item()
            assert result.num_targets == int(mark.sum())
            assert result.loss == pytest.approx(expected, rel=1e-5)
