"""Labels, sets of labels and scores are trained on two real ranks, evaluated and exported: all as a plain loop with
transformers' own losses computes it, in fp32."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from data_fixtures import bert_vocabulary, byte_level_folder, sentences, write_jsonl
from ranks import run_ranks
from repository import WORKERS
from scipy import stats
from sklearn import metrics as oracle
from training_runs import metrics

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from data_prep.token_store import TokenStore, open_rows
from data_prep.tokenizer.open import open_tokenizer
from engine.config import RunConfig
from engine.model.build import decay_groups
from engine.row_stream import stream_rows
from engine.run_file import dump_yaml, load_run_file
from launcher.commands.export import export_run

pytestmark = pytest.mark.ranks
STEPS, GLOBAL_ROWS, SEED, RATE, SMOOTHING = 6, 7, 3, 2e-3, 0.1
NAMES = ("short", "middle", "long")
#: The order of the model's own labels where it has some, and one that no record has.
MODEL_NAMES = ("long", "unused", "short", "middle")


def labelled(count: int, seed: int) -> list[dict[str, Any]]:
    return [
        {"text": text, "label": NAMES[min(2, len(text) // 20)]} for text in sentences(count, seed=seed, longest_words=9)
    ]


def with_sets(count: int, seed: int) -> list[dict[str, Any]]:
    texts = sentences(count, seed=seed, longest_words=9)
    return [
        {"text": text, "labels": [name for place, name in enumerate(NAMES) if len(text) % (place + 2) == 0]}
        for text in texts
    ]


def scored(count: int, seed: int) -> list[dict[str, Any]]:
    texts = sentences(2 * count, seed=seed, longest_words=7)
    return [
        {"sentence1": one, "sentence2": other, "score": round(abs(len(one) - len(other)) / 10, 1)}
        for one, other in zip(texts[::2], texts[1::2], strict=True)
    ]


@dataclass(frozen=True)
class Kind:
    """Records, the family of the model, and what differs in the run file."""

    records: Callable[[int, int], list[dict[str, Any]]]
    family: str
    problem: str
    sections: dict[str, Any]


KINDS = {
    "labels": Kind(
        labelled, "bert", "single_label_classification",
        {"loss": {"label_smoothing": SMOOTHING, "class_weights": "balanced"}, "evaluation": {"out_of_scope_label": "long"}},
    ),
    "sets": Kind(with_sets, "bert", "multi_label_classification", {}),
    "scores": Kind(scored, "llama", "regression", {}),
}  # fmt: skip


@dataclass(frozen=True)
class Classifier:
    """A finished run, and the same training by a plain loop: its losses before each step, and its model."""

    kind: Kind
    run_dir: Path
    stores: dict[str, TokenStore]
    losses: list[float]
    model: Any


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Classifier]:
    """All kinds, trained in one start of two ranks."""
    top = tmp_path_factory.mktemp("classifiers")
    paths, stores = {}, {}
    for name, kind in KINDS.items():
        folder = top / name
        folder.mkdir()
        bert = kind.family == "bert"
        tokenizer = bert_vocabulary(folder / "vocab.txt") if bert else byte_level_folder(folder / "tokenizer")
        paths[name] = run_file(folder, tokenizer, kind)
        stores[name] = prepared(paths[name])
        vocab_size = open_tokenizer(str(tokenizer)).vocab_size
        make_model(kind, vocab_size, stores[name]["train"]).save_pretrained(folder / "model")
    run_ranks(2, WORKERS / "runs_worker.py", *map(str, paths.values()))
    return {
        name: Classifier(
            kind, top / name / "run", stores[name], *plain_training(top / name / "model", stores[name]["train"], kind)
        )
        for name, kind in KINDS.items()
    }


@pytest.fixture(params=KINDS)
def classifier(request: pytest.FixtureRequest, classifiers: dict[str, Classifier]) -> Classifier:
    return classifiers[request.param]


def run_file(folder: Path, tokenizer: Path, kind: Kind) -> Path:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "stage3_param_persistence_threshold": 100}
    (folder / "ds.json").write_text(json.dumps({"bf16": {"enabled": False}, "zero_optimization": zero}))
    values = {
        "run_dir": str(folder / "run"), "task": "sequence_classification", "seed": SEED,
        "data": {
            "store_dir": str(folder / "stores"), "tokenizer": str(tokenizer), "row_tokens": 128, "workers": 1,
            "train": str(write_jsonl(folder / "train.jsonl", kind.records(40, 1))),
            "validation": str(write_jsonl(folder / "validation.jsonl", kind.records(25, 2))),
        },
        "model": {"path": str(folder / "model"), "activation_checkpointing": False},
        "optimizer": {"learning_rate": RATE, "weight_decay": 0.1, "gradient_clipping": 0.0, "schedule": "constant"},
        "batch": {"global_rows": GLOBAL_ROWS, "micro_rows": 2},
        "duration": {"steps": STEPS},
        "deepspeed": str(folder / "ds.json"),
        "export": {"at_end": True, "dtype": "float32"},
        **kind.sections,
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(dump_yaml(values))
    return path


def prepared(path: Path) -> dict[str, TokenStore]:
    run_file = load_run_file(path)
    data = run_file.values["data"]
    folders = prepare(DataConfig.model_validate(data), data, run_file.parse(RunConfig).task, progress=False)
    return {split: TokenStore.open(folder) for split, folder in folders.items()}


def make_model(kind: Kind, vocab_size: int, store: TokenStore) -> Any:
    names = dict(enumerate(MODEL_NAMES if kind.problem.startswith("multi") else store.label_names or ("LABEL_0",)))
    common: dict[str, Any] = {
        "vocab_size": vocab_size, "pad_token_id": store.pad_id, "bos_token_id": store.bos_id,
        "eos_token_id": store.eos_id, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "id2label": names, "label2id": {name: number for number, name in names.items()},
    }  # fmt: skip
    config = (
        transformers.BertConfig(**common, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        if kind.family == "bert"
        else transformers.LlamaConfig(**common)
    )
    torch.manual_seed(5)
    return transformers.AutoModelForSequenceClassification.from_config(config)


def inputs_of(store: TokenStore, documents: list[int], model: Any) -> dict[str, torch.Tensor]:
    """Documents as a padded batch of transformers, with the second text of a pair told apart where BERT is."""
    ids = [torch.from_numpy(store.tokens(document).astype(np.int64)) for document in documents]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(one) for one in ids], batch_first=True)
    return {"input_ids": pad(ids, batch_first=True, padding_value=model.config.pad_token_id), "attention_mask": mask}


def targets_of(store: TokenStore, documents: list[int], model: Any) -> torch.Tensor:
    """What is learned of documents as transformers' losses want it, in the model's numbers."""
    if "scores" in store.columns:
        return torch.from_numpy(store.column("scores")[documents])
    if "labels" in store.columns:
        return torch.from_numpy(store.column("labels")[documents]).long()
    targets = torch.zeros(len(documents), model.config.num_labels)
    for place, document in enumerate(documents):
        for number in store.ragged("label_sets", document).tolist():
            targets[place, model.config.label2id[store.label_names[number]]] = 1.0
    return targets


def loss_of(
    model: Any, store: TokenStore, documents: list[int], kind: Kind, weights: torch.Tensor | None
) -> torch.Tensor:
    """transformers' own loss of a batch; with `weights` the smoothed cross-entropy of torch, over the documents."""
    targets = targets_of(store, documents, model)
    if weights is None:
        model.config.problem_type = kind.problem
        loss: torch.Tensor = model(**inputs_of(store, documents, model), labels=targets).loss
        return loss
    logits = model(**inputs_of(store, documents, model)).logits
    total = F.cross_entropy(logits, targets, weights, label_smoothing=SMOOTHING, reduction="sum")
    return total / len(documents)


def plain_training(folder: Path, store: TokenStore, kind: Kind) -> tuple[list[float], Any]:
    """The same steps with torch and transformers alone: a whole step at once, torch's AdamW."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=RATE)
    rows, losses = open_rows(store, 128), []
    weights = None
    if "loss" in kind.sections:
        counts = np.bincount(store.column("labels"))
        weights = torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32)
    for step in range(STEPS):
        used = stream_rows(step * GLOBAL_ROWS, GLOBAL_ROWS, rows.sources, SEED)
        loss = loss_of(model, store, [int(rows.segments(int(row))[0][0]) for row in used], kind, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.eval()


def test_losses_are_those_of_a_plain_loop(classifier: Classifier) -> None:
    ours = metrics(classifier.run_dir)
    assert [ours[step]["loss"] for step in range(1, STEPS + 1)] == pytest.approx(classifier.losses, rel=1e-4)
    assert classifier.losses[-1] < classifier.losses[0]


def test_figures_are_those_of_the_plain_model(classifier: Classifier) -> None:
    figures = metrics(classifier.run_dir, "evaluation")[STEPS]
    store, model = classifier.stores["validation"], classifier.model
    documents = list(range(store.num_documents))
    truth = targets_of(store, documents, model)
    with torch.no_grad():
        logits = model(**inputs_of(store, documents, model)).logits
        model.config.problem_type = classifier.kind.problem
        loss = loss_of(model, store, documents, classifier.kind, None)
    assert figures["targets"] == store.num_targets == store.num_documents
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-4), "without weights and smoothing"
    expected: dict[str, float]
    if classifier.kind.problem == "regression":
        guessed = logits[:, 0].numpy()
        expected = {
            "pearson": stats.pearsonr(truth, guessed)[0], "spearman": stats.spearmanr(truth, guessed)[0],
            "mse": oracle.mean_squared_error(truth, guessed),
        }  # fmt: skip
    elif classifier.kind.problem.startswith("multi"):
        chosen = (logits.sigmoid() >= 0.5).int()
        own = [model.config.label2id[name] for name in store.label_names]
        expected = {
            "micro_f1": oracle.f1_score(truth, chosen, average="micro"),
            "macro_f1": oracle.f1_score(truth, chosen, average="macro", labels=own, zero_division=0),
            "exact_match": oracle.accuracy_score(truth, chosen),
        }
    else:
        chosen, scope = logits.argmax(-1), list(store.label_names).index("long")
        expected = {
            "accuracy": oracle.accuracy_score(truth, chosen),
            "weighted_f1": oracle.f1_score(truth, chosen, average="weighted", zero_division=0),
            "matthews": oracle.matthews_corrcoef(truth, chosen),
            "out_of_scope_recall": oracle.recall_score(truth == scope, chosen == scope, zero_division=0),
            "in_scope_accuracy": oracle.accuracy_score(truth[truth != scope], chosen[truth != scope]),
        }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_the_exported_classifier_opens_and_computes_the_same(classifier: Classifier, tmp_path: Path) -> None:
    """What training wrote at its end, what `fulltune export` makes of the checkpoint, and the plain model."""
    export_run(classifier.run_dir, tmp_path / "export", None, False, "float32", 5 * 10**9)
    live, offline = (
        transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        for folder in (classifier.run_dir / "export", tmp_path / "export")
    )
    assert live.config.problem_type == offline.config.problem_type == classifier.kind.problem
    assert live.config.id2label == classifier.model.config.id2label
    documents = list(range(5))
    with torch.no_grad():
        inputs = inputs_of(classifier.stores["validation"], documents, live)
        logits = live(**inputs).logits
        assert torch.equal(logits, offline(**inputs).logits)
        torch.testing.assert_close(logits, classifier.model(**inputs).logits, rtol=1e-3, atol=1e-3)


def test_transformers_pipeline_serves_the_export(classifier: Classifier) -> None:
    """By what config.json says: one distribution over labels, a probability for each label, or the score as it is."""
    store, folder = classifier.stores["validation"], classifier.run_dir / "export"
    served = transformers.pipeline("text-classification", model=str(folder), device="cpu", top_k=None)
    record = classifier.kind.records(25, 2)[0]
    given = {"text": record["sentence1"], "text_pair": record["sentence2"]} if "score" in record else record["text"]
    answers = served([given])
    found = {one["label"]: one["score"] for one in (answers[0] if isinstance(answers[0], list) else answers)}
    with torch.no_grad():
        logits = served.model(**inputs_of(store, [0], served.model)).logits[0]
    expected = {
        "single_label_classification": logits.softmax(-1), "multi_label_classification": logits.sigmoid(),
        "regression": logits,
    }[classifier.kind.problem]  # fmt: skip
    names = served.model.config.id2label
    assert found == pytest.approx({names[n]: value for n, value in enumerate(expected.tolist())}, rel=1e-4)


def test_people_get_a_table_by_label(classifier: Classifier) -> None:
    table, board = classifier.run_dir / "evaluation.txt", list((classifier.run_dir / "tensorboard").iterdir())
    assert board
    if classifier.kind.problem == "regression":
        assert not table.exists()
    else:
        text = table.read_text()
        assert text.startswith(f"evaluation after step {STEPS}\n") and all(f"\n{name}" in text for name in NAMES)
