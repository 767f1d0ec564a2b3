"""Real sentences without padding: the same losses as with it, of a BERT with random weights."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from data_fixtures import SAMPLES, prepared, section

from engine.model.attention import PACKED_ATTENTION, register_packed_attention
from engine.model.isolation import fit_to_rows
from engine.row_stream import stream_rows
from engine.tasks import TASKS
from engine.tasks.task import STILL, LossOptions

SOURCES: dict[str, dict[str, Any]] = {
    "sst2": {"path": "classification/sst2/dev.tsv", "columns": ["text", "label"], "quoting": False},
    "clinc150": {"path": "classification/clinc150/data_small.json", "split": "val", "columns": ["text", "label"]},
}
STEP_ROWS, STEPS = 32, 6


@pytest.mark.skipif(not (SAMPLES / "classification").is_dir(), reason="no sample data here")
@pytest.mark.parametrize("name", SOURCES)
def test_a_third_of_the_positions_were_padding_and_the_losses_stay(name: str, tmp_path: Path) -> None:
    source = SOURCES[name] | {"path": str(SAMPLES / SOURCES[name]["path"])}
    values = section(tmp_path, SAMPLES / "tokenizers" / "bert_uncased_en", [source], row_tokens=128)
    store, index = prepared(values, "sequence_classification")
    config = hf.BertConfig(
        vocab_size=store.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_labels=len(store.label_names), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    flat = TASKS["sequence_classification"]
    assert flat.padded is not None and fit_to_rows(config, flat, flat.padded) is flat
    register_packed_attention()
    torch.manual_seed(5)
    model = flat.auto_class(config).from_config(deepcopy(config), attn_implementation=PACKED_ATTENTION)
    stock = flat.auto_class(config).from_config(deepcopy(config), attn_implementation="sdpa")
    stock.load_state_dict(model.state_dict())
    tokens, positions = [0, 0], [0, 0]
    for step in range(STEPS):
        rows = stream_rows(step * STEP_ROWS, STEP_ROWS, index.sources, 3)
        means = []
        for number, (form, own) in enumerate(((flat, model), (flat.padded, stock))):
            batch = form.batch(store, index, rows, 0, STILL)
            tokens[number] += batch.num_tokens
            positions[number] += batch.input_ids.numel()
            with torch.no_grad():
                means.append(form.loss(own, batch, LossOptions()).loss_sum.item() / STEP_ROWS)
        assert means[0] == pytest.approx(means[1], abs=1e-5)
    assert tokens[0] == tokens[1] == positions[0], "nothing but tokens"
    assert 0.3 < 1 - tokens[1] / positions[1] < 0.6
