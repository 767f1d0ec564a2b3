"""Guards of a step and seeded dropout, on two real ranks."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from data_fixtures import byte_level_folder, prepared, section, sentences, write_jsonl
from ranks import run_ranks
from repository import WORKERS

from data_prep.tokenizer.extend import extend_tokenizer
from data_prep.tokenizer.open import open_tokenizer
from engine.export.from_checkpoint import export_checkpoint

GOLDEN = Path(__file__).parent / "golden_losses.json"
pytestmark = pytest.mark.ranks


def extended_store(out_dir: Path) -> None:
    """A tokenizer with new pieces, a token store made with it, and a model of the old vocabulary with rows to spare."""
    base = byte_level_folder(out_dir / "base")
    words = [f"{a}{b}" for a in ("hyper", "meta", "para", "sub") for b in ("gradient", "momentum", "entropy", "logit")]
    texts = [
        f"{text} {words[n % 16]} {words[n % 15]} {words[n % 13]}" for n, text in enumerate(sentences(120, seed=21))
    ]
    extend_tokenizer(str(base), texts, out_dir / "tokenizer", 80)
    records = write_jsonl(out_dir / "records.jsonl", [{"text": text} for text in texts])
    store, _ = prepared(section(out_dir, out_dir / "tokenizer", records))
    (out_dir / "store.txt").write_text(str(store.path))
    torch.manual_seed(7)
    old_rows = open_tokenizer(str(base)).vocab_size + 3
    assert old_rows + 10 < store.vocab_size
    config = transformers.LlamaConfig(
        vocab_size=old_rows, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(out_dir / "model")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out_dir = tmp_path_factory.mktemp("guards")
    extended_store(out_dir)
    run_ranks(2, str(WORKERS / "guards_worker.py"), str(out_dir))
    return json.loads((out_dir / "results.json").read_text()) | {"out_dir": out_dir}


def test_a_bad_loss_on_one_rank_stops_all_before_the_update(results: dict[str, Any]) -> None:
    result = results["bad_loss"]
    assert result["ranks_unchanged"] == 2
    rows = [row for row in result["rows_of_rank_1"] if row >= 0]
    assert rows
    named = ", ".join(f"{row} (from memory.jsonl:{3 * row + 1})" for row in rows)
    assert result["message"] == f"step 1: the loss is not finite; no weight was changed; rows {named}"


def test_a_bad_gradient_on_one_rank_stops_all_before_the_update(results: dict[str, Any]) -> None:
    assert len(results["bad_gradient"]) == 6
    for name, result in results["bad_gradient"].items():
        assert result["ranks_unchanged"] == 2, name
        assert result["message"].startswith("step 1: the gradient is not finite; no weight was changed; rows "), name


def test_a_parameter_without_gradient_is_refused(results: dict[str, Any]) -> None:
    result = results["missing_gradient"]
    assert result["ranks_unchanged"] == 2
    assert result["message"].startswith("step 1: 1 trainable parameters, for example forgotten, received no gradient")
    assert "rows " in result["message"]


def test_a_changed_store_stops_before_the_update(results: dict[str, Any]) -> None:
    result = results["changed_store"]
    assert result == {"message": "memory.npy: changed, replaced or removed while it was in use", "ranks_unchanged": 2}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_losses_and_gradient_norms_are_the_recorded_ones(results: dict[str, Any], family: str) -> None:
    """Recorded once with ``FULLTUNE_WRITE_GOLDEN=1 pytest tests/numerics/test_guards.py``; fp32, so any CPU comes close.

    A change that moves these numbers changes what everybody's training does: say so in its commit.
    """
    if os.environ.get("FULLTUNE_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(results["golden"], indent=1) + "\n")
    recorded = json.loads(GOLDEN.read_text())[family]
    np.testing.assert_allclose(results["golden"][family], recorded, rtol=5e-4)
    losses = [loss for loss, _ in recorded]
    assert losses[-1] < losses[0]


def test_fp32_files_give_exact_fp32_masters(results: dict[str, Any]) -> None:
    assert results["fp32_masters"] == {
        "masters_equal": True, "weights_equal": True, "lossy": True, "rotary_kept": True,
    }  # fmt: skip


def test_every_shipped_configuration_trains_alike(results: dict[str, Any]) -> None:
    losses = results["shipped"]
    assert sorted(losses) == ["zero2", "zero3", "zero3_offload", "zero3_offload_optimizer"]
    for values in losses.values():
        assert values[2] < values[0]
        np.testing.assert_allclose(values, losses["zero3_offload"], rtol=2e-3)


def test_trials_of_micro_batches_change_nothing(results: dict[str, Any]) -> None:
    assert results["trials"] == {"zero3_offload": 2, "zero3_bf16": 2, "zero2_bf16": 2}


def test_dropout_is_a_function_of_the_step(results: dict[str, Any]) -> None:
    same, again, other_step, none = results["dropout"]["losses"]
    assert same == again
    assert len({same, other_step, none}) == 3


def test_rows_of_new_tokens_are_gathered_as_the_means_of_their_pieces(results: dict[str, Any]) -> None:
    """ZeRO-3 with offload, bf16 weights and fp32 masters: what every rank holds a part of is what a sum says."""
    result = results["new_rows"]
    assert result["new"] > 20
    assert result["rows"] == result["vocab_size"]
    assert result["used_in_store"] > 15
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert result["differences"][name] <= 1e-6
        assert result["moved"][name] > 0, "they are trained"
    assert all(np.isfinite(result["losses"]))
    assert result["losses"][-1] < result["losses"][0]
    exported = results["out_dir"] / "exported"
    checkpoint = next((results["out_dir"] / "new_rows" / "checkpoints").glob("step-*"))
    tokenizer_dir = results["out_dir"] / "tokenizer"
    export_checkpoint(checkpoint, results["out_dir"] / "new_rows" / "model", tokenizer_dir, exported, "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert model.config.vocab_size == len(tokenizer) == result["rows"]
    assert model.model.embed_tokens.weight[-1].tolist() == result["last_embedding"]
