"""Losses beside the cross-entropy: each family's own formula for each row, and what is said of them."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from equivalence_cases import make_model
from memory_stores import memory_store

from engine.batches import Batch
from engine.errors import DataError
from engine.model.attention import PACKED_ATTENTION, register_packed_attention
from engine.tasks import TASKS
from engine.tasks.auxiliary import balancing_of, balancing_sum, lines
from engine.tasks.task import STILL, LossOptions

register_packed_attention()
TASK = TASKS["causal_lm"]
COEFFICIENT = 0.1
SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "output_router_logits": True,
}  # fmt: skip
ROUTED = SMALL | {"router_aux_loss_coef": COEFFICIENT, "num_experts_per_tok": 2}
SHARED = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
CONFIGS = [
    hf.MixtralConfig(**ROUTED, num_local_experts=4),
    hf.Qwen2MoeConfig(**ROUTED, **SHARED),
    hf.Qwen3MoeConfig(**ROUTED, num_experts=4, moe_intermediate_size=16, head_dim=8),
    hf.OlmoeConfig(**ROUTED, num_experts=4),
    hf.FlexOlmoConfig(**ROUTED, num_experts=4),
    hf.GraniteMoeConfig(**ROUTED, num_local_experts=4),
    hf.PhimoeConfig(**ROUTED, num_local_experts=4),
    hf.MiniMaxConfig(**ROUTED, num_local_experts=4, head_dim=8, layer_types=["full_attention"] * 2),
    hf.Ernie4_5_MoeConfig(
        **(SMALL | {"router_aux_loss_coef": COEFFICIENT}), moe_num_experts=4, moe_k=2, moe_intermediate_size=16,
        moe_num_shared_experts=1,
    ),
    hf.JetMoeConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=48,
        num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, aux_loss_coef=COEFFICIENT,
    ),
    hf.DbrxConfig(
        vocab_size=61, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, output_router_logits=True,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": COEFFICIENT},
    ),
]  # fmt: skip


def two_rows(task: Any) -> tuple[Batch, list[Batch]]:
    """Both rows in one micro-batch, and each alone; one document a row."""
    store, index = memory_store("causal_lm", 1)
    return task.batch(store, index, np.array([4, 9]), 0, STILL), [
        task.batch(store, index, np.array([n]), 0, STILL) for n in (4, 9)
    ]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_a_row_has_the_loss_of_transformers_and_rows_add_up_by_tokens(config: Any) -> None:
    torch.manual_seed(3)
    packed = hf.AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION)
    stock = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    stock.load_state_dict(packed.state_dict())
    packed.eval(), stock.eval()
    both, alone = two_rows(TASK)
    expected = 0.0
    for batch in alone:
        theirs = stock(input_ids=batch.input_ids, use_cache=False).aux_loss.item()
        expected += COEFFICIENT * theirs * batch.num_tokens
    output = TASK.loss(packed, both, LossOptions())
    assert output.auxiliary["balancing_loss"].item() == pytest.approx(expected, rel=1e-4)
    output.auxiliary["balancing_loss"].backward()
    routers = [parameter for parameter in packed.parameters() if parameter.shape == (4, 32)]
    assert routers and all(router.grad is not None and router.grad.any() for router in routers)
    assert TASK.loss(packed, both, LossOptions()).loss_sum.item() == pytest.approx(output.loss_sum.item()), "kept apart"


def test_padding_and_filler_rows_count_for_nothing() -> None:
    model = make_model("mixtral", packed=False).eval()
    assert TASK.padded is not None
    both, alone = two_rows(TASK.padded)
    assert both.num_padding > 0
    sums = [
        TASK.padded.loss(model, batch, LossOptions()).auxiliary["balancing_loss"].item() for batch in (both, *alone)
    ]
    assert sums[0] == pytest.approx(sums[1] + sums[2], rel=1e-5)
    store, index = memory_store("causal_lm")
    filler = TASK.batch(store, index, np.array([], dtype=np.int64), 3, STILL)
    assert (
        TASK.loss(make_model("mixtral", packed=True), filler, LossOptions()).auxiliary["balancing_loss"].item() == 0.0
    )


def test_the_sum_over_rows_is_not_the_whole_batch() -> None:
    """The definition matters: transformers' form of the same two rows is another number."""
    model = make_model("mixtral", packed=True).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    both, _ = two_rows(TASK)
    as_one = replace(both, row_tokens=(both.num_tokens,))
    sums = [TASK.loss(model, batch, LossOptions()).auxiliary["balancing_loss"].item() for batch in (both, as_one)]
    assert sums[0] != pytest.approx(sums[1], rel=1e-4)


def test_an_evaluation_has_the_cross_entropy_alone() -> None:
    both, _ = two_rows(TASK)
    with torch.no_grad():
        assert TASK.loss(make_model("mixtral", packed=True), both, LossOptions()).auxiliary == {}


def test_router_logits_that_a_family_keeps_to_itself_are_an_error() -> None:
    balancing = balancing_of(make_model("mixtral", packed=False))
    assert balancing is not None
    with pytest.raises(DataError, match="returns no router logits: set output_router_logits to false"):
        balancing_sum(balancing, {}, two_rows(TASK)[0])


@pytest.mark.parametrize(
    ("config", "is_computed", "expected"),
    [
        (CONFIGS[0], True, r"balancing loss of the router added \(router_aux_loss_coef 0.1\): computed for each row"),
        (CONFIGS[-2], True, r"balancing loss of the router added \(aux_loss_coef 0.1\)"),
        (CONFIGS[-1], True, r"balancing loss of the router added \(moe_loss_weight 0.1\)"),
        (CONFIGS[0], False, r"not added to the loss, though config.json asks for it: router_aux_loss_coef 0.1$"),
        (
            hf.MixtralConfig(**(SMALL | {"output_router_logits": False}), router_aux_loss_coef=0.1),
            True,
            "",
        ),
        (hf.LlamaConfig(num_hidden_layers=1), True, ""),
        (hf.LlamaConfig(num_hidden_layers=1, router_z_loss_coef=0.0), True, ""),
        (
            hf.DeepseekV3Config(
                **{key: value for key, value in SMALL.items() if key != "output_router_logits"}, aux_loss_alpha=0.001,
                n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
            ),
            True,
            r"asks for it: num_nextn_predict_layers 1, aux_loss_alpha 0.001$",
        ),
        (
            hf.BambaConfig(**SMALL, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, z_loss_coefficient=0.2),
            True,
            r"^z-loss added \(z_loss_coefficient 0.2\): the mean over targets$",
        ),
    ],
    ids=["mixtral", "jetmoe", "dbrx", "tags", "off", "dense", "zero", "deepseek", "bamba"],
)  # fmt: skip
def test_what_is_said(config: Any, is_computed: bool, expected: str) -> None:
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    said = list(lines(model, is_computed))
    assert len(said) == bool(expected)
    for line in said:
        assert re.search(expected, line), line
