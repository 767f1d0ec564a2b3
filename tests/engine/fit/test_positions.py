"""Positions of real families: as many tokens as are named run, one more does not; and documents held against them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from store_fixtures import SourceDocuments, make_store

from data_prep.rows.arrange import RowPlan
from engine.finding import Finding
from engine.fit.model_facts import ModelFacts, Positions
from engine.fit.positions import check_positions, check_row_length
from engine.model.positions import positions_of

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = SIZES | {"pad_token_id": 0}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}  # fmt: skip
TABLES = {
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=12), 12),
    "bert": (hf.BertForSequenceClassification, hf.BertConfig(**ENCODER, max_position_embeddings=12), 12),
    "roberta": (
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig(**(SIZES | {"pad_token_id": 1, "bos_token_id": 0}), max_position_embeddings=12),
        10,
    ),
    "distilbert": (
        hf.DistilBertForTokenClassification,
        hf.DistilBertConfig(vocab_size=40, dim=16, hidden_dim=16, n_layers=1, n_heads=2, max_position_embeddings=12),
        12,
    ),
    "electra": (
        hf.ElectraForTokenClassification,
        hf.ElectraConfig(**ENCODER, embedding_size=16, max_position_embeddings=12),
        12,
    ),
    "opt": (
        hf.OPTForCausalLM,
        hf.OPTConfig(vocab_size=40, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=1,
                     num_attention_heads=2, max_position_embeddings=12),
        12,
    ),
    "bart": (
        hf.BartForSequenceClassification, hf.BartConfig(vocab_size=40, **BART, max_position_embeddings=12), 12,
    ),
    "gpt-neo": (
        hf.GPTNeoForCausalLM,
        hf.GPTNeoConfig(vocab_size=40, hidden_size=16, num_layers=1, attention_types=[[["global"], 1]], num_heads=2,
                        max_position_embeddings=12),
        12,
    ),
    "gptj": (
        hf.GPTJForCausalLM,
        hf.GPTJConfig(vocab_size=40, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=12),
        12,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", TABLES)
def test_a_table_ends_where_it_is_said_to(family: str) -> None:
    make, config, count = TABLES[family]
    with torch.device("meta"):
        assert positions_of(make(config)) == Positions(count, "table")
    model = make(config).eval()
    ids = torch.full((1, count + 1), 5)
    ids[0, -2:] = 2  # BART's head wants the end token at the end, in both lengths
    model(input_ids=torch.cat([ids[:, : count - 1], ids[:, -1:]], dim=1))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


@pytest.mark.parametrize(
    ("model", "positions"),
    [
        (hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, max_position_embeddings=12)), Positions(12, "trained")),
        (hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, max_position_embeddings=12, num_key_value_heads=1)),
         Positions(12, "trained")),
        (hf.T5ForSequenceClassification(hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1,
                                                    num_heads=2)), None),
        (hf.BloomForCausalLM(hf.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)), None),
    ],
    ids=["llama", "qwen2", "t5", "bloom"],
)  # fmt: skip
def test_computed_positions_have_no_end(model: Any, positions: Positions | None) -> None:
    assert positions_of(model) == positions


def facts(count: int, kind: Any) -> ModelFacts:
    return ModelFacts("model.path model", 300, Positions(count, kind))


def finding(folder: Path, model: ModelFacts, *lengths: int, row_tokens: int = 64) -> Finding:
    documents = [([5] * length, [False] + [True] * (length - 1)) for length in lengths]
    plan = RowPlan(row_tokens, "best_fit", "split", 1)
    return check_positions(model, [make_store(folder / "store", [SourceDocuments("records", documents)], plan)])


@pytest.mark.parametrize(
    ("kind", "lengths", "row_tokens", "verdict"),
    [
        ("table", (32, 3), 64, "ok"),
        ("table", (30,) * 9, 64, "ok"),  # rows are longer than the table, documents are not
        ("table", (33, 3), 64, "error"),
        ("trained", (33, 3), 64, "warning"),
        ("trained", (32,), 64, "ok"),
        ("table", (90,), 32, "ok"),  # split into pieces that begin anew
        ("table", (90,), 33, "error"),
    ],
)
def test_the_longest_document_counts_and_not_the_row(
    tmp_path: Path, kind: str, lengths: tuple[int, ...], row_tokens: int, verdict: str
) -> None:
    found = finding(tmp_path, facts(32, kind), *lengths, row_tokens=row_tokens)
    assert found.verdict == verdict
    if verdict != "ok":
        assert "32" in found.text and str(min(max(lengths), row_tokens)) in found.text
        assert "records.jsonl:1" in found.text


@pytest.mark.parametrize(("kind", "said"), [("table", "are refused once the data"), ("trained", "has not seen")])
def test_before_there_is_a_store_a_row_may_be_one_document(kind: str, said: str) -> None:
    found = check_row_length(facts(32, kind), 33)
    assert found is not None and found.verdict == "warning" and said in found.text
    assert check_row_length(facts(32, kind), 32) is None
    assert check_row_length(ModelFacts("model.config", 300, None), 10**6) is None
