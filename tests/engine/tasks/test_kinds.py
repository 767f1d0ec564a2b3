"""Sets of labels and scores in batches, flat and padded: losses, results and predictions as transformers computes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from data_fixtures import bert_vocabulary, sentences, write_jsonl
from data_fixtures import section as data_section

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from data_prep.token_store import Rows, TokenStore, open_rows
from engine.batches import Batch
from engine.model.attention import PACKED_ATTENTION, register_packed_attention
from engine.model.task_model import TaskModel, label_numbers
from engine.tasks import TASKS
from engine.tasks.task import STILL, Task

NAMES = ("anger", "fear", "joy")
#: Another order than the store's, and a label that no record has.
MODEL_NAMES = ("joy", "anger", "calm", "fear")


def sets(count: int) -> list[dict[str, Any]]:
    texts = sentences(count, seed=1, longest_words=9)
    return [{"text": text, "labels": [name for bit, name in enumerate(NAMES) if place >> bit & 1]} for place, text in
            enumerate(texts)]  # fmt: skip


def scored(count: int) -> list[dict[str, Any]]:
    texts = sentences(2 * count, seed=2, longest_words=7)
    return [{"text": one, "pair": two, "score": len(one) / 8} for one, two in zip(texts[::2], texts[1::2], strict=True)]


def stores(folder: Path, train: list[Any], held_out: list[Any], **more: Any) -> dict[str, tuple[TokenStore, Rows]]:
    paths = [str(write_jsonl(folder / f"{name}.jsonl", some)) for name, some in (("t", train), ("v", held_out))]
    values = data_section(folder, bert_vocabulary(folder / "vocab.txt"), paths[0], validation=paths[1], **more)
    folders = prepare(DataConfig.model_validate(values), values, "sequence_classification", progress=False)
    opened = {split: TokenStore.open(path) for split, path in folders.items()}
    return {split: (store, open_rows(store, values["row_tokens"])) for split, store in opened.items()}


def model_of(names: tuple[str, ...], family: str, problem: str, is_flat: bool, vocab_size: int) -> Any:
    register_packed_attention()
    torch.manual_seed(3)
    common: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)},
        "problem_type": problem, "pad_token_id": 0, "initializer_range": 0.5,
        "attn_implementation": PACKED_ATTENTION if is_flat else "sdpa",
    }  # fmt: skip
    config = (
        hf.BertConfig(**common, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        if family == "bert"
        else hf.LlamaConfig(**common)
    )
    return hf.AutoModelForSequenceClassification.from_config(config).eval()


def plain_output(model: Any, store: TokenStore, documents: list[int], labels: torch.Tensor) -> Any:
    """transformers' own loss and logits of a padded batch, with the types of the texts of a pair."""
    model.set_attn_implementation("eager")
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [torch.from_numpy(store.tokens(document).astype(np.int64)) for document in documents]
    inputs = {"attention_mask": pad([torch.ones_like(one) for one in ids], batch_first=True)}
    if model.config.model_type == "bert":
        starts = store.column("pair_starts")[documents].tolist()
        types = [(torch.arange(len(one)) >= (begin or len(one))).long() for one, begin in zip(ids, starts, strict=True)]
        inputs["token_type_ids"] = pad(types, batch_first=True)
    with torch.no_grad():
        return model(input_ids=pad(ids, batch_first=True), labels=labels, **inputs)


def run(task: Task, model: Any, store: TokenStore, rows: Rows) -> tuple[Any, Batch, list[int]]:
    """The output of a batch of some documents, and their numbers."""
    numbers = np.array([4, 0, 2, 5], dtype=np.int64)
    batch = task.batch(store, rows, numbers, 0, STILL)
    with torch.no_grad():
        output = TaskModel(model, task, label_numbers(model, store.label_names))(batch)
    return output, batch, [int(rows.segments(int(row))[0][0]) for row in numbers]


def form_of(store: TokenStore, is_flat: bool) -> Task:
    task = TASKS["sequence_classification"].on(store)
    assert task.padded is not None
    return task if is_flat else task.padded


FORMS = pytest.mark.parametrize("is_flat", [True, False], ids=["flat", "padded"])


@FORMS
def test_sets_of_labels(tmp_path: Path, is_flat: bool) -> None:
    store, rows = stores(tmp_path, sets(8), sets(3))["train"]
    assert tuple(store.label_names) == NAMES
    task = form_of(store, is_flat)
    model = model_of(MODEL_NAMES, "bert", "multi_label_classification", is_flat, store.vocab_size)
    output, batch, documents = run(task, model, store, rows)
    own = [[NAMES[number] for number in store.ragged("label_sets", document).tolist()] for document in documents]
    labels = torch.tensor([[float(name in names) for name in MODEL_NAMES] for names in own])
    plain = plain_output(model, store, documents, labels)
    assert output.loss_sum.item() == pytest.approx(plain.loss.item() * 4, rel=1e-5)
    results = task.results(output, batch)
    assert [result.num_targets for result in results] == [1, 1, 1, 1]
    assert sum(result.loss for result in results) == pytest.approx(output.loss_sum.item(), rel=1e-6)
    chosen = plain.logits.sigmoid() >= 0.5
    in_order = [*NAMES, "calm"]
    for result, names, row in zip(results, own, chosen, strict=True):
        assert {NAMES[number] for number in result.details["labels"]} == set(names)  # type: ignore[union-attr]
        found = {in_order[int(number)] for number in result.details["predicted"]}  # type: ignore[union-attr]
        assert found == {name for name, is_chosen in zip(MODEL_NAMES, row, strict=True) if is_chosen}


def test_unknown_labels_of_sets_are_counted_as_missed(tmp_path: Path) -> None:
    held_out = [{"text": "the river", "labels": ["joy", "odd", "new"]}, {"text": "a stone", "labels": ["joy"]}]
    with_unknown = stores(tmp_path, sets(8), held_out, unknown_labels="count_wrong")["validation"]
    store, rows = with_unknown
    task = form_of(store, True)
    batch = task.batch(store, rows, np.array([0, 1]), 0, STILL)
    assert batch.target_ids.tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    model = model_of(NAMES, "bert", "multi_label_classification", True, store.vocab_size)
    with torch.no_grad():
        output = TaskModel(model, task)(batch)._replace(
            values={"losses": torch.zeros(2), "logits": torch.tensor([[-1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])}
        )
    figures = task.figures(task.results(output, batch), store)
    assert figures["exact_match"] == 0.5, "the first set has labels that nothing predicts"
    assert figures["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 2))


@FORMS
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_scores_of_pairs(tmp_path: Path, family: str, is_flat: bool) -> None:
    store, rows = stores(tmp_path, scored(8), scored(3))["train"]
    task = form_of(store, is_flat)
    model = model_of(("LABEL_0",), family, "regression", is_flat, store.vocab_size)
    output, batch, documents = run(task, model, store, rows)
    plain = plain_output(model, store, documents, torch.from_numpy(store.column("scores")[documents]))
    assert output.loss_sum.item() == pytest.approx(plain.loss.item() * 4, rel=1e-5)
    results = task.results(output, batch)
    assert [result.details["score"] for result in results] == store.column("scores")[documents].tolist()
    guessed = [result.details["predicted"] for result in results]
    assert guessed == pytest.approx(plain.logits[:, 0].tolist(), rel=1e-4)
    assert task.predictions is not None
    assert [one["score"] for one in task.predictions(output, batch, store)] == guessed


@pytest.mark.parametrize("records", [sets, scored], ids=["sets", "scores"])
def test_a_filler_batch_costs_nothing_and_reaches_every_parameter(
    tmp_path: Path, records: Callable[[int], list[dict[str, Any]]]
) -> None:
    store, rows = stores(tmp_path, records(8), records(3))["train"]
    names = NAMES if store.label_names else ("LABEL_0",)
    task = form_of(store, True)
    model = model_of(names, "bert", task.problem or "", True, store.vocab_size)
    loss_sum = TaskModel(model, task)(task.batch(store, rows, np.array([], dtype=np.int64), 2, STILL)).loss_sum
    loss_sum.backward()
    assert loss_sum.item() == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_predictions_of_labels_and_sets_have_the_probability_of_each_name(tmp_path: Path) -> None:
    store, rows = stores(tmp_path, sets(8), sets(3))["train"]
    task = form_of(store, True)
    model = model_of(NAMES, "bert", "multi_label_classification", True, store.vocab_size)
    output, batch, _ = run(task, model, store, rows)
    assert task.predictions is not None
    for one, logits in zip(task.predictions(output, batch, store), output.values["logits"], strict=True):
        assert one["probabilities"] == pytest.approx(dict(zip(NAMES, logits.sigmoid().tolist(), strict=True)))
        assert one["labels"] == [name for name, value in one["probabilities"].items() if value >= 0.5]
    single = TASKS["sequence_classification"]
    assert single.predictions is not None
    values = {"predicted": output.values["logits"].argmax(-1), "logits": output.values["logits"]}
    for one, logits in zip(
        single.predictions(output._replace(values=values), batch, store), output.values["logits"], strict=True
    ):
        assert one["label"] == NAMES[int(logits.argmax())] and sum(one["probabilities"].values()) == pytest.approx(1.0)
