"""Heads of models for labels, sets of labels and scores: kept, made anew, or refused with both sets of labels."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from whole_model import fill

from engine.errors import ConfigError, DataError
from engine.model.build import StoreFacts, build_model, fitting_task
from engine.sections import ModelSection
from engine.setup import model_digest
from engine.tasks import TASKS

TASK = TASKS["sequence_classification"]
KINDS = {"labels": TASK.kinds["labels"], "sets": TASK.kinds["label_sets"], "scores": TASK.kinds["scores"]}
NAMES = ("bad", "good", "great")


def facts(*names: str) -> StoreFacts:
    return StoreFacts(vocab_size=61, pad_id=0, bos_id=1, eos_id=2, label_names=names)


def save(folder: Path, names: tuple[str, ...] | None, **more: Any) -> Path:
    """A BERT with a head for `names`, or without any head."""
    torch.manual_seed(4)
    labels = (
        {} if names is None else {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    )
    config = hf.BertConfig(
        vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **labels, **more
    )  # fmt: skip
    kind = hf.BertModel if names is None else hf.BertForSequenceClassification
    kind(config).save_pretrained(folder)
    return folder


def built(folder: Path, kind: str, *names: str, seed: int = 3, **section: Any) -> Any:
    values = ModelSection(path=str(folder), activation_checkpointing=False, **section)
    return fill(*build_model(values, KINDS[kind], facts(*names), seed))


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_the_files_lack_follows_from_the_seed_alone(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same for every rank of every number of ranks, whatever was drawn before, and with the head's own outputs."""
    folder, names = save(tmp_path, None), () if kind == "scores" else NAMES
    heads = []
    for rank, world_size, seed in ((0, 1, 3), (0, 3, 3), (2, 3, 3), (0, 1, 4)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        torch.manual_seed(rank + 10 * world_size)
        model = built(folder, kind, *names, seed=seed)
        heads.append(model.classifier.weight.detach().clone())
    assert heads[0].shape == (1 if kind == "scores" else 3, 16)
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[3])
    assert "new, untrained weights: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "problem"),
    [("labels", "single_label_classification"), ("sets", "multi_label_classification"), ("scores", "regression")],
)
def test_the_configuration_says_what_the_head_computes(tmp_path: Path, kind: str, problem: str) -> None:
    names = () if kind == "scores" else NAMES
    model = built(save(tmp_path, None, problem_type="regression"), kind, *names)
    assert model.config.problem_type == problem and model.config.num_labels == max(1, len(names))
    assert model.config.id2label == (dict(enumerate(names)) or {0: "LABEL_0"})
    saved = json.loads(model.config.to_json_string())
    assert saved["problem_type"] == problem


@pytest.mark.parametrize("names", [(), NAMES], ids=["scores", "labels"])
def test_other_labels_than_the_heads_are_refused_unless_a_new_one_is_asked_for(
    tmp_path: Path, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, kind = save(tmp_path, ("good", "bad", "ugly")), "labels" if names else "scores"
    with pytest.raises(ConfigError) as caught:
        built(folder, kind, *names)
    text = str(caught.value)
    assert "good, bad, ugly" in text and "set model.new_head: true" in text
    assert not names or "only in the data: great; only in the model: ugly" in text
    model = built(folder, kind, *names, new_head=True)
    stored = hf.BertForSequenceClassification.from_pretrained(folder)
    assert torch.equal(model.bert.pooler.dense.weight, stored.bert.pooler.dense.weight), "the body is kept"
    assert model.classifier.weight.shape == (max(1, len(names)), 16)
    assert model.config.id2label == (dict(enumerate(names)) or {0: "LABEL_0"})
    assert "made anew" in capsys.readouterr().out


def test_a_new_head_that_is_asked_for_is_new_with_the_same_labels_too(tmp_path: Path) -> None:
    folder = save(tmp_path, NAMES)
    stored = hf.BertForSequenceClassification.from_pretrained(folder).classifier.weight
    assert torch.equal(built(folder, "labels", *NAMES).classifier.weight, stored)
    assert not torch.equal(built(folder, "labels", *NAMES, new_head=True).classifier.weight, stored)
    assert built(folder, "labels", *reversed(NAMES), new_head=True).config.id2label[0] == "great"


def test_heads_of_one_output_and_of_as_many_nameless_ones_are_kept(tmp_path: Path) -> None:
    for names, kind, labels in ((("LABEL_0",), "scores", ()), (("LABEL_0", "LABEL_1", "LABEL_2"), "sets", NAMES)):
        folder = save(tmp_path / kind, names)
        stored = hf.BertForSequenceClassification.from_pretrained(folder).classifier.weight
        assert torch.equal(built(folder, kind, *labels).classifier.weight, stored)


def test_checkpoints_of_runs_that_named_no_problem_still_belong_to_their_model(tmp_path: Path) -> None:
    model = built(save(tmp_path, NAMES), "labels", *NAMES)
    digest = model_digest(model)
    model.config.problem_type = None
    assert model_digest(model) == digest
    model.config.problem_type = "multi_label_classification"
    assert model_digest(model) != digest


def test_kinds_differ_in_their_problem_alone_for_the_model() -> None:
    assert {kind.problem for kind in KINDS.values()} == {
        "single_label_classification", "multi_label_classification", "regression",
    }  # fmt: skip
    for kind in KINDS.values():
        assert kind.padded is not None and not kind.padded.packs and kind.padded.problem == kind.problem
        assert replace(kind, padded=None).name == TASK.name


@pytest.mark.parametrize("name", ["question_answering", "masked_lm"])
def test_a_new_head_is_made_for_tasks_without_labels_too(tmp_path: Path, name: str) -> None:
    torch.manual_seed(4)
    config = hf.BertConfig(
        vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    kind = {"question_answering": hf.BertForQuestionAnswering, "masked_lm": hf.BertForMaskedLM}[name]
    kind(config).save_pretrained(tmp_path)
    stored = dict(kind.from_pretrained(tmp_path).named_parameters())
    section = ModelSection(path=str(tmp_path), activation_checkpointing=False, new_head=True)
    model = fill(*build_model(section, TASKS[name], facts(), 3))
    other = {name for name, weight in model.named_parameters() if not torch.equal(weight, stored[name])}
    expected = {"question_answering": "qa_outputs.weight", "masked_lm": "cls.predictions.transform.dense.weight"}
    assert other == {expected[name]}, "biases start at 0, and the body is kept"


@pytest.mark.parametrize("section", [{"new_head": True}, {"train": "head"}], ids=["new_head", "train"])
def test_a_head_that_cannot_be_told_from_the_body_is_refused(tmp_path: Path, section: dict[str, Any]) -> None:
    """T5 with a head for answers has encoder and decoder beside it, and no body around them."""
    config = hf.T5Config(
        vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    hf.T5ForQuestionAnswering(config).save_pretrained(tmp_path)
    values = ModelSection(path=str(tmp_path), activation_checkpointing=False, **section)
    task = fitting_task(values, TASKS["question_answering"], facts(), True)
    with pytest.raises(ConfigError, match="T5ForQuestionAnswering does not keep its body apart from its head"):
        build_model(values, task, facts(), 3)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_the_form_of_batches_does_not_follow_from_a_head_that_is_replaced(tmp_path: Path, num_labels: int) -> None:
    """The loss of one label is always 0, with which documents that see each other would not be found."""
    config = hf.FNetConfig(
        vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_labels=num_labels
    )
    hf.FNetForSequenceClassification(config).save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path), activation_checkpointing=False, new_head=True)
    task = fitting_task(section, KINDS["labels"], facts(*NAMES), True)
    assert not task.packs and "documents in one row see each other" in task.why_padded
    build_model(section, task, facts(*NAMES), 3)


def test_a_family_without_a_head_for_the_task_is_refused_in_a_line(tmp_path: Path) -> None:
    config = hf.EsmConfig(
        vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=1, mask_token_id=3,
    )  # fmt: skip
    hf.EsmModel(config).save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path), activation_checkpointing=False)
    task = fitting_task(section, TASKS["question_answering"], facts(), True)
    with pytest.raises(DataError) as caught:
        build_model(section, task, facts(), 3)
    reason = (
        "transformers has no AutoModelForQuestionAnswering of this type: give a model of another type, or another task"
    )
    assert str(caught.value) == f"model: {tmp_path}: {reason}"
