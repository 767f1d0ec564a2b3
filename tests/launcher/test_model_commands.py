"""`fulltune eval` and `fulltune predict` with model folders: what they answer, what they refuse, what they leave behind."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from data_fixtures import bert_vocabulary, byte_level_folder, sentences, write_jsonl
from repository import ROOT
from sklearn.metrics import accuracy_score, f1_score

from data_prep.tokenizer.open import open_tokenizer
from engine.tasks import TASKS
from launcher.cli import main

NAMES = ("positive", "neutral", "negative")
TEXTS = sentences(7, seed=3, longest_words=9)


def model_folder(folder: Path, kind: str, **more: Any) -> Path:
    """A small BERT of a class, with a tokenizer of words; its weights are large enough for answers that differ."""
    tokenizer = open_tokenizer(str(bert_vocabulary(folder.parent / "vocab.txt")))
    tokenizer.save(folder, None)
    torch.manual_seed(5)
    names = dict(enumerate(NAMES))
    config = hf.BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=1.0, id2label=names,
        label2id={name: number for number, name in names.items()}, **more,
    )  # fmt: skip
    getattr(hf, kind)(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("labels") / "model", "BertForSequenceClassification")


def objects(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_task_says_which_classes_are_its_own() -> None:
    assert all(task.heads for task in TASKS.values())


def test_labels_and_probabilities_are_those_of_the_pipeline(
    classifier: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the order of the input, whatever stands between; a record that cannot be used has an error in its place."""
    records: list[dict[str, Any]] = [{"sentence": text} for text in TEXTS]
    records[1]["id"] = "second"
    records[2]["label"] = "no label of the model"
    records.insert(3, {"sentence": ""})
    records.insert(5, {"sentence": "river " * 90})
    source, out = write_jsonl(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    command = ["predict", str(classifier), "--in", str(source), "--out", str(out), "--micro-rows", "2"]
    assert main(command) == 65
    said = capfd.readouterr().err
    assert f"{source}:4: " in said and f"{source}:6: 92 tokens do not fit a row of 64" in said
    assert "2 of 9 records cannot be used: mend them, or give --skip-unusable" in said
    assert list(tmp_path.iterdir()) == [source], "nothing half-written"
    assert main([*command, "--skip-unusable"]) == 0
    found = objects(out)
    assert [one["id"] for one in found] == ["second" if at == 2 else f"{source}:{at}" for at in range(1, 10)]
    assert [set(one) for one in (found.pop(5), found.pop(3))] == [{"id", "error"}] * 2
    expected = hf.pipeline("text-classification", model=str(classifier), top_k=None)(TEXTS)
    for one, theirs in zip(found, expected, strict=True):
        assert one["label"] == theirs[0]["label"]
        assert one["probabilities"] == pytest.approx({each["label"]: each["score"] for each in theirs}, abs=1e-5)
    assert len({one["label"] for one in found}) > 1


@pytest.mark.usefixtures("work_here")
def test_tags_stand_beside_their_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each word has the tag of its first piece, as the stock class gives it; to standard output nothing else goes."""
    folder = model_folder(tmp_path / "model", "BertForTokenClassification")
    words = [text.split() for text in TEXTS]
    source = write_jsonl(tmp_path / "in.jsonl", [{"tokens": some} for some in words])
    assert main(["predict", str(folder), "--in", str(source), "--out", "-"]) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    tokenizer, model = hf.BertTokenizerFast(str(tmp_path / "vocab.txt")), hf.AutoModelForTokenClassification
    model = model.from_pretrained(folder).eval()
    for one, some in zip(found, words, strict=True):
        inputs = tokenizer(some, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            best = model(**inputs).logits[0].argmax(-1).tolist()
        places = inputs.word_ids()
        expected = [NAMES[best[places.index(number)]] for number in range(len(some))]
        assert (one["words"], one["tags"]) == (some, expected)
    assert len({tag for one in found for tag in one["tags"]}) > 1


@pytest.mark.usefixtures("work_here")
def test_figures_are_those_of_the_stock_model(
    classifier: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Records in a table with names of its own, whose labels are the numbers of the model's."""
    truth = [number % 3 for number in range(len(TEXTS))]
    source = tmp_path / "in.csv"
    source.write_text("said;is\n" + "".join(f"{text};{one}\n" for text, one in zip(TEXTS, truth, strict=True)))
    reading = f'{{path: {source}, delimiter: ";", fields: {{text: said, label: is}}}}'
    assert main(["eval", str(classifier), "--data", reading, "--json", "data.row_tokens=48"]) == 0
    figures = json.loads(capfd.readouterr().out)
    scores = hf.pipeline("text-classification", model=str(classifier), top_k=None)(TEXTS)
    chances = [[{one["label"]: one["score"] for one in each}[name] for name in NAMES] for each in scores]
    guessed = [max(range(3), key=each.__getitem__) for each in chances]
    assert figures["targets"] == len(TEXTS)
    assert figures["accuracy"] == accuracy_score(truth, guessed)
    assert figures["macro_f1"] == pytest.approx(f1_score(truth, guessed, average="macro", labels=range(3)))
    losses = [-math.log(each[one]) for one, each in zip(truth, chances, strict=True)]
    assert figures["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_labels_that_the_model_has_not_are_an_error_or_count_as_wrong(
    classifier: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    records = [{"text": text, "label": "mixed" if number == 1 else NAMES[0]} for number, text in enumerate(TEXTS)]
    source = write_jsonl(tmp_path / "in.jsonl", records)
    assert main(["eval", str(classifier), "--data", str(source)]) == 65
    said = capfd.readouterr()
    assert f"{source}:2: label 'mixed' is not one of positive, neutral, negative" in said.err and not said.out
    assert main(["eval", str(classifier), "--data", str(source), "data.unknown_labels=count_wrong"]) == 0
    said = capfd.readouterr()
    shown = dict(re.findall(r"^(\w+) +(\S+)$", said.out, re.MULTILINE))
    assert re.search(r"^positive( +[01]\.\d{4}){3} +6$", said.out, re.MULTILINE), "a line for each label"
    assert float(shown["accuracy"]) <= 6 / 7 and shown["targets"] == "6"


@pytest.mark.usefixtures("work_here")
def test_the_commands_of_the_page_run(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """docs/predict.md: its records, and the first command of each section."""
    page = (ROOT / "docs" / "predict.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    held, new = (body for kind, body in blocks if kind == "json")
    commands = [line for kind, body in blocks if not kind for line in body.splitlines()]
    monkeypatch.chdir(tmp_path)
    Path("held.jsonl").write_text(held, encoding="utf-8")
    Path("new.jsonl").write_text(new, encoding="utf-8")
    Path("model").symlink_to(classifier)
    Path("answers.jsonl").symlink_to("elsewhere.jsonl")
    for name in ("eval", "predict"):
        assert main(shlex.split(next(line for line in commands if line.startswith(f"fulltune {name} ")))[1:]) == 0
    assert re.search(r"^accuracy +[01](\.5)?$", capfd.readouterr().out, re.MULTILINE)
    assert [one["id"] for one in objects(Path("answers.jsonl"))] == ["a", "new.jsonl:2"]
    assert Path("answers.jsonl").is_symlink() and Path("elsewhere.jsonl").is_file(), "a link stays one"


def test_models_and_options_that_cannot_be_meant(
    classifier: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = str(write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS]))
    out = ["--in", source, "--out", str(tmp_path / "out.jsonl")]
    generator = byte_level_folder(tmp_path / "generator")
    (generator / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    body = model_folder(tmp_path / "body", "BertModel")
    like = tmp_path / "like.yaml"
    like.write_text("data:\n  row_token: 3\n")
    for command, code, words in (
        (["predict", str(generator), *out], 78, "`fulltune generate` continues prompts"),
        (["predict", str(body), *out], 78, "BertModel, a class of no task here: give --task"),
        (["predict", str(body), *out, "--task", "sequence_classification"], 65, "no trained weights for task"),
        (["predict", str(tmp_path), *out], 66, "neither a model folder"),
        (["predict", str(classifier), *out, "--best"], 78, "this is no run"),
        (["predict", str(classifier), *out, "batch.global_rows=3"], 78, "only keys of data and evaluation count here"),
        (["predict", str(classifier), *out, "data.row_token=3"], 78, "data.row_tokens"),
        (["eval", str(classifier)], 78, "give --data FILE"),
        (["predict", str(classifier), "--in", source, "--out", str(tmp_path / "no" / "out.jsonl")], 73, "cannot write"),
        (
            ["predict", str(classifier), "--in", source, "--out", str(tmp_path)],
            73,
            "cannot write: a folder; name a file",
        ),
        (
            ["predict", str(classifier), "--in", "{path: x, form: csv}", *out[2:]],
            78,
            "form: Extra inputs are not permitted",
        ),
        (["predict", str(classifier), *out, "--like", str(like)], 78, "like.yaml:2: unknown key `data.row_token`"),
    ):
        assert main(command) == code
        assert words in capfd.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_what_is_no_file_is_written_and_not_replaced(classifier: Path, tmp_path: Path) -> None:
    source, pipe = write_jsonl(tmp_path / "in.jsonl", [{"text": ""}]), tmp_path / "pipe"
    os.mkfifo(pipe)
    came: list[str] = []
    reader = threading.Thread(target=lambda: came.append(pipe.read_text()), daemon=True)
    reader.start()
    assert main(["predict", str(classifier), "--in", str(source), "--out", str(pipe), "--skip-unusable"]) == 0
    reader.join(10)
    assert pipe.is_fifo() and "the text is empty" in json.loads(came[0])["error"]


def test_a_stopped_command_leaves_nothing_behind(classifier: Path, tmp_path: Path) -> None:
    """It waits for the reader of a pipe when it is stopped, with its own folder at hand."""
    source, pipe, own = write_jsonl(tmp_path / "in.jsonl", [{"text": ""}]), tmp_path / "pipe", tmp_path / "own"
    own.mkdir()
    os.mkfifo(pipe)
    command = [
        sys.executable,
        "-m",
        "launcher.cli",
        "predict",
        str(classifier),
        "--in",
        str(source),
        "--out",
        str(pipe),
    ]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(own)}, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not any(own.iterdir()):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
    assert not any(own.iterdir())
