"""Rows of one document train families that cannot pack: padded, with their own attention."""

import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from equivalence_cases import make_model
from memory_stores import memory_store

from engine.errors import DataError
from engine.model.build import StoreFacts, fitting_task, made_model
from engine.model.isolation import check_isolation, fit_to_rows
from engine.sections import ModelSection
from engine.tasks import TASKS
from engine.tasks.task import STILL, LossOptions, Task

PACKED = TASKS["causal_lm"]
TOKENS = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL: dict[str, Any] = TOKENS | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
STATES = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8,
}  # fmt: skip
CONFIGS = [
    hf.Gemma2Config(**SMALL, head_dim=8, attn_logit_softcapping=0.5, query_pre_attn_scalar=8, sliding_window=8),
    hf.GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    hf.MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8),
    hf.Mamba2Config(
        **TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8
    ),
    hf.FalconMambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8),
    hf.BambaConfig(**SMALL, **STATES, attn_layer_indices=[1]),
    hf.GraniteMoeHybridConfig(
        **SMALL, **STATES, layer_types=["mamba", "attention"], num_local_experts=4, num_experts_per_tok=2,
        shared_intermediate_size=16,
    ),
    hf.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    hf.RwkvConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=64),
    hf.RecurrentGemmaConfig(
        **(SMALL | {"num_hidden_layers": 3}), lru_width=32, attention_window_size=16, head_dim=8
    ),
    hf.BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4),
    hf.GPTNeoConfig(
        **TOKENS, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=8, max_position_embeddings=64,
    ),
]  # fmt: skip


def padded_form() -> Task:
    assert PACKED.padded is not None
    return PACKED.padded


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_the_loss_is_the_one_of_transformers_on_the_padded_batch(config: Any) -> None:
    task = fit_to_rows(config, PACKED, padded_form())
    assert not task.packs, "this family cannot pack"
    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # large enough for what a cap or a state does to be seen
    store, index = memory_store("causal_lm", 1)
    batch = task.batch(store, index, np.array([4, 9, 2, 17]), 0, STILL)
    ids, mask = batch.input_ids, batch.attention_mask
    labels = torch.full_like(ids, -100)
    labels.view(-1)[batch.target_positions + 1] = batch.target_ids
    assert torch.equal(labels[labels >= 0], ids[labels >= 0])
    with torch.no_grad():
        ours = task.loss(model, batch, LossOptions())
        alone = task.loss(model, task.batch(store, index, np.array([4]), 0, STILL), LossOptions())
        theirs = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss * len(batch.target_ids)
    assert ours.loss_sum.item() == pytest.approx(theirs.item(), rel=1e-4)
    results = task.results(ours, batch)
    assert [result.num_targets for result in results] == index.row_targets[[4, 9, 2, 17]].tolist()
    assert results[0].loss == pytest.approx(alone.loss_sum.item(), rel=1e-4), "padding and neighbours change nothing"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
def test_a_family_that_packs_goes_on_packing_rows_of_one_document(family: str) -> None:
    assert fit_to_rows(make_model(family, packed=False).config, PACKED, padded_form()) is PACKED


def test_filler_rows_and_first_tokens_are_no_targets() -> None:
    store, index = memory_store("causal_lm", 1)
    task = padded_form()
    assert len(task.batch(store, index, np.array([], dtype=np.int64), 3, STILL).target_ids) == 0
    rows = np.arange(24)
    packed, padded = (form.batch(store, index, rows, 0, STILL) for form in (PACKED, task))
    assert padded.target_ids.tolist() == packed.target_ids.tolist()
    assert padded.row_tokens == packed.row_tokens == tuple(index.lengths)


@pytest.mark.parametrize(
    "config", [CONFIGS[0], CONFIGS[1], CONFIGS[2], CONFIGS[7], CONFIGS[10]], ids=lambda config: config.model_type
)
def test_packed_rows_are_refused_with_the_way_out(config: Any) -> None:
    with pytest.raises(DataError, match=r"; data\.packing: none trains it on padded rows of one document each$"):
        check_isolation(config, PACKED)


def test_a_model_that_is_not_causal_has_no_way_out() -> None:
    config = hf.BertConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    for form in (PACKED, padded_form()):
        with pytest.raises(DataError, match=r"\(not a causal model\)$"):
            check_isolation(config, form)


@pytest.mark.parametrize(("one_document_a_row", "packs"), [(True, False), (False, True)])
def test_only_rows_of_one_document_are_padded(one_document_a_row: bool, packs: bool) -> None:
    values = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1}
    section = ModelSection.model_validate({"init": "random", "config": values})
    facts = StoreFacts(vocab_size=61, pad_id=0, bos_id=1, eos_id=2, label_names=())
    task = fitting_task(section, PACKED, facts, one_document_a_row)
    assert task.packs == packs
    assert task.why_padded.startswith("" if packs else "model type mamba cannot be trained on packed rows: documents")


@pytest.mark.parametrize("one_document_a_row", [True, False])
@pytest.mark.parametrize(("family", "packs"), [("bert", True), ("deberta-v2", False)])
def test_tasks_of_whole_documents_are_flat_where_the_family_can(
    family: str, packs: bool, one_document_a_row: bool
) -> None:
    values = {"model_type": family, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    section = ModelSection.model_validate({"init": "random", "config": values})
    facts = StoreFacts(vocab_size=61, pad_id=0, bos_id=1, eos_id=2, label_names=("a", "b"))
    for name in ("sequence_classification", "token_classification"):
        task = fitting_task(section, TASKS[name], facts, one_document_a_row)
        assert task.packs == packs and (task is TASKS[name]) == packs
        assert not packs or not task.why_padded
        assert packs or re.search("documents in one row see each other", task.why_padded)


OWN_TABLE: dict[str, dict[str, Any]] = {
    "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
}


@pytest.mark.parametrize("family", OWN_TABLE)
def test_an_attention_of_the_familys_own_is_refused_with_the_way_out(family: str) -> None:
    """Families that look attention up in a table of their own, where the packed one is not."""
    section = ModelSection.model_validate({"init": "random", "config": {"model_type": family}})
    with pytest.raises(DataError, match=r"cannot be exchanged for .* apart; data\.packing: none trains it on padded"):
        made_model(section, None, hf.AutoConfig.for_model(family, **OWN_TABLE[family]), PACKED, 0, {}, is_empty=True)
