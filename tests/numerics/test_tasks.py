"""Task losses and heads against the stock classes, metrics against their definitions."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from equivalence_cases import fitting_task, make_model, task_of
from memory_stores import memory_store

from engine.errors import DataError
from engine.model.attention import register_packed_attention
from engine.model.build import decay_groups
from engine.model.task_model import TaskModel
from engine.tasks import TASKS
from engine.tasks.forward import document_logits
from engine.tasks.metrics import label_figures
from engine.tasks.task import STILL, UNKNOWN_LABEL

register_packed_attention()


@pytest.mark.parametrize("family", ["bert", "llama_labels", "t5_labels"])
def test_pooling_equals_the_stock_head_one_text_at_a_time(family: str) -> None:
    task = fitting_task(family)
    model, stock = (make_model(family, packed=packed).eval() for packed in (task.packs, False))
    store, index = memory_store("sequence_classification")
    rows = np.array([0, 5, 11, 17])
    with torch.no_grad():
        together = document_logits(model, task.batch(store, index, rows, 0, STILL))
        for row, logits in zip(rows, together, strict=True):
            alone = stock(torch.from_numpy(store.documents[row])[None]).logits[0]
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


def test_bert_is_told_which_text_of_a_pair_is_the_second() -> None:
    model, stock = (make_model("bert", packed=packed).eval() for packed in (True, False))
    store, index = memory_store("sequence_classification")
    rows = np.array([0, 5, 11])
    batch = TASKS["sequence_classification"].batch(store, index, rows, 0, STILL)
    assert batch.columns["pair_starts"].tolist() == [0, 0, 0]
    starts = [2, 0, 1]  # the second of these is one text
    batch = dataclasses.replace(batch, columns={"pair_starts": torch.tensor(starts)})
    with torch.no_grad():
        together = document_logits(model, batch)
        for row, start, logits in zip(rows, starts, together, strict=True):
            ids = torch.from_numpy(store.documents[row])[None]
            types = torch.zeros_like(ids)
            types[0, start:] = int(start > 0)
            alone = stock(ids, token_type_ids=types).logits[0]
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)
            if start:
                assert not torch.allclose(logits, stock(ids).logits[0], rtol=1e-3)


def test_pooling_is_not_fooled_by_padding_ids_inside_a_text() -> None:
    """A text that ends in the padding id: the stock head pools an earlier token, ours the stored last one."""
    model, stock = (make_model("llama_labels", packed=packed).eval() for packed in (True, False))
    store, index = memory_store("sequence_classification")
    store.documents[0][-1] = store.pad_id
    batch = TASKS["sequence_classification"].batch(store, index, np.array([0, 1]), 0, STILL)
    hidden = stock.model(torch.from_numpy(store.documents[0])[None]).last_hidden_state[0, -1]
    with torch.no_grad():
        torch.testing.assert_close(document_logits(model, batch)[0], model.score(hidden), rtol=1e-4, atol=1e-5)


def test_encoder_decoder_texts_must_end_with_the_end_token() -> None:
    model = make_model("t5_labels", packed=False)
    store, index = memory_store("sequence_classification")
    store.documents[3][-1] = 9
    with pytest.raises(DataError, match="end token"):
        document_logits(model, fitting_task("t5_labels").batch(store, index, np.array([3]), 0, STILL))


def test_the_output_layer_sees_targets_only() -> None:
    model = make_model("llama", packed=True)
    store, index = memory_store("causal_lm")
    batch = TASKS["causal_lm"].batch(store, index, np.array([1, 2]), 0, STILL)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel() // 32))
    training, values, others = TaskModel(model, TASKS["causal_lm"])(batch)
    assert seen == [len(batch.target_ids)]
    assert len(batch.target_ids) < batch.num_tokens
    assert values == others == {} and training.requires_grad, "a training step keeps nothing but the loss"
    with torch.no_grad():
        loss_sum, values, _ = TaskModel(model, TASKS["causal_lm"])(batch)
    assert loss_sum.dtype == values["losses"].dtype == torch.float32
    assert loss_sum == training and values["losses"].shape == batch.target_ids.shape


@pytest.mark.parametrize("family", ["llama", "bert", "bert_tags", "llama_tags"])
def test_a_filler_batch_costs_nothing_and_reaches_every_parameter(family: str) -> None:
    """ZeRO needs every rank in every collective; a rank without rows must add exactly nothing."""
    task = TASKS[task_of(family)]
    model = make_model(family, packed=task.packs)
    store, index = memory_store(task.name)
    loss_sum, _, _ = TaskModel(model, task)(task.batch(store, index, np.array([], dtype=np.int64), 2, STILL))
    loss_sum.backward()
    assert loss_sum.item() == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_classification_loss_and_predictions() -> None:
    model, stock = (make_model("bert", packed=packed).eval() for packed in (True, False))
    store, index = memory_store("sequence_classification")
    rows = np.array([2, 3, 4])
    batch = TASKS["sequence_classification"].batch(store, index, rows, 0, STILL)
    with torch.no_grad():
        loss_sum, values, _ = TaskModel(model, TASKS["sequence_classification"])(batch)
    logits = torch.stack([stock(torch.from_numpy(store.documents[row])[None]).logits[0] for row in rows])
    labels = torch.from_numpy(store.labels[rows]).long()
    assert loss_sum.item() == pytest.approx(F.cross_entropy(logits, labels).item() * 3, rel=1e-5)
    assert values["predicted"].tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("family", ["bert_tags", "llama_tags"])
def test_tags_are_predicted_as_for_one_sentence_at_a_time(family: str) -> None:
    model, stock = (make_model(family, packed=packed).eval() for packed in (True, False))
    task = TASKS["token_classification"]
    store, index = memory_store(task.name)
    rows = np.array([2, 3, 4])
    batch = task.batch(store, index, rows, 0, STILL)
    with torch.no_grad():
        output = TaskModel(model, task)(batch)
        results = task.results(output, batch)
        for row, result in zip(rows, results, strict=True):
            tags = torch.from_numpy(store.tags[row]).long()
            logits = stock(torch.from_numpy(store.documents[row])[None]).logits[0][tags >= 0]
            assert result.details["tags"] == tags[tags >= 0].tolist()
            assert result.details["predicted"] == logits.argmax(-1).tolist()
            assert result.num_targets == len(logits)
            expected = F.cross_entropy(logits, tags[tags >= 0], reduction="sum").item()
            assert result.loss == pytest.approx(expected, rel=1e-5)
    assert output.loss_sum.item() == pytest.approx(sum(result.loss for result in results), rel=1e-6)


def test_predictions_are_those_of_the_stock_model_without_true_labels() -> None:
    """Each text alone through the stock class: the likeliest label and every probability, and the tag of each word."""
    rows = np.array([2, 3, 4])
    for family in ("bert", "bert_tags"):
        model, stock = (make_model(family, packed=packed).eval() for packed in (True, False))
        task = TASKS[task_of(family)]
        assert task.predictions is not None
        store, index = memory_store(task.name)
        batch = task.batch(store, index, rows, 0, STILL)
        with torch.no_grad():
            unlabelled = dataclasses.replace(batch, target_ids=torch.full_like(batch.target_ids, UNKNOWN_LABEL))
            predictions = task.predictions(TaskModel(model, task)(unlabelled), unlabelled, store)
            for row, predicted in zip(rows, predictions, strict=True):
                logits = stock(torch.from_numpy(store.documents[row])[None]).logits[0]
                if family == "bert":
                    assert predicted["label"] == store.label_names[int(logits.argmax())]
                    expected = dict(zip(store.label_names, logits.softmax(-1).tolist(), strict=True))
                    assert predicted["probabilities"] == pytest.approx(expected, abs=1e-5)
                else:
                    tagged = logits.argmax(-1)[torch.from_numpy(store.tags[row]) >= 0]
                    assert predicted == {"tags": [store.label_names[tag] for tag in tagged.tolist()]}


def test_macro_f1_equals_its_definition() -> None:
    generator = np.random.default_rng(4)
    truth, predicted = generator.integers(0, 4, 200), generator.integers(0, 3, 200)  # label 3 is never predicted
    scores = []
    for label in range(4):
        hits = int(((truth == label) & (predicted == label)).sum())
        precision = hits / max(1, int((predicted == label).sum()))
        recall = hits / max(1, int((truth == label).sum()))
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    for num_labels in (4, 9):  # the others neither occur nor are predicted
        assert label_figures(truth, predicted, num_labels)["macro_f1"] == pytest.approx(float(np.mean(scores)))


def test_biases_and_norms_do_not_decay() -> None:
    model = make_model("gpt2", packed=False)
    decayed, kept = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") and ".ln_" not in names[id(p)] for p in decayed["params"])
    assert all(names[id(p)].endswith("bias") or ".ln_" in names[id(p)] for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_a_label_that_train_has_not_is_wrong_and_has_no_loss() -> None:
    """Of classification: accuracy counts it, macro F1 sees a false positive, the mean loss leaves it out."""
    truth, predicted = np.array([0, 1, UNKNOWN_LABEL, UNKNOWN_LABEL]), np.array([0, 1, 1, 0])
    figures = label_figures(truth, predicted, 2)
    assert (figures["accuracy"], figures["macro_f1"]) == (0.5, pytest.approx(2 / 3))
    assert figures["weighted_f1"] == pytest.approx((2 / 3 + 2 / 3) / 4), "the unknown two count with F1 0"
    model = make_model("bert", packed=True).eval()
    task = TASKS["sequence_classification"]
    store, index = memory_store(task.name)
    batch = task.batch(store, index, np.array([2, 3, 4]), 0, STILL)
    unknown = dataclasses.replace(batch, target_ids=torch.tensor([1, UNKNOWN_LABEL, 0]))
    order = (2, 0, 1)  # of the labels in the model
    for reordered in (None, order[: model.config.num_labels]):
        with torch.no_grad():
            output = TaskModel(model, task, reordered)(unknown)
        results = task.results(output, unknown)
        assert [result.num_targets for result in results] == [1, 0, 1]
        assert output.loss_sum.item() == pytest.approx(sum(result.loss for result in results)) and results[1].loss == 0
        assert task.figures(results, SimpleNamespace(label_names=("a", "b", "c")))["accuracy"] <= 2 / 3
    assert TaskModel(model, task)(batch).loss_sum.item() != pytest.approx(output.loss_sum.item())


def test_a_tag_that_train_has_not_is_wrong_and_has_no_loss() -> None:
    model = make_model("bert_tags", packed=True).eval()
    task = TASKS["token_classification"]
    store, index = memory_store(task.name)
    batch = task.batch(store, index, np.array([2]), 0, STILL)
    tags = batch.target_ids.clone()
    tags[0] = UNKNOWN_LABEL
    with torch.no_grad():
        whole, part = (
            task.results(TaskModel(model, task)(one), one)[0]
            for one in (batch, dataclasses.replace(batch, target_ids=tags))
        )
    assert part.num_targets == whole.num_targets - 1 and part.loss < whole.loss
    assert part.details["tags"][0] == UNKNOWN_LABEL and len(part.details["tags"]) == whole.num_targets
    assert task.figures([part], SimpleNamespace(label_names=("a", "b", "c")))["accuracy"] < 1
