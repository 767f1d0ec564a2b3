"""Prepared stores of tags and roles through the tasks of the engine: windows, pieces, and the figures of sentences."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from data_fixtures import WORDS, bert_vocabulary, byte_level_folder, prepared, section, write_jsonl

from data_prep.token_store import Rows, TokenStore
from engine.errors import ConfigError
from engine.model.attention import PACKED_ATTENTION, register_packed_attention
from engine.model.task_model import TaskModel
from engine.tasks import TASKS
from engine.tasks.task import STILL, DocumentResult, Output
from engine.train import check_metric

TAGS = ("O", "B-word", "I-word", "B-place", "I-place")
LENGTHS = (3, 40, 1, 25, 60, 7)


def sentences() -> list[dict[str, Any]]:
    """Words of one and of several pieces, with tags that follow no rule."""
    draw = np.random.default_rng(4)
    words = [word for word in WORDS if word.isascii() and word.isalpha()] + ["qzx", "unbridgeable"]
    return [
        {"tokens": draw.choice(words, length).tolist(), "tags": draw.choice(TAGS, length).tolist()}
        for length in LENGTHS
    ]


def store_of(folder: Path, records: list[dict[str, Any]], task: str, **more: Any) -> tuple[TokenStore, Rows]:
    path = write_jsonl(folder / "a.jsonl", records)
    values = section(folder, bert_vocabulary(folder / "vocab.txt"), path, row_tokens=24, stride_tokens=6, **more)
    return prepared(values, task)


def small_model(kind: str, store: TokenStore, attention: str | None = None) -> Any:
    common: dict[str, Any] = {
        "vocab_size": 1000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_labels": len(store.label_names), "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    kinds = {
        "bert": transformers.BertConfig, "roberta": transformers.RobertaConfig,
        "modernbert": transformers.ModernBertConfig, "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config, "gpt2": transformers.GPT2Config,
    }  # fmt: skip
    if kind in ("llama", "qwen2"):
        common |= {"num_key_value_heads": 2}
    if kind == "gpt2":
        common |= {"n_embd": 32, "n_layer": 2, "n_head": 4}
    torch.manual_seed(3)
    options = {"attn_implementation": attention} if attention else {}
    return transformers.AutoModelForTokenClassification.from_config(kinds[kind](**common), **options).eval()


@pytest.mark.parametrize("name", ["token_classification", "semantic_roles"])
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "gpt2", "llama", "qwen2"])
def test_windows_have_the_losses_of_the_stock_model_alone(family: str, name: str, tmp_path: Path) -> None:
    """Flat and padded batches of windows in which every piece is a target."""
    register_packed_attention()
    records = sentences()
    if name == "semantic_roles":
        records = [{"tokens": one["tokens"], "roles": one["tags"], "predicate": 0} for one in records]
    store, rows = store_of(tmp_path, records, name, overlong="split", tag_pieces="every")
    stock = small_model(family, store)
    flat = TASKS[name]
    assert flat.padded is not None
    packed = small_model(family, store, PACKED_ATTENTION)
    chosen = np.array([3, 0, 5, 2])
    expected = []
    for row in chosen.tolist():
        inputs = {"input_ids": torch.from_numpy(store.tokens(row).astype(np.int64))[None]}
        if name == "semantic_roles" and family in ("bert", "roberta"):
            types = store.token_column("predicate_types", row).astype(np.int64)
            inputs["token_type_ids"] = torch.from_numpy(types)[None]
        tags = torch.from_numpy(store.token_column("tags", row).astype(np.int64))
        with torch.no_grad():
            expected += F.cross_entropy(stock(**inputs).logits[0], tags, ignore_index=-1, reduction="none")[tags >= 0]
    for task, model in ((flat, packed), (flat.padded, stock)):
        batch = task.batch(store, rows, chosen, 0, STILL)
        with torch.no_grad():
            values = TaskModel(model, task)(batch).values
        torch.testing.assert_close(values["losses"], torch.stack(expected), rtol=1e-4, atol=1e-5)


def results_of(store: TokenStore, rows: Rows, task: str, model: Any, guess: Any = None) -> list[DocumentResult]:
    """The results of all documents, in batches of three; `guess` gives other predictions from the true tags."""
    found: list[DocumentResult] = []
    for first in range(0, rows.num_rows, 3):
        batch = TASKS[task].batch(store, rows, np.arange(first, min(first + 3, rows.num_rows)), 0, STILL)
        with torch.no_grad():
            output = TaskModel(model, TASKS[task])(batch)
        if guess is not None:
            output = Output(output.loss_sum, {**output.values, "predicted": guess(batch.target_ids)}, {})
        found += TASKS[task].results(output, batch)
    return found


@pytest.mark.parametrize("pieces", ["first", "every"])
def test_each_word_is_scored_once_in_windows(tmp_path: Path, pieces: str) -> None:
    records = sentences()
    store, rows = store_of(tmp_path, records, "token_classification", overlong="split", tag_pieces=pieces)
    assert store.num_documents > len(records)
    results = results_of(store, rows, "token_classification", small_model("bert", store))
    by_sentence: dict[Any, list[str]] = {}
    for result in results:
        own = by_sentence.setdefault(result.details["sentence"], [])
        own += [store.label_names[tag] for tag in result.details["tags"]]  # type: ignore[union-attr,index]
    assert list(by_sentence.values()) == [record["tags"] for record in records]
    words = sum(LENGTHS)
    assert sum(result.num_targets for result in results) == store.num_targets
    assert store.num_targets == words if pieces == "first" else store.num_targets > words
    total = store.manifest["ledger"]["total"]
    assert total["extra_documents"] == store.num_documents - len(records) and total["notes"] == {"windowed": 3}


def test_figures_are_those_of_whole_sentences(tmp_path: Path) -> None:
    """The same words, tags and predictions in windows and in rows that hold whole sentences."""
    records = sentences()
    task = TASKS["token_classification"]
    model = None
    figures = []
    cases: dict[str, dict[str, Any]] = {"windows": {"overlong": "split"}, "whole": {"row_tokens": 400}}
    for name, more in cases.items():
        folder = tmp_path / name
        path = write_jsonl(folder / "a.jsonl", records)
        values = section(
            folder, bert_vocabulary(folder / "vocab.txt"), path, **{"row_tokens": 24, "stride_tokens": 6, **more}
        )
        store, rows = prepared(values, task.name)
        model = model or small_model("bert", store)

        def guess(tags: torch.Tensor) -> torch.Tensor:
            return torch.where(tags == 1, 3, tags)  # a mistake that the tag alone decides

        figures.append(task.figures(results_of(store, rows, task.name, model, guess), store))
    assert figures[0] == figures[1]
    assert 0 < figures[0]["strict_f1"] < 1 and figures[0]["f1"] == figures[0]["conll_f1"] < 1
    assert figures[0]["illegal_tags"] > 0 and set(task.metrics) - {"loss"} <= set(figures[0])


def test_plain_tags_have_accuracy_and_macro_f1_only(tmp_path: Path) -> None:
    records = [{"tokens": ["a", "b", "c"], "tags": ["NOUN", "VERB", "X"]}]
    store, rows = store_of(tmp_path, records, "token_classification")
    results = results_of(store, rows, "token_classification", small_model("bert", store), lambda tags: tags * 0)
    figures = TASKS["token_classification"].figures(results, store)
    assert set(figures) == {"f1", "accuracy", "macro_f1"}
    task = TASKS["token_classification"]
    check_metric("accuracy", figures, task)
    with pytest.raises(ConfigError, match="conll_f1 has no value with this data, which has f1, macro_f1, accuracy"):
        check_metric("conll_f1", figures, task)
    assert TASKS["token_classification"].report is not None
    table = TASKS["token_classification"].report(results, store)["tags"]
    assert isinstance(table, str) and table.split("\n")[1].split() == ["NOUN", "0.3333", "1.0000", "0.5000", "1"]
    assert figures["accuracy"] == 1 / 3 and figures["f1"] == figures["macro_f1"] == pytest.approx(0.5 / 3)


def test_predictions_of_windows_join_to_a_tag_a_word(tmp_path: Path) -> None:
    records = sentences()
    task = TASKS["token_classification"]
    store, rows = store_of(tmp_path, records, task.name, overlong="split", tag_pieces="every")
    model = small_model("bert", store)
    assert task.predictions is not None and task.join is not None
    windows: dict[int, list[dict[str, Any]]] = {}
    for row in range(rows.num_rows):
        batch = task.batch(store, rows, np.array([row]), 0, STILL)
        with torch.no_grad():
            output = TaskModel(model, task)(batch)
        output = output._replace(values={**output.values, "predicted": batch.target_ids})
        (one,) = task.predictions(output, batch, store)
        windows.setdefault(int(store.column("sentence_numbers")[row]), []).append(one)
    joined = [task.join(own) for own in windows.values()]
    assert joined == [{"tags": record["tags"]} for record in records]


ROLES = [
    {"tokens": ["she", "gave", "him", "bread"], "predicate": 1, "roles": ["ARG0", "V", "ARG2", "ARG1"]},
    {"tokens": ["he", "came", "and", "came"], "predicate": [3], "roles": ["ARG0", "O", "O", "V"]},
]


def test_the_predicate_is_marked_for_models_with_token_types(tmp_path: Path) -> None:
    store, rows = store_of(tmp_path, ROLES, "semantic_roles")
    flat_task = TASKS["semantic_roles"]
    task = flat_task.padded
    assert task is not None
    flat, batch = (one.batch(store, rows, np.arange(2), 0, STILL) for one in (flat_task, task))
    assert batch.lengths is not None
    types = batch.columns["predicate_types"]
    lengths = batch.lengths.tolist()
    apart = [own[:length].tolist() for own, length in zip(types, lengths, strict=True)]
    assert flat.columns["predicate_types"].tolist() == [apart[0] + apart[1]]
    model = small_model("bert", store)
    with torch.no_grad():
        logits = TaskModel(model, task)(batch).values["logits"]
    for row, word in enumerate((1, 3)):
        own = store.tokens(row).tolist()
        separator = own.index(3)
        second = list(range(separator + 1, len(own)))
        inside = [place for place in range(separator) if apart[row][place]]
        assert [place for place in range(separator, len(own)) if apart[row][place]] == second
        assert [own[place] for place in inside] == [own[place] for place in second[:-1]], "here and there the same"
        targets = np.flatnonzero(store.targets(row)).tolist()
        assert inside[0] == targets[word]
        with torch.no_grad():
            alone = model(torch.tensor([own]), token_type_ids=torch.tensor([apart[row]])).logits[0][targets]
            without = model(torch.tensor([own])).logits[0][targets]
        torch.testing.assert_close(logits[batch.target_owners == row], alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(alone, without, rtol=1e-3)


def test_a_decoder_reads_the_predicate_first(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROLES)
    store, rows = prepared(section(tmp_path, byte_level_folder(tmp_path / "t"), path), "semantic_roles")
    from data_prep.tokenizer.open import open_tokenizer

    text = open_tokenizer(str(tmp_path / "t")).decode(store.tokens(0).tolist(), skip_special_tokens=True)
    assert text.split() == ["gave", "she", "gave", "him", "bread"] or text.startswith(" gave")
    results = results_of(store, rows, "semantic_roles", small_model("llama", store))
    assert [len(one.details["tags"]) for one in results] == [4, 4]  # type: ignore[arg-type]


def test_figures_of_roles_leave_the_verb_out(tmp_path: Path) -> None:
    store, rows = store_of(tmp_path, ROLES, "semantic_roles")
    names = store.label_names

    def guess(tags: torch.Tensor) -> torch.Tensor:
        return torch.where(tags == names.index("ARG2"), names.index("ARG1"), tags)

    results = results_of(store, rows, "semantic_roles", small_model("bert", store), guess)
    figures = TASKS["semantic_roles"].figures(results, store)
    # Four arguments without the verbs; three are found, and one word is given the wrong role.
    assert figures["arguments"] == 4 and figures["precision"] == figures["recall"] == figures["f1"] == 0.75
    assert figures["accuracy"] == 7 / 8
    assert TASKS["semantic_roles"].report is not None
    table = TASKS["semantic_roles"].report(results, store)["arguments"]
    assert isinstance(table, str)
    lines = [line.split() for line in table.split("\n")[1:]]
    assert lines == [
        ["ARG0", "1.0000", "1.0000", "1.0000", "2"],
        ["ARG1", "0.5000", "1.0000", "0.6667", "1"],
        ["ARG2", "0.0000", "0.0000", "0.0000", "1"],
    ]


def test_spans_of_roles_are_found_whole(tmp_path: Path) -> None:
    spans = [
        {"tokens": ["the", "man", "gave", "bread"], "predicate": 2, "roles": ["B-ARG0", "I-ARG0", "B-V", "B-ARG1"]}
    ]
    store, rows = store_of(tmp_path, spans, "semantic_roles")
    names = store.label_names

    def guess(tags: torch.Tensor) -> torch.Tensor:
        return torch.where(tags == names.index("I-ARG0"), names.index("B-ARG1"), tags)

    figures = TASKS["semantic_roles"].figures(
        results_of(store, rows, "semantic_roles", small_model("bert", store), guess), store
    )
    assert figures["arguments"] == 2 and figures["recall"] == 0.5 and figures["precision"] == 1 / 3
