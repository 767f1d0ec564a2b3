"""A tagger is trained on two real ranks, evaluated and exported: all as a plain loop of transformers computes it, in fp32."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from data_fixtures import WORDS, bert_vocabulary, byte_level_folder, write_jsonl
from ranks import run_ranks
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
STEPS, GLOBAL_ROWS, SEED, RATE = 6, 7, 3, 2e-3
TAGS = ("O", "B-word", "I-word")


def sentences(count: int, seed: int) -> list[dict[str, Any]]:
    """Words and tags; a tag follows from the word, so that there is something to learn."""
    draw = np.random.default_rng(seed)
    made = [draw.choice(WORDS, draw.integers(1, 12)).tolist() for _ in range(count)]
    return [{"tokens": words, "tags": [TAGS[len(word) % 3] for word in words]} for words in made]


@dataclass(frozen=True)
class Tagger:
    """A finished run, and the same training by a plain loop: its losses before each step, and its model."""

    run_dir: Path
    stores: dict[str, TokenStore]
    losses: list[float]
    model: Any


@pytest.fixture(scope="module", params=["bert", "llama"])
def tagger(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tagger:
    folder = tmp_path_factory.mktemp(request.param)
    # The second tokenizer puts nothing before a sentence: its first token is a target.
    encoder = request.param == "bert"
    tokenizer = bert_vocabulary(folder / "vocab.txt") if encoder else byte_level_folder(folder / "tokenizer")
    path = run_file(folder, tokenizer)
    stores = prepared(path)
    make_model(request.param, open_tokenizer(str(tokenizer)).vocab_size, stores["train"]).save_pretrained(
        folder / "model"
    )
    run_ranks(2, "-m", "engine", str(path))
    losses, model = plain_training(folder / "model", stores["train"])
    return Tagger(folder / "run", stores, losses, model)


def run_file(folder: Path, tokenizer: Path) -> Path:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "stage3_param_persistence_threshold": 100}
    (folder / "ds.json").write_text(json.dumps({"bf16": {"enabled": False}, "zero_optimization": zero}))
    values = {
        "run_dir": str(folder / "run"), "task": "token_classification", "seed": SEED,
        "data": {
            "store_dir": str(folder / "stores"), "tokenizer": str(tokenizer), "row_tokens": 64, "workers": 1,
            "overlong": "truncate",
            "train": str(write_jsonl(folder / "train.jsonl", sentences(40, 1))),
            "validation": str(write_jsonl(folder / "validation.jsonl", sentences(15, 2))),
        },
        "model": {"path": str(folder / "model"), "activation_checkpointing": False},
        "optimizer": {"learning_rate": RATE, "weight_decay": 0.1, "gradient_clipping": 0.0, "schedule": "constant"},
        "batch": {"global_rows": GLOBAL_ROWS, "micro_rows": 2},
        "duration": {"steps": STEPS},
        "deepspeed": str(folder / "ds.json"),
        "export": {"at_end": True, "dtype": "float32"},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(dump_yaml(values))
    return path


def prepared(path: Path) -> dict[str, TokenStore]:
    run_file = load_run_file(path)
    data = run_file.values["data"]
    folders = prepare(DataConfig.model_validate(data), data, run_file.parse(RunConfig).task, progress=False)
    return {split: TokenStore.open(folder) for split, folder in folders.items()}


def make_model(kind: str, vocab_size: int, store: TokenStore) -> Any:
    names = dict(enumerate(store.label_names))
    common: dict[str, Any] = {
        "vocab_size": vocab_size, "pad_token_id": store.pad_id, "bos_token_id": store.bos_id,
        "eos_token_id": store.eos_id, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "id2label": names, "label2id": {name: number for number, name in names.items()},
        "classifier_dropout": 0.0,
    }  # fmt: skip
    config = (
        transformers.BertConfig(**common, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        if kind == "bert"
        else transformers.LlamaConfig(**common)
    )
    torch.manual_seed(5)
    return transformers.AutoModelForTokenClassification.from_config(config)


def example(store: TokenStore, document: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and tags (T,) of a sentence; -1 where there is no tag."""
    ids, tags = store.tokens(document), store.token_column("tags", document)
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(tags.astype(np.int64))


def plain_training(folder: Path, store: TokenStore) -> tuple[list[float], Any]:
    """The same steps with torch and transformers alone: a sentence at a time, mean over the step's tags, torch's AdamW."""
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=RATE)
    rows, losses = open_rows(store, 64), []
    for step in range(STEPS):
        used = stream_rows(step * GLOBAL_ROWS, GLOBAL_ROWS, rows.sources, SEED)
        examples = [example(store, int(rows.segments(int(row))[0][0])) for row in used]
        total = sum(
            F.cross_entropy(model(ids[None]).logits[0], tags, ignore_index=-1, reduction="sum")
            for ids, tags in examples
        )
        loss = total / sum(int((tags >= 0).sum()) for _, tags in examples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.eval()


def test_losses_are_those_of_a_plain_loop(tagger: Tagger) -> None:
    ours = metrics(tagger.run_dir)
    assert [ours[step]["loss"] for step in range(1, STEPS + 1)] == pytest.approx(tagger.losses, rel=1e-4)
    assert tagger.losses[-1] < tagger.losses[0]
    rows = open_rows(tagger.stores["train"], 64)
    assert rows.row_targets.sum() == tagger.stores["train"].num_targets


def test_figures_are_those_of_the_plain_model(tagger: Tagger) -> None:
    figures = metrics(tagger.run_dir, "evaluation")[STEPS]
    store = tagger.stores["validation"]
    truth, predicted, loss = [], [], 0.0
    for document in range(store.num_documents):
        ids, tags = example(store, document)
        with torch.no_grad():
            logits = tagger.model(ids[None]).logits[0][tags >= 0]
        loss += F.cross_entropy(logits, tags[tags >= 0], reduction="sum").item()
        truth += tags[tags >= 0].tolist()
        predicted += logits.argmax(-1).tolist()
    assert figures["targets"] == len(truth) == store.num_targets
    assert figures["loss"] == pytest.approx(loss / len(truth), rel=1e-4)
    pairs = list(zip(truth, predicted, strict=True))
    assert figures["accuracy"] == pytest.approx(sum(one == other for one, other in pairs) / len(pairs))
    scores = []
    for label in sorted({*truth, *predicted}):
        hits = pairs.count((label, label))
        wrong = sum((label in pair) and pair != (label, label) for pair in pairs)
        scores.append(2 * hits / (2 * hits + wrong) if hits else 0.0)
    assert figures["macro_f1"] == pytest.approx(sum(scores) / len(scores))


def test_the_exported_tagger_opens_and_computes_the_same(tagger: Tagger, tmp_path: Path) -> None:
    """What training wrote at its end, what `fulltune export` makes of the checkpoint, and the plain model."""
    export_run(tagger.run_dir, tmp_path / "export", None, False, "float32", 5 * 10**9)
    live, offline = (
        transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
        for folder in (tagger.run_dir / "export", tmp_path / "export")
    )
    assert live.config.id2label == dict(enumerate(tagger.stores["train"].label_names))
    assert "pipeline_tag: token-classification" in (tmp_path / "export" / "README.md").read_text()
    for document in range(5):
        ids, _ = example(tagger.stores["validation"], document)
        with torch.no_grad():
            logits = live(ids[None]).logits
            assert torch.equal(logits, offline(ids[None]).logits)
            torch.testing.assert_close(logits, tagger.model(ids[None]).logits, rtol=1e-3, atol=1e-3)
